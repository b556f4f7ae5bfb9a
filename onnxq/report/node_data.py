"""Per-node numbers in the form that Google's Model Explorer overlays on a graph."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from onnxq.report.inspect import InspectedWeight, Inspection
from onnxq.report.units import noise_decibels

Metric = Literal["bits", "bytes", "error"]
_GOOD, _BAD = "#5b8c5a", "#c8553d"


def node_data(inspection: Inspection, metric: Metric = "bits") -> dict[str, Any]:
    """Node data of one graph: a number for every node that reads a weight, keyed by what the node computes.

    Args:
        inspection: the model.
        metric: true bits per weight, bytes in the file, or signal-to-noise of the weight in dB (weights
            without a known error are left out).
    """
    results = {}
    for weight in inspection.weights:
        value = _value(weight, metric)
        if value is not None:
            results.update({output: {"value": value} for output in weight.outputs if output})
    low, high = (_BAD, _GOOD) if metric == "error" else (_GOOD, _BAD)
    return {"results": results, "gradient": [{"stop": 0, "bgColor": low}, {"stop": 1, "bgColor": high}]}


def write_node_data(inspection: Inspection, path: str | Path, metric: Metric = "bits") -> None:
    """Writes `node_data` as JSON."""
    Path(path).write_text(json.dumps(node_data(inspection, metric), indent=1), encoding="utf-8")


def _value(weight: InspectedWeight, metric: Metric) -> float | None:
    if metric == "bits":
        return round(weight.bits_per_weight, 4)
    if metric == "bytes":
        return weight.bytes
    if weight.relative_error is None:
        return None
    level = noise_decibels(weight.relative_error)
    return 200.0 if math.isinf(level) else round(level, 2)
