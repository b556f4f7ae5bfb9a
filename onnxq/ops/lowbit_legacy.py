"""The bodies of LowBitMatMul and LowBitGather for models of opset 13 to 20.

Same meaning as `onnxq.ops.lowbit`, written with integer division and remainder, since bitwise ops came with opset
18 and blocked DequantizeLinear with 21. Constants are written out: a plain number would become a CastLike (opset 15).
There is nothing below opset 21 that a runtime could fuse, so a LowBitMatMul folds to a float32 weight where the kernel
library is absent; a table still stays one byte per weight.
"""

from __future__ import annotations

# ruff: noqa: N802 - functions and parameters are named as the ops and attributes they define.
# ruff: noqa: ARG001 - accuracy_level and layout_version are attributes of the ops that only the kernels read.
import onnx
from onnxscript import opset13 as op
from onnxscript import script
from onnxscript.values import Opset

_onnxq = Opset("onnxq", 1)


@script(_onnxq, default_opset=op)
def LowBitPlane(packed, bits, width):
    """The plane of `width` bits at its place in the code: int32; zero where `bits` has no such plane."""
    two = op.Constant(value_int=2)
    eight = op.Constant(value_int=8)
    present = op.Mod(bits / width, two) * width
    wider = bits - op.Mod(bits, width * two)
    bit = op.Constant(value_ints=[0, 1, 2, 3, 4, 5, 6, 7]) * present
    rows = op.Cast(op.Gather(packed, op.Mod(wider + bit / eight, bits), axis=2), to=onnx.TensorProto.INT32)
    divisor = op.Reshape(op.Pow(two, op.Mod(bit, eight)), op.Constant(value_ints=[8, 1, 1]))
    field = op.Mod(
        rows / op.Cast(divisor, to=onnx.TensorProto.INT32),
        op.Cast(op.Pow(two, present), to=onnx.TensorProto.INT32),
    )
    return field * op.Cast(op.Pow(two, wider), to=onnx.TensorProto.INT32)


@script(_onnxq, default_opset=op)
def LowBitCodes(packed, bits: int):
    """Packed bytes uint8 [T, B, bits, 32, 4] to codes uint8 [T, B, 8, 32, 4]."""
    width = op.Constant(value_int=bits)
    plane_8 = LowBitPlane(packed, width, op.Constant(value_int=8))
    plane_4 = LowBitPlane(packed, width, op.Constant(value_int=4))
    plane_2 = LowBitPlane(packed, width, op.Constant(value_int=2))
    plane_1 = LowBitPlane(packed, width, op.Constant(value_int=1))
    return op.Cast(plane_8 + plane_4 + plane_2 + plane_1, to=onnx.TensorProto.UINT8)


@script(_onnxq, default_opset=op)
def LowBitRows(blocks, scales, zero_points, K: int, N: int, bits: int):
    """Codes uint8 [T, B, 8, 32, 4] to [N, K], scales float16 to [N, G] and zero points to float [N, G]."""
    first = op.Constant(value_ints=[0])
    second = op.Constant(value_ints=[1])
    inputs = op.Reshape(op.Constant(value_int=K), op.Constant(value_ints=[-1]))
    outputs = op.Reshape(op.Constant(value_int=N), op.Constant(value_ints=[-1]))
    padded = op.Slice(op.Shape(blocks), first, second) * op.Constant(value_int=32)
    rows_by_columns = op.Concat(padded, op.Constant(value_ints=[-1]), axis=0)
    codes = op.Reshape(op.Transpose(blocks, perm=[0, 3, 1, 2, 4]), rows_by_columns)
    codes = op.Slice(op.Slice(codes, first, outputs, first), first, inputs, second)
    step = op.Slice(op.Reshape(op.Transpose(scales, perm=[0, 2, 1]), rows_by_columns), first, outputs, first)
    zero = op.Transpose(op.Expand(zero_points, op.Shape(scales)), perm=[0, 2, 1])
    zero = op.Slice(op.Reshape(zero, rows_by_columns), first, outputs, first)
    fraction = op.Pow(op.Constant(value_float=2.0), op.Constant(value_int=bits) - op.Constant(value_int=8))
    return codes, step, op.Cast(zero, to=onnx.TensorProto.FLOAT) * fraction


@script(_onnxq, default_opset=op)
def LowBitProduct(x, blocks, scales, zero_points, bias, K: int, N: int, bits: int, group_size: int, gain: float):
    """X times the weight of the codes `blocks`, uint8 [T, B, 8, 32, 4]."""
    codes, step, zero = LowBitRows(blocks, scales, zero_points, K=K, N=N, bits=bits)
    column = op.Range(op.Constant(value_int=0), op.Constant(value_int=K), op.Constant(value_int=1))
    group = column / op.Constant(value_int=group_size)
    scale = op.Cast(op.Gather(step, group, axis=1), to=onnx.TensorProto.FLOAT) * op.Constant(value_float=gain)
    weight = (op.Cast(codes, to=onnx.TensorProto.FLOAT) - op.Gather(zero, group, axis=1)) * scale
    return op.MatMul(x, op.Transpose(weight, perm=[1, 0])) + bias


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
    blocks = LowBitCodes(packed, bits=bits)
    return LowBitProduct(x, blocks, scales, zero_points, bias, K=K, N=N, bits=bits, group_size=group_size, gain=gain)


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
    blocks = LowBitCodes(packed, bits=bits)
    codes, step, zero = LowBitRows(blocks, scales, zero_points, K=K, N=N, bits=bits)
    column = op.Range(op.Constant(value_int=0), op.Constant(value_int=K), op.Constant(value_int=1))
    group = column / op.Constant(value_int=group_size)
    row = op.Cast(op.Gather(codes, indices, axis=0), to=onnx.TensorProto.FLOAT)
    row_step = op.Cast(op.Gather(step, indices, axis=0), to=onnx.TensorProto.FLOAT) * op.Constant(value_float=gain)
    row_zero = op.Gather(zero, indices, axis=0)
    return (row - op.Gather(row_zero, group, axis=-1)) * op.Gather(row_step, group, axis=-1)
