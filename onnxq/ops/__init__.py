"""The ops of the domain ``onnxq``: their names, their function bodies, and the nodes that use them.

A new op is one module here that defines its body, one line in `_BODIES`, and its kernel in ``custom_ops``.
"""

from __future__ import annotations

import functools
from typing import Any

import onnx
import onnx_ir as ir
from onnxscript import OnnxFunction

from onnxq.errors import ModelError
from onnxq.ops import binary, codebook, codebook_legacy, float8, frame, lowbit, lowbit_legacy, mixed

DOMAIN = "onnxq"
OPSET_VERSION = 1
LAYOUT_VERSION = 1
OLDEST_OPSET = 13
"""The oldest opset of the default domain that the function bodies can be written in."""
FUSING_OPSET = 21
"""From here on stock ONNX Runtime folds a low-bit weight to its own 8-bit form instead of float32."""

_BODIES: dict[str, tuple[OnnxFunction[..., Any], OnnxFunction[..., Any]]] = {
    "LowBitMatMul": (lowbit.LowBitMatMul, lowbit_legacy.LowBitMatMul),
    "LowBitGather": (lowbit.LowBitGather, lowbit_legacy.LowBitGather),
    "CodebookMatMul": (codebook.CodebookMatMul, codebook_legacy.CodebookMatMul),
    "MixedBitMatMul": (mixed.MixedBitMatMul, mixed.MixedBitMatMul),
    "Float8MatMul": (float8.Float8MatMul, float8.Float8MatMul),
    "Float8Gather": (float8.Float8Gather, float8.Float8Gather),
    "Float8Round": (float8.Float8Round, float8.Float8Round),
    "Float8RoundTokens": (float8.Float8RoundTokens, float8.Float8RoundTokens),
    "BinaryCodeMatMul": (binary.BinaryCodeMatMul, binary.BinaryCodeMatMul),
    "MixedBitGather": (binary.MixedBitGather, binary.MixedBitGather),
    "FrameAnalysis": (frame.FrameAnalysis, frame.FrameAnalysis),
    "FrameSynthesis": (frame.FrameSynthesis, frame.FrameSynthesis),
}


def op_types() -> tuple[str, ...]:
    """Names of the ops that the kernel library implements."""
    return tuple(_BODIES)


@functools.cache
def _protos(op_type: str, modern: bool) -> tuple[onnx.FunctionProto, ...]:
    function = _BODIES[op_type][0 if modern else 1]
    # Callers come before callees here, and the reference evaluator wants it the other way round.
    callees = reversed(function.function_ir.get_called_functions().values())
    return (*(callee.to_function_proto() for callee in callees), function.to_function_proto())


def functions_for(op_type: str, opset: int) -> list[ir.Function]:
    """The body of an op and the functions that it calls, for a model of the given opset.

    Args:
        op_type: a name of `op_types`.
        opset: version of the default domain that the model imports; the functions will import the same.

    Returns:
        New functions, callees first.

    Raises:
        ModelError: the opset is older than any body that can be written.
    """
    if opset < OLDEST_OPSET:
        raise ModelError(
            f"opset {opset} is too old: {op_type} needs opset {OLDEST_OPSET} or newer (21 is best). "
            "Export the model again with `onnxq export --opset 21`, or raise it with onnx's version converter."
        )
    functions = [ir.serde.deserialize_function(proto) for proto in _protos(op_type, opset >= FUSING_OPSET)]
    for function in functions:
        function.opset_imports[""] = opset
    return functions


@functools.cache
def body_names(op_type: str) -> frozenset[str]:
    """Names of the functions that an op's body is made of, its own included; empty for other ops."""
    if op_type not in _BODIES:
        return frozenset()
    return frozenset(proto.name for modern in (True, False) for proto in _protos(op_type, modern))
