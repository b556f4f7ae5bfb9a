"""LowBitMatMul and LowBitGather: what the two ops of the uniform format mean, in standard ops.

The functions below are the ops' definition. They travel inside every model that uses the ops, run on any ONNX
runtime, document the packed layout, and are the oracle that the kernels are tested against. The layout is that of
`onnxq.formats.packing`, the formula that of `onnxq.formats.uniform`.

Decoding depends on initializers alone, so ONNX Runtime folds it when a session is created. What it folds to is
chosen with care: a code at the top of its byte, a uint8 zero point and a step per 32 inputs are what ONNX Runtime
turns into its own 8-bit product, and a table stays bytes of which only the looked-up rows are dequantised. So a
low-bit weight costs 8 bits of memory there, not 32. (`onnxq.ops.lowbit_legacy` serves opsets below 21.)
"""

from __future__ import annotations

# ruff: noqa: N802 - functions and parameters are named as the ops and attributes they define.
# ruff: noqa: ARG001 - accuracy_level and layout_version are attributes of the ops that only the kernels read.
import onnx
from onnxscript import opset21 as op
from onnxscript import script
from onnxscript.values import Opset

_onnxq = Opset("onnxq", 1)


@script(_onnxq, default_opset=op)
def LowBitPlane(packed, bits, width):
    """The plane of `width` bits, placed where it belongs in a byte whose highest bits are the code.

    Quad q of a block lies in row (q * width) // 8 of the plane, from bit (q * width) % 8 on. A plane that `bits`
    does not have is masked to zero.
    """
    present = op.BitwiseAnd(bits, width)
    wider = bits - op.Mod(bits, width * 2)
    bit = op.Constant(value_ints=[0, 1, 2, 3, 4, 5, 6, 7]) * present
    rows = op.Gather(packed, op.Mod(wider + bit / 8, bits), axis=2)
    shift = op.Reshape(op.Cast(op.Mod(bit, 8), to=onnx.TensorProto.UINT8), op.Constant(value_ints=[8, 1, 1]))
    mask = op.Cast(op.Pow(op.Constant(value_int=2), present) - 1, to=onnx.TensorProto.UINT8)
    field = op.BitwiseAnd(op.BitShift(rows, shift, direction="RIGHT"), mask)
    place = op.Mod(op.Constant(value_int=8) - bits + wider, op.Constant(value_int=8))
    return op.BitShift(field, op.Cast(place, to=onnx.TensorProto.UINT8), direction="LEFT")


@script(_onnxq, default_opset=op)
def LowBitCodes(packed, bits: int):
    """Packed bytes uint8 [T, B, bits, 32, 4] to codes, each at the top of a byte: uint8 [T, B, 8, 32, 4]."""
    width = op.Constant(value_int=bits)
    plane_8 = LowBitPlane(packed, width, op.Constant(value_int=8))
    plane_4 = LowBitPlane(packed, width, op.Constant(value_int=4))
    plane_2 = LowBitPlane(packed, width, op.Constant(value_int=2))
    plane_1 = LowBitPlane(packed, width, op.Constant(value_int=1))
    return op.BitwiseOr(op.BitwiseOr(plane_8, plane_4), op.BitwiseOr(plane_2, plane_1))


