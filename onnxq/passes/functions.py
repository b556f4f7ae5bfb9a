"""Opening model-local functions that hold weights, so that their sites stand in the main graph."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from onnxq.graph import find_weights


def inline_functions_with_sites(model: ir.Model) -> int:
    """Inlines the model's functions when one of them holds a weight or is handed one; returns how many there were.

    A function can't read the main graph's initializers, where stored weights live, and calibration can't look inside.
    """
    if not model.functions:
        return 0
    inside = any(
        isinstance(site.graph, ir.Function) for weight in find_weights(model).weights for site in weight.sites
    )
    if not inside:
        return 0
    count = len(model.functions)
    InlinePass()(model)
    return count
