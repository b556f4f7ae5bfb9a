"""Opening model-local functions that use weights, so that their sites stand in the main graph."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

_SITE_OPS = ("MatMul", "Gemm", "Gather")


def inline_functions_with_sites(model: ir.Model) -> tuple[str, ...]:
    """Inlines the model's functions when one of them may hold a site; returns the names of those that were there.

    A function can't read the main graph's initializers, where stored weights live, and calibration can't look inside.
    """
    names = tuple(f"{function.domain}::{function.name}" for function in model.functions.values())
    inside = any(
        node.op_type in _SITE_OPS
        for function in model.functions.values()
        for node in ir.traversal.RecursiveGraphIterator(function)
    )
    if not inside:
        return ()
    InlinePass()(model)
    return names