@script(_onnxq, default_opset=op)
def LowBitProduct(x, codes, scales, zero_points, bias, K: int, N: int, bits: int, group_size: int, gain: float):
    """X times the weight of these codes, which are uint8 [T, B, 8, 32, 4] with their `bits` bits at the top."""
    first = op.Constant(value_ints=[0])
    second = op.Constant(value_ints=[1])
    inputs = op.Reshape(op.Constant(value_int=K), op.Constant(value_ints=[-1]))
    outputs = op.Reshape(op.Constant(value_int=N), op.Constant(value_ints=[-1]))
    blocks = op.Shape(codes, start=1, end=2)
    padded = op.Shape(codes, start=0, end=1) * 32
    rows_by_columns = op.Concat(op.Constant(value_ints=[-1]), padded, axis=0)

    top = op.Transpose(codes, perm=[1, 2, 4, 0, 3])
    top = op.Reshape(top, op.Concat(blocks * 32, padded, axis=0))
    top = op.Slice(op.Slice(top, first, inputs, first), first, outputs, second)

    # One step and zero point per 32 inputs, whatever the group: a block that ONNX Runtime's 8-bit product takes.
    block = op.Range(op.Constant(value_int=0), op.Squeeze(blocks), op.Constant(value_int=1))
    group = block * 32 / op.Constant(value_int=group_size)
    step = op.Reshape(op.Transpose(scales, perm=[1, 0, 2]), rows_by_columns)
    step = op.Cast(op.Slice(op.Gather(step, group, axis=0), first, outputs, second), to=onnx.TensorProto.FLOAT)
    unit = op.Pow(op.Constant(value_float=2.0), op.Constant(value_int=bits) - 8) * op.Constant(value_float=gain)
    zero = op.Transpose(op.Expand(zero_points, op.Shape(scales)), perm=[1, 0, 2])
    zero = op.Slice(op.Gather(op.Reshape(zero, rows_by_columns), group, axis=0), first, outputs, second)

    weight = op.DequantizeLinear(top, step * unit, zero, axis=0, block_size=32)
    return op.MatMul(x, weight) + bias


@script(_onnxq, default_opset=op)
def LowBitMatMul(
    x,
    packed,
    scales,
    zero_points,
    bias,
    K: int,
    N: int,
    bits: int,
    group_size: int,
    gain: float = 1.0,
    accuracy_level: int = 4,
    layout_version: int = 1,
):
    """X [..., K] times the transpose of the weight [N, K], plus bias [N] or [1]; float32."""
    codes = LowBitCodes(packed, bits=bits)
    return LowBitProduct(x, codes, scales, zero_points, bias, K=K, N=N, bits=bits, group_size=group_size, gain=gain)


@script(_onnxq, default_opset=op)
def LowBitGather(
    indices,
    packed,
    scales,
    zero_points,
    K: int,
    N: int,
    bits: int,
    group_size: int,
    gain: float = 1.0,
    layout_version: int = 1,
):
    """Rows of the table [N, K]: indices [...] to float32 [..., K]."""
    first = op.Constant(value_ints=[0])
    second = op.Constant(value_ints=[1])
    width = op.Constant(value_int=K)
    inputs = op.Reshape(width, op.Constant(value_ints=[-1]))
    outputs = op.Reshape(op.Constant(value_int=N), op.Constant(value_ints=[-1]))
    padded = op.Shape(packed, start=0, end=1) * 32
    rows_by_columns = op.Concat(padded, op.Constant(value_ints=[-1]), axis=0)

    top = op.Reshape(op.Transpose(LowBitCodes(packed, bits=bits), perm=[0, 3, 1, 2, 4]), rows_by_columns)
    top = op.Slice(op.Slice(top, first, outputs, first), first, inputs, second)
    step = op.Slice(op.Reshape(op.Transpose(scales, perm=[0, 2, 1]), rows_by_columns), first, outputs, first)
    zero = op.Transpose(op.Expand(zero_points, op.Shape(scales)), perm=[0, 2, 1])
    zero = op.Slice(op.Reshape(zero, rows_by_columns), first, outputs, first)

    group = op.Range(op.Constant(value_int=0), width, op.Constant(value_int=1)) / op.Constant(value_int=group_size)
    unit = op.Pow(op.Constant(value_float=2.0), op.Constant(value_int=bits) - 8) * op.Constant(value_float=gain)
    code = op.Cast(op.Gather(top, indices, axis=0), to=onnx.TensorProto.FLOAT)
    row_zero = op.Cast(op.Gather(zero, indices, axis=0), to=onnx.TensorProto.FLOAT)
    row_step = op.Cast(op.Gather(step, indices, axis=0), to=onnx.TensorProto.FLOAT) * unit
    return (code - op.Gather(row_zero, group, axis=-1)) * op.Gather(row_step, group, axis=-1)
