"""Helpers around the package: fetching test models and text, building synthetic models, benchmarks.

Not installed.
"""
