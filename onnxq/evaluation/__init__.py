"""How far a candidate model is from its reference, and how fast each is.

- `outputs`: errors of the outputs.
- `layers`: errors of the tensors between, by name.
- `similarity`: sentence embeddings and what depends on them.
- `latency`: paired latency, session creation, memory.
"""

from __future__ import annotations

from onnxq.evaluation.latency import LatencyReport, LoadReport, Timing, measure_latency, measure_load
from onnxq.evaluation.layers import LayerError, compare_layers
from onnxq.evaluation.outputs import OutputComparison, OutputError, compare_outputs
from onnxq.evaluation.similarity import (
    SimilarityReport,
    compare_embeddings,
    embed,
    rating_correlation,
    spearman,
)

__all__ = [
    "LatencyReport",
    "LayerError",
    "LoadReport",
    "OutputComparison",
    "OutputError",
    "SimilarityReport",
    "Timing",
    "compare_embeddings",
    "compare_layers",
    "compare_outputs",
    "embed",
    "measure_latency",
    "measure_load",
    "rating_correlation",
    "spearman",
]
