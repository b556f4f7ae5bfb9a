"""MixedBitMatMul: what the op of the mixed format means, in standard ops.

The bytes of a block of 32 outputs by 32 inputs are rows of 128, as many as its depth, and begin behind those of all
blocks that are less deep, or as deep and before it. So it is known which row holds a bit plane of a quad of inputs; two
shifts cut out its field. Codes are then put in the order of x, [K, T, 32], so that x stays as it is. The formula is
that of `onnxq.formats.mixed`.

All but the last product depends on initializers alone, so ONNX Runtime folds it to a float32 weight when a session is
created. It keeps every step until it has folded all, so there are few large ones here, in bytes where that is possible;
integer products add bytes up, since Add takes none. All ops are as they were in opset 13, so one body serves every
opset from there on; constants are written out, since a plain number would become a CastLike (opset 15). It calls no
function of another body: those have one name and two meanings, which one model can't have both of.
"""

from __future__ import annotations

# ruff: noqa: N802 - functions and parameters are named as the ops and attributes they define.
# ruff: noqa: ARG001 - accuracy_level and layout_version are attributes of the op that only the kernels read.
import onnx
from onnxscript import opset13 as op
from onnxscript import script
from onnxscript.values import Opset

_onnxq = Opset("onnxq", 1)

# By depth, 0 to 8: how many levels there are, where they begin in the tables with 0..255 behind, and which is worth 0.
_LEVELS = [1, 16, 16, 16, 16, 32, 64, 128, 256]
_FIRST = [160, 0, 16, 32, 48, 64, 96, 160, 160]
_ZERO = [0.0, 63.5, 63.5, 63.5, 63.5, 63.5, 63.5, 63.5, 128.0]
# By depth, 0 to 8: by what an index counts the code of its own tile and those of the 1, 2 and 3 before.
_PLACES = [1, 0, 0, 0, 1, 2, 4, 8, 1, 4, 0, 0, 1, 8, 0, 0, *[1, 0, 0, 0] * 5]


@script(_onnxq, default_opset=op)
def MixedRows(depths):
    """The first row of each block: depths int64 [T, J] to the same."""
    kind = op.Reshape(op.Constant(value_ints=[1, 2, 3, 4, 5, 6, 7, 8]), op.Constant(value_ints=[8, 1, 1]))
    present = op.Cast(op.Equal(depths, kind), to=onnx.TensorProto.INT64)
    # In [8, T, J] blocks follow each other as they do in the packed bytes.
    rows = present * kind
    before = op.CumSum(op.Reshape(rows, op.Constant(value_ints=[-1])), op.Constant(value_int=0), exclusive=1)
    return op.ReduceSum(op.Reshape(before, op.Shape(rows)) * present, op.Constant(value_ints=[0]), keepdims=0)


@script(_onnxq, default_opset=op)
def MixedCodes(packed, depths):
    """Packed bytes and depths int64 [T, J] to codes in the order in which they are stored, uint8 [32 J, T, 32]."""
    one = op.Constant(value_int=1)
    two = op.Constant(value_int=2)
    eight = op.Constant(value_int=8)
    first = op.Constant(value_ints=[0])
    second = op.Constant(value_ints=[1])
    inner = op.Constant(value_ints=[-1])
    # A plane that a depth does not have reads the row of zeros at the end.
    none = op.Expand(op.Cast(op.Constant(value_int=0), to=onnx.TensorProto.UINT8), op.Constant(value_ints=[128]))
    rows = op.Reshape(op.Concat(packed, none, axis=0), op.Constant(value_ints=[-1, 128]))
    last = op.Slice(op.Shape(rows), first, second) - one

    # [T, J, 8 quads, 4 planes]
    width = op.Constant(value_ints=[8, 4, 2, 1])
    bit = op.Reshape(op.Constant(value_ints=[0, 1, 2, 3, 4, 5, 6, 7]), op.Constant(value_ints=[8, 1])) * width
    depth = op.Unsqueeze(depths, op.Constant(value_ints=[2, 3]))
    wider = depth - op.Mod(depth, width * two)
    row = op.Unsqueeze(MixedRows(depths), op.Constant(value_ints=[2, 3])) + wider + bit / eight
    row = op.Where(op.Equal(op.Mod(depth / width, two), one), row, last)

    # [T, J, 8, 4, 128]: bits above a field are shifted out, then those below.
    above = op.Unsqueeze(op.Cast(eight - width - op.Mod(bit, eight), to=onnx.TensorProto.UINT8), inner)
    below = op.Unsqueeze(op.Cast(eight - width, to=onnx.TensorProto.UINT8), inner)
    field = op.BitShift(op.Gather(rows, row, axis=0), above, direction="LEFT")
    field = op.BitShift(field, below, direction="RIGHT")
    place = op.Unsqueeze(op.Pow(two, op.Mod(wider, eight)), op.Constant(value_ints=[3]))
    codes = op.MatMulInteger(op.Cast(place, to=onnx.TensorProto.UINT8), field)

    quads = op.Reshape(op.Cast(codes, to=onnx.TensorProto.UINT8), op.Constant(value_ints=[0, 0, 8, 32, 4]))
    tiles = op.Slice(op.Shape(depths), first, second)
    shape = op.Concat(inner, tiles, op.Constant(value_ints=[32]), axis=0)
    return op.Reshape(op.Transpose(quads, perm=[1, 2, 4, 0, 3]), shape)


