"""The body of CodebookMatMul for models of opset 13 to 20.

Same meaning as `onnxq.ops.codebook`, written as `onnxq.ops.lowbit_legacy` is and for the same reasons.
"""

from __future__ import annotations

# ruff: noqa: N802 - functions and parameters are named as the ops and attributes they define.
# ruff: noqa: ARG001 - accuracy_level and layout_version are attributes of the op that only the kernels read.
import onnx
from onnxscript import opset13 as op
from onnxscript import script
from onnxscript.values import Opset

from onnxq.ops.lowbit_legacy import LowBitCodes, LowBitProduct

_onnxq = Opset("onnxq", 1)


@script(_onnxq, default_opset=op)
def CodebookPart(codes, tiles, bits, entries, before):
    """The codes `before` tiles in front, where an index below `entries` has them: int32 like `codes`."""
    # The remainder takes the sign of the divisor, so the first tiles' predecessors are the last ones.
    tile = op.Range(op.Constant(value_int=0), tiles, op.Constant(value_int=1))
    place = op.Cast(op.Pow(op.Constant(value_int=2), bits * before), to=onnx.TensorProto.INT32)
    return op.Mod(op.Gather(codes, op.Mod(tile - before, tiles), axis=0) * place, entries)


@script(_onnxq, default_opset=op)
def CodebookLevels(packed, table, bits: int, window: int):
    """Packed bytes uint8 [T, B, bits, 32, 4] to levels uint8 [T, B, 8, 32, 4]."""
    width = op.Constant(value_int=bits)
    codes = op.Cast(LowBitCodes(packed, bits=bits), to=onnx.TensorProto.INT32)
    tiles = op.Squeeze(op.Slice(op.Shape(packed), op.Constant(value_ints=[0]), op.Constant(value_ints=[1])))
    entries = op.Cast(op.Pow(op.Constant(value_int=2), op.Constant(value_int=window)), to=onnx.TensorProto.INT32)
    # A window of 6 at 1 bit looks back at five tiles. The parts share no bits, so that their sum puts them together.
    index = codes + CodebookPart(codes, tiles, width, entries, op.Constant(value_int=1))
    index = index + CodebookPart(codes, tiles, width, entries, op.Constant(value_int=2))
    index = index + CodebookPart(codes, tiles, width, entries, op.Constant(value_int=3))
    index = index + CodebookPart(codes, tiles, width, entries, op.Constant(value_int=4))
    index = index + CodebookPart(codes, tiles, width, entries, op.Constant(value_int=5))
    level = op.Mod(
        op.Cast(table, to=onnx.TensorProto.INT32), op.Cast(op.Constant(value_int=128), to=onnx.TensorProto.INT32)
    )
    return op.Gather(op.Cast(level, to=onnx.TensorProto.UINT8), index, axis=0)


@script(_onnxq, default_opset=op)
def CodebookMatMul(
    x,
    packed,
    table,
    scales,
    zero_points,
    bias,
    K: int,
    N: int,
    bits: int,
    window: int,
    group_size: int,
    gain: float = 1.0,
    accuracy_level: int = 4,
    layout_version: int = 1,
):
    """X [..., K] times the transpose of the weight [N, K], plus bias [N] or [1]; float32."""
    levels = CodebookLevels(packed, table, bits=bits, window=window)
    return LowBitProduct(x, levels, scales, zero_points, bias, K=K, N=N, bits=7, group_size=group_size, gain=gain)
