"""Formats: how a weight is stored, what it costs, and how it is read back. No graph, no files."""
