"""The version that reports and written models carry."""

from __future__ import annotations

from importlib import metadata

try:
    __version__ = metadata.version("onnxq")
except metadata.PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+source"
