"""Float8MatMul, Float8Gather, Float8Round and Float8RoundTokens: what the ops of float8 mean, in standard ops.

The first two have weights of float8 codes, in bytes, of which a table of 256 floats says what each is worth by the
formula of `onnxq.formats.float8`. So a weight depends on initializers alone and ONNX Runtime folds it to float32 when a
session is created, where a DequantizeLinear would stay and be run at every call. A look-up picks the bytes of its rows
first and decodes these. The other two round activations as a processor with float8 products would.

There is no float8 type here, hence one body for every opset from 13 on and for runtimes built without these types:
Cast takes them from opset 19 on, and a type can't be chosen by an attribute. Constants are written out, since a plain
number would become a CastLike (opset 15).
"""

from __future__ import annotations

# ruff: noqa: N802 - functions and parameters are named as the ops and attributes they define.
# ruff: noqa: ARG001 - layout_version, and N of a product, are attributes that only the kernels read.
import onnx
from onnxscript import opset13 as op
from onnxscript import script
from onnxscript.values import Opset

_onnxq = Opset("onnxq", 1)

_TO_POWER = float((1 << 23) + 1)
"""x times this, less the rest of it, is x rounded to one bit."""


@script(_onnxq, default_opset=op)
def Float8Values(mantissa_bits, exponent_bias):
    """What each code is worth: float [256]."""
    one = op.Constant(value_int=1)
    two = op.Constant(value_float=2.0)
    half = op.Constant(value_int=128)
    byte = op.Range(op.Constant(value_int=0), op.Constant(value_int=256), one)
    steps = op.Pow(op.Constant(value_int=2), mantissa_bits)
    exponent = op.Mod(byte, half) / steps
    # What has no exponent has no leading one either, and the steps of the exponent 1.
    normal = op.Min(exponent, one)
    whole = op.Cast(op.Mod(byte, steps) + normal * steps, to=onnx.TensorProto.FLOAT)
    power = op.Max(exponent, one) - exponent_bias - mantissa_bits
    sign = op.Constant(value_float=1.0) - two * op.Cast(byte / half, to=onnx.TensorProto.FLOAT)
    return sign * whole * op.Pow(two, power)


@script(_onnxq, default_opset=op)
def Float8Groups(scales, k, group_size):
    """Which group an input belongs to: int64 [K], or [1] where there is one group and scales broadcast."""
    one = op.Constant(value_int=1)
    groups = op.Squeeze(op.Slice(op.Shape(scales), op.Constant(value_ints=[1]), op.Constant(value_ints=[2])))
    inputs = op.Where(op.Equal(groups, one), one, k)
    return op.Range(op.Constant(value_int=0), inputs, one) / group_size


@script(_onnxq, default_opset=op)
def Float8MatMul(
    x,
    codes,
    scales,
    bias,
    K: int,
    N: int,
    mantissa_bits: int,
    exponent_bias: int,
    group_size: int,
    gain: float = 1.0,
    layout_version: int = 1,
):
    """X [..., K] times the transpose of the weight [N, K], plus bias [N] or [1]; float32."""
    values = Float8Values(op.Constant(value_int=mantissa_bits), op.Constant(value_int=exponent_bias))
    group = Float8Groups(scales, op.Constant(value_int=K), op.Constant(value_int=group_size))
    scale = op.Cast(op.Transpose(scales, perm=[1, 0]), to=onnx.TensorProto.FLOAT) * op.Constant(value_float=gain)
    # Turned round while it is bytes: ONNX Runtime keeps every step until it has folded all.
    value = op.Gather(values, op.Cast(op.Transpose(codes, perm=[1, 0]), to=onnx.TensorProto.INT32), axis=0)
    return op.MatMul(x, value * op.Gather(scale, group, axis=0)) + bias


@script(_onnxq, default_opset=op)
def Float8Gather(
    indices,
    codes,
    scales,
    K: int,
    N: int,
    mantissa_bits: int,
    exponent_bias: int,
    group_size: int,
    gain: float = 1.0,
    layout_version: int = 1,
):
    """Rows of the table [N, K]: indices [...] to float32 [..., K]."""
    values = Float8Values(op.Constant(value_int=mantissa_bits), op.Constant(value_int=exponent_bias))
    group = Float8Groups(scales, op.Constant(value_int=K), op.Constant(value_int=group_size))
    # One scale for the whole table becomes one for each row.
    outputs = op.Reshape(op.Constant(value_int=N), op.Constant(value_ints=[-1]))
    rows = op.Expand(scales, op.Concat(outputs, op.Constant(value_ints=[1]), axis=0))
    scale = op.Cast(op.Gather(rows, indices, axis=0), to=onnx.TensorProto.FLOAT) * op.Constant(value_float=gain)
    value = op.Gather(values, op.Cast(op.Gather(codes, indices, axis=0), to=onnx.TensorProto.INT32), axis=0)
    return value * op.Gather(scale, group, axis=-1)


@script(_onnxq, default_opset=op)
def Float8Largest(mantissa_bits, exponent_bias):
    """The largest finite value of a kind: a float."""
    wide = op.Constant(value_float=57344.0)
    fn = op.Equal(exponent_bias, op.Constant(value_int=7))
    narrow = op.Where(fn, op.Constant(value_float=448.0), op.Constant(value_float=240.0))
    return op.Where(op.Equal(mantissa_bits, op.Constant(value_int=3)), narrow, wide)


@script(_onnxq, default_opset=op)
def Float8Nearest(x, largest, mantissa_bits, exponent_bias):
    """The values nearest to x, ties to even, what is too large to the largest: float [...] to the same. NaN stays."""
    half = op.Constant(value_float=0.5)
    two = op.Constant(value_float=2.0)
    below = op.Where(op.Less(largest, x), largest, x)
    limited = op.Where(op.Less(below, op.Neg(largest)), op.Neg(largest), below)
    # Below the least normal value steps no longer shrink.
    size = op.Max(op.Abs(limited), op.Pow(two, op.Constant(value_int=1) - exponent_bias))
    # Rounded to one bit, which may have gone up: the power of two at or below.
    wide = size * op.Constant(value_float=_TO_POWER)
    power = wide - (wide - size)
    power = op.Where(op.Less(size, power), power * half, power)
    step = power * op.Pow(two, op.Neg(mantissa_bits))
    return op.Round(limited / step) * step


@script(_onnxq, default_opset=op)
def Float8Round(x, scale, mantissa_bits: int, exponent_bias: int, layout_version: int = 1):
    """X on the grid of float8 numbers times scale, which is one number; float32 [...] to the same."""
    bits = op.Constant(value_int=mantissa_bits)
    bias = op.Constant(value_int=exponent_bias)
    return Float8Nearest(x / scale, Float8Largest(bits, bias), bits, bias) * scale


@script(_onnxq, default_opset=op)
def Float8RoundTokens(x, mantissa_bits: int, exponent_bias: int, layout_version: int = 1):
    """X [..., K] on the grid of float8 numbers times a scale that brings the largest of each row to the largest."""
    zero = op.Constant(value_float=0.0)
    one = op.Constant(value_float=1.0)
    bits = op.Constant(value_int=mantissa_bits)
    bias = op.Constant(value_int=exponent_bias)
    # TopK is what all opsets have alike: where ReduceMax takes its axes changed.
    size, _ = op.TopK(op.Abs(x), op.Constant(value_ints=[1]), axis=-1)
    largest = Float8Largest(bits, bias)
    scale = size / largest
    scale = op.Where(op.Equal(scale, zero), one, scale)
    return Float8Nearest(x / scale, largest, bits, bias) * scale