@script(_onnxq, default_opset=op)
def MixedBefore(tile, tiles, wide):
    """The tiles 0, 1, 2 and 3 before each, counted round in its band of `wide` tiles: int64 [T] to [T, 4]."""
    column = op.Constant(value_ints=[1])
    first = tile / wide * wide
    # The last band may have fewer. The remainder takes the sign of the divisor.
    size = op.Unsqueeze(op.Min(wide, tiles - first), column)
    place = op.Unsqueeze(tile - first, column) - op.Constant(value_ints=[0, 1, 2, 3])
    return op.Unsqueeze(first, column) + op.Mod(place, size)


@script(_onnxq, default_opset=op)
def MixedValues(tables, steps):
    """What an index is worth, 256 of each depth: float [9 * 256]."""
    column = op.Constant(value_ints=[9, 1])
    byte = op.Range(op.Constant(value_int=0), op.Constant(value_int=256), op.Constant(value_int=1))
    # Bit 7 of an entry, which no level has, falls out here.
    entries = op.Mod(op.Cast(tables, to=onnx.TensorProto.INT64), op.Constant(value_int=128))
    # At 3 bits an index has bits of the code before that are older than its window.
    index = op.Mod(byte, op.Reshape(op.Constant(value_ints=_LEVELS), column))
    index = index + op.Reshape(op.Constant(value_ints=_FIRST), column)
    level = op.Cast(op.Gather(op.Concat(entries, byte, axis=0), index, axis=0), to=onnx.TensorProto.FLOAT)
    value = (level - op.Reshape(op.Constant(value_floats=_ZERO), column)) * op.Reshape(steps, column)
    return op.Reshape(value, op.Constant(value_ints=[-1]))


@script(_onnxq, default_opset=op)
def MixedBitMatMul(
    x,
    packed,
    depths,
    columns,
    scales,
    order,
    tables,
    steps,
    bias,
    K: int,
    N: int,
    band: int,
    gain: float = 1.0,
    accuracy_level: int = 4,
    layout_version: int = 1,
):
    """X [..., K] times the transpose of the weight [N, K], plus bias [N] or [1]; float32."""
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    first = op.Constant(value_ints=[0])
    second = op.Constant(value_ints=[1])
    behind = op.Constant(value_ints=[2, 3])
    tiles = op.Squeeze(op.Slice(op.Shape(scales), first, second))
    tile = op.Range(zero, tiles, one)
    wide = op.Constant(value_int=band) / op.Constant(value_int=32)
    band_of_tile = tile / wide
    by_tile = op.Cast(op.Gather(depths, band_of_tile, axis=0), to=onnx.TensorProto.INT64)

    # The place of each input of x in the order: from here on [K, T, ...].
    inputs = op.Cast(order, to=onnx.TensorProto.INT64)
    stored = op.ScatterElements(inputs, inputs, op.Range(zero, op.Constant(value_int=K), one), axis=0)
    codes = op.Gather(MixedCodes(packed, by_tile), stored, axis=0)
    depth = op.Gather(op.Transpose(by_tile, perm=[1, 0]), stored / op.Constant(value_int=32), axis=0)
    octaves = op.Cast(op.Transpose(columns, perm=[1, 0]), to=onnx.TensorProto.FLOAT) / op.Constant(value_float=-8.0)
    column = op.Pow(op.Constant(value_float=2.0), op.Gather(op.Gather(octaves, stored, axis=0), band_of_tile, axis=1))

    place = op.Gather(op.Reshape(op.Constant(value_ints=_PLACES), op.Constant(value_ints=[9, 1, 4])), depth, axis=0)
    around = op.Gather(codes, MixedBefore(tile, tiles, wide), axis=1)
    index = op.MatMulInteger(op.Cast(place, to=onnx.TensorProto.UINT8), around)
    start = op.Cast(depth * op.Constant(value_int=256), to=onnx.TensorProto.INT32)
    value = op.Gather(MixedValues(tables, steps), index + op.Unsqueeze(start, behind), axis=0)
    scale = op.Cast(scales, to=onnx.TensorProto.FLOAT) * op.Constant(value_float=gain)
    weight = op.Reshape(value * op.Unsqueeze(column, behind) * scale, op.Constant(value_ints=[0, -1]))
    outputs = op.Reshape(op.Constant(value_int=N), op.Constant(value_ints=[-1]))
    return op.MatMul(x, op.Slice(weight, first, outputs, second)) + bias
