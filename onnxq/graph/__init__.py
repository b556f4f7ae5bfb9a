"""The graph: open a model, find its weights, write the result. No solver, no format."""

from __future__ import annotations

from onnxq.graph.load import LoadedModel, load
from onnxq.graph.save import SavedModel, StreamingWriter
from onnxq.graph.sites import Site
from onnxq.graph.tensors import check_finite, read_array
from onnxq.graph.weights import SiteReport, Skipped, Weight, find_weights

__all__ = [
    "LoadedModel",
    "SavedModel",
    "Site",
    "SiteReport",
    "Skipped",
    "StreamingWriter",
    "Weight",
    "check_finite",
    "find_weights",
    "load",
    "read_array",
]
