"""CodebookMatMul: what the op of the codebook format means, in standard ops.

A level is looked up in a table by a weight's own code and the codes in front of it: those of the outputs 32, 64, ...
before, which are the same place of the packed tiles before, counted round. The looked-up levels are 7-bit codes of the
uniform format, so everything else is `onnxq.ops.lowbit`, whose 8-bit product stock ONNX Runtime folds this to as well.
(`onnxq.ops.codebook_legacy` serves opsets below 21.) The formula is that of `onnxq.formats.codebook`.
"""

from __future__ import annotations

# ruff: noqa: N802 - functions and parameters are named as the ops and attributes they define.
# ruff: noqa: ARG001 - accuracy_level and layout_version are attributes of the op that only the kernels read.
import onnx
from onnxscript import opset21 as op
from onnxscript import script
from onnxscript.values import Opset

from onnxq.ops.lowbit import LowBitCodes, LowBitProduct

_onnxq = Opset("onnxq", 1)


@script(_onnxq, default_opset=op)
def CodebookPart(codes, tiles, bits, before):
    """The codes `before` tiles in front, where an index has them: uint8 like `codes`; bits beyond a byte are lost."""
    # The remainder takes the sign of the divisor, so the first tiles' predecessors are the last ones.
    tile = op.Range(op.Constant(value_int=0), tiles, op.Constant(value_int=1))
    # No index has a bit 7: a shift by more than a byte, which has no meaning, isn't needed.
    place = op.Cast(op.Min(bits * before, op.Constant(value_int=7)), to=onnx.TensorProto.UINT8)
    return op.BitShift(op.Gather(codes, op.Mod(tile - before, tiles), axis=0), place, direction="LEFT")


@script(_onnxq, default_opset=op)
def CodebookLevels(packed, table, bits: int, window: int):
    """Packed bytes uint8 [T, B, bits, 32, 4] to levels, each at the top of a byte: uint8 [T, B, 8, 32, 4]."""
    width = op.Constant(value_int=bits)
    spare = op.Cast(op.Constant(value_int=8) - width, to=onnx.TensorProto.UINT8)
    codes = op.BitShift(LowBitCodes(packed, bits=bits), spare, direction="RIGHT")
    tiles = op.Squeeze(op.Shape(packed, start=0, end=1))
    # A window of 6 at 1 bit looks back at five tiles.
    index = op.BitwiseOr(codes, CodebookPart(codes, tiles, width, op.Constant(value_int=1)))
    index = op.BitwiseOr(index, CodebookPart(codes, tiles, width, op.Constant(value_int=2)))
    index = op.BitwiseOr(index, CodebookPart(codes, tiles, width, op.Constant(value_int=3)))
    index = op.BitwiseOr(index, CodebookPart(codes, tiles, width, op.Constant(value_int=4)))
    index = op.BitwiseOr(index, CodebookPart(codes, tiles, width, op.Constant(value_int=5)))
    entries = op.Pow(op.Constant(value_int=2), op.Constant(value_int=window))
    index = op.BitwiseAnd(index, op.Cast(entries - 1, to=onnx.TensorProto.UINT8))
    # Bit 7 of an entry, which no level has, falls out here.
    one = op.Cast(op.Constant(value_int=1), to=onnx.TensorProto.UINT8)
    return op.Gather(op.BitShift(table, one, direction="LEFT"), op.Cast(index, to=onnx.TensorProto.INT32), axis=0)


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
