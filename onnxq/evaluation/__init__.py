"""How far a candidate model is from its reference, and how fast each is.

- `outputs`: errors of the outputs.
- `layers`: errors of the tensors between, by name.
- `similarity`: sentence embeddings and what depends on them.
- `perplexity`: causal language models on running text.
- `accuracy`: classifiers on labelled arrays.
- `tasks`: one of these three, for a model and its reference.
- `latency`: paired latency, session creation, memory.
"""

from __future__ import annotations

from onnxq.evaluation.accuracy import AccuracyChange, AccuracyReport, top1
from onnxq.evaluation.latency import LatencyReport, LoadReport, Timing, measure_latency, measure_load
from onnxq.evaluation.layers import LayerError, compare_layers
from onnxq.evaluation.outputs import OutputComparison, OutputError, compare_outputs
from onnxq.evaluation.perplexity import PerplexityChange, PerplexityReport, compare_perplexities, measure_perplexity
from onnxq.evaluation.similarity import (
    SimilarityReport,
    compare_embeddings,
    embed,
    rating_correlation,
    spearman,
)

__all__ = [
    "AccuracyChange",
    "AccuracyReport",
    "LatencyReport",
    "LayerError",
    "LoadReport",
    "OutputComparison",
    "OutputError",
    "PerplexityChange",
    "PerplexityReport",
    "SimilarityReport",
    "Timing",
    "compare_embeddings",
    "compare_layers",
    "compare_outputs",
    "compare_perplexities",
    "embed",
    "measure_latency",
    "measure_load",
    "measure_perplexity",
    "rating_correlation",
    "spearman",
    "top1",
]
