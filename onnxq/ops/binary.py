"""BinaryCodeMatMul and MixedBitGather: what the ops of the binary format mean, in standard ops.

Both decode rows, one all of them and the other those that are looked up. Where a row's byte lies for every plane and
four inputs is computed, so that a look-up touches nothing else, and decoding all rows depends on initializers alone:
ONNX Runtime folds that to a float32 weight when a session is created. It keeps every step until it has folded all; the
largest here are the signed scales, 4 bytes for each weight and plane, and all come to about 50 bytes a weight of three
planes.

The formula and layout are those of `onnxq.formats.binary`. All ops are as they were in opset 13, so one body serves
every opset from there on; constants are written out, since a plain number would become a CastLike (opset 15).
"""

from __future__ import annotations

# ruff: noqa: N802 - functions and parameters are named as the ops and attributes they define.
# ruff: noqa: ARG001 - accuracy_level and layout_version are attributes of the ops that only the kernels read.
from collections.abc import Sequence

import onnx
from onnxscript import opset13 as op
from onnxscript import script
from onnxscript.values import Opset

_onnxq = Opset("onnxq", 1)


@script(_onnxq, default_opset=op)
def BinaryRows(
    indices,
    codes,
    scales,
    offsets,
    rank,
    K: int,
    N: int,
    plane_rows: Sequence[int],
    group_size: int,
    gain: float,
):
    """Rows of the weight [N, K]: indices int64 [...] to float32 [..., K]."""
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    four = op.Constant(value_int=4)
    inner = op.Constant(value_ints=[-1])
    last_two = op.Constant(value_ints=[-2, -1])
    half_tile = op.Constant(value_int=32)
    tile_rows = op.Constant(value_int=64)
    width = op.Constant(value_int=K)
    rows = op.Constant(value_int=N)
    size = op.Constant(value_int=group_size)
    factor = op.Constant(value_float=gain)
    # Chunks of four inputs, up to a whole block of 32.
    chunks = (width + op.Constant(value_int=31)) / half_tile * op.Constant(value_int=8)
    groups = (width + size - one) / size

    # Where each row is stored: a rank of -1 alone is no order.
    stored = op.Cast(rank, to=onnx.TensorProto.INT64)
    stored = op.Where(op.Less(stored, zero), op.Range(zero, rows, one), stored)
    row = op.Unsqueeze(op.Gather(stored, indices, axis=0), inner)
    lane = op.Mod(row, tile_rows)

    # [..., planes]. A plane that a row does not have reads the first tile, and gets the scale 0.
    owners = op.Constant(value_ints=plane_rows)
    first = op.CumSum((owners + op.Constant(value_int=63)) / tile_rows, zero, exclusive=1)
    present = op.Less(row, owners)
    tile = op.Where(present, first + row / tile_rows, zero)

    # [..., planes, groups]. An offset goes with the first plane; one may stand for all.
    group = op.Range(zero, groups, one) * tile_rows
    scale = op.Gather(scales, op.Unsqueeze(tile * groups * tile_rows + lane, inner) + group, axis=0)
    scale = op.Cast(scale, to=onnx.TensorProto.FLOAT) * factor
    none = op.Constant(value_float=0.0)
    scale = op.Where(op.Unsqueeze(present, inner), scale, none)
    count = op.Reshape((rows + op.Constant(value_int=63)) / tile_rows * groups * tile_rows, inner)
    own = op.Unsqueeze(row / tile_rows * groups * tile_rows + lane, inner) + group
    offset = op.Gather(op.Expand(op.Reshape(offsets, inner), count), own, axis=0)
    offset = op.Cast(offset, to=onnx.TensorProto.FLOAT) * factor
    offset = op.Where(op.Unsqueeze(op.Equal(first, zero), inner), offset, none)
    plus = op.Unsqueeze(offset + scale, last_two)
    minus = op.Unsqueeze(offset - scale, last_two)

    # [..., planes, groups, chunks of a group, 4]. Behind the last chunk of a ragged group it is read again.
    chunk = op.Min(op.Range(zero, groups * size / four, one), chunks - one) * half_tile
    chunk = op.Reshape(op.Cast(chunk, to=onnx.TensorProto.INT32), op.Concat(op.Reshape(groups, inner), inner, axis=0))
    byte = op.Cast(tile * chunks * half_tile + op.Mod(lane, half_tile), to=onnx.TensorProto.INT32)
    key = op.Unsqueeze(op.Gather(codes, op.Unsqueeze(byte, last_two) + chunk, axis=0), inner)
    # Bits above the wanted one are shifted out, then those below.
    bit = lane / half_tile * four + op.Constant(value_ints=[0, 1, 2, 3])
    seven = op.Constant(value_int=7)
    above = op.Unsqueeze(op.Cast(seven - bit, to=onnx.TensorProto.UINT8), op.Constant(value_ints=[-4, -3, -2]))
    below = op.Cast(seven, to=onnx.TensorProto.UINT8)
    bit = op.BitShift(op.BitShift(key, above, direction="LEFT"), below, direction="RIGHT")
    signed = op.Where(op.Cast(bit, to=onnx.TensorProto.BOOL), plus, minus)
    value = op.ReduceSum(signed, op.Constant(value_ints=[-4]), keepdims=0)

    padded = op.Reshape(groups * size, inner)
    value = op.Reshape(value, op.Concat(op.Shape(indices), padded, axis=0))
    return op.Slice(value, op.Constant(value_ints=[0]), op.Reshape(width, inner), inner)


@script(_onnxq, default_opset=op)
def BinaryCodeMatMul(
    x,
    codes,
    scales,
    offsets,
    rank,
    bias,
    K: int,
    N: int,
    plane_rows: Sequence[int],
    group_size: int,
    gain: float = 1.0,
    accuracy_level: int = 4,
    layout_version: int = 1,
):
    """X [..., K] times the transpose of the weight [N, K], plus bias [N] or [1]; float32."""
    every = op.Range(op.Constant(value_int=0), op.Constant(value_int=N), op.Constant(value_int=1))
    weight = BinaryRows(
        every, codes, scales, offsets, rank, K=K, N=N, plane_rows=plane_rows, group_size=group_size, gain=gain
    )
    return op.MatMul(x, op.Transpose(weight, perm=[1, 0])) + bias


@script(_onnxq, default_opset=op)
def MixedBitGather(
    indices,
    codes,
    scales,
    offsets,
    rank,
    K: int,
    N: int,
    plane_rows: Sequence[int],
    group_size: int,
    gain: float = 1.0,
    layout_version: int = 1,
):
    """Rows of the table [N, K]: indices [...] to float32 [..., K]."""
    return BinaryRows(
        op.Cast(indices, to=onnx.TensorProto.INT64),
        codes,
        scales,
        offsets,
        rank,
        K=K,
        N=N,
        plane_rows=plane_rows,
        group_size=group_size,
        gain=gain,
    )
