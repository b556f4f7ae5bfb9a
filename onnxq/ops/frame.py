"""FrameAnalysis and FrameSynthesis: what the two ops of a framed weight mean, in standard ops.

A *frame* turns a vector of d values into d' >= d coefficients by a matrix A with A^T A = I. A weight that is stored as
D = W A^T multiplies the coefficients of x instead of x itself: D (A x) = W x. Every coefficient is a mixture of many
inputs, so the rounding of D is spread over all of W, and the redundancy d' / d averages part of it away.

FrameAnalysis is x -> A x, FrameSynthesis is A^T. With d = left * middle * odd and x viewed as a matrix X
[left, middle * odd], A takes three steps:

1. signs: each value is multiplied with +1 or -1;
2. mixing: X <- L X (M (x) C) with the orthonormal Walsh-Hadamard matrices L [left, left] and M [middle, middle] and the
   orthonormal Hartley matrix C [odd, odd];
3. blocks: every run of w coefficients of a row is multiplied with `block` [w, w'], whose rows are orthonormal.

The functions below are the ops' definition. They travel inside every model that uses the ops, and run on any ONNX
runtime. Steps 2 and 3 are written as two matrix products, R = (M (x) C) (I (x) block) from the right and L from the
left: d * (left + middle * odd) products a vector, a few per cent of those of the weight. Both matrices depend on
attributes and `block` alone, so ONNX Runtime folds all that builds them when a session is created. The kernels do the
same in d * log d. All ops are as they were in opset 13, so one body serves every opset from there on; constants are
written out, since a plain number would become a CastLike (opset 15).
"""

from __future__ import annotations

# ruff: noqa: N802 - functions are named as the ops they define.
import math

import onnx
from onnxscript import opset13 as op
from onnxscript import script
from onnxscript.values import Opset

_onnxq = Opset("onnxq", 1)
_TURN = 2 * math.pi


@script(_onnxq, default_opset=op)
def FrameHadamard(size):
    """The orthonormal Walsh-Hadamard matrix in Sylvester's order: float [size, size] of a power of two.

    Entry (i, j) is negative where i & j has an odd number of ones: where the product of the two rows of binary digits
    is odd.
    """
    digit = op.Pow(op.Constant(value_int=2), op.Constant(value_ints=list(range(24))))
    index = op.Range(op.Constant(value_int=0), size, op.Constant(value_int=1))
    ones = op.Mod(op.Unsqueeze(index, op.Constant(value_ints=[1])) / digit, op.Constant(value_int=2))
    common = op.MatMul(ones, op.Transpose(ones, perm=[1, 0]))
    odd = op.Cast(op.Mod(common, op.Constant(value_int=2)), to=onnx.TensorProto.FLOAT)
    sign = op.Constant(value_float=1.0) - op.Constant(value_float=2.0) * odd
    return sign / op.Sqrt(op.Cast(size, to=onnx.TensorProto.FLOAT))


@script(_onnxq, default_opset=op)
def FrameHartley(size):
    """The orthonormal Hartley matrix: float [size, size] of an odd number; symmetric, its own inverse."""
    index = op.Range(op.Constant(value_int=0), size, op.Constant(value_int=1))
    product = op.Unsqueeze(index, op.Constant(value_ints=[1])) * op.Unsqueeze(index, op.Constant(value_ints=[0]))
    # Whole turns are taken off while the numbers are whole, down to half a turn either way: a small angle loses least.
    half = size / op.Constant(value_int=2)
    steps = op.Cast(op.Mod(product + half, size) - half, to=onnx.TensorProto.FLOAT)
    angle = op.Constant(value_float=_TURN) * steps / op.Cast(size, to=onnx.TensorProto.FLOAT)
    return (op.Cos(angle) + op.Sin(angle)) / op.Sqrt(op.Cast(size, to=onnx.TensorProto.FLOAT))


@script(_onnxq, default_opset=op)
def FrameSigns(signs, size):
    """Bits [ceil(size / 8)], lowest first, to float [size]: -1 where the bit is 1, else +1."""
    digit = op.Pow(op.Constant(value_int=2), op.Constant(value_ints=[0, 1, 2, 3, 4, 5, 6, 7]))
    byte = op.Unsqueeze(op.Cast(signs, to=onnx.TensorProto.INT64), op.Constant(value_ints=[1]))
    bit = op.Reshape(op.Mod(byte / digit, op.Constant(value_int=2)), op.Constant(value_ints=[-1]))
    first = op.Slice(bit, op.Constant(value_ints=[0]), size)
    return op.Constant(value_float=1.0) - op.Constant(value_float=2.0) * op.Cast(first, to=onnx.TensorProto.FLOAT)


@script(_onnxq, default_opset=op)
def FrameRight(block, middle, odd):
    """What acts on a row of X from the right: (M (x) C) (I (x) block), float [right, right / w * w']."""
    one = op.Constant(value_ints=[1])
    right = op.Reshape(middle * odd, op.Constant(value_ints=[-1]))
    mixing = op.Unsqueeze(FrameHadamard(middle), op.Constant(value_ints=[1, 3])) * op.Unsqueeze(
        FrameHartley(odd), op.Constant(value_ints=[0, 2])
    )
    narrow = op.Slice(op.Shape(block), op.Constant(value_ints=[0]), one)
    runs = op.Reshape(mixing, op.Concat(right, right / narrow, narrow, axis=0))
    return op.Reshape(op.MatMul(runs, block), op.Concat(right, op.Constant(value_ints=[-1]), axis=0))


@script(_onnxq, default_opset=op)
def FrameAnalysis(x, signs, block, left: int, middle: int, odd: int):
    """Coefficients of x: float [..., d] to [..., d / w * w'], d = left * middle * odd.

    signs uint8 [ceil(d / 8)]: bit i % 8 (lowest first) of byte i / 8 is 1 where value i is negated.
    block float [w, w'], w a divisor of middle * odd: its rows are orthonormal; [[1]] adds no redundancy.
    """
    rows = op.Constant(value_int=left)
    lower = op.Constant(value_int=middle)
    factor = op.Constant(value_int=odd)
    flat = op.Constant(value_ints=[-1])
    size = op.Reshape(rows * lower * factor, flat)
    from_right = FrameRight(block, lower, factor)
    wide = op.Slice(op.Shape(from_right), op.Constant(value_ints=[1]), op.Constant(value_ints=[2]))
    leading = op.Slice(op.Shape(x), op.Constant(value_ints=[0]), flat)

    signed = x * FrameSigns(signs, size)
    matrix = op.Reshape(signed, op.Concat(leading, op.Reshape(rows, flat), op.Reshape(lower * factor, flat), axis=0))
    mixed = op.MatMul(FrameHadamard(rows), op.MatMul(matrix, from_right))
    return op.Reshape(mixed, op.Concat(leading, op.Reshape(rows, flat) * wide, axis=0))


@script(_onnxq, default_opset=op)
def FrameSynthesis(x, signs, block, left: int, middle: int, odd: int):
    """The transpose of FrameAnalysis: coefficients [..., d / w * w'] to float [..., d].

    It undoes the analysis, and projects coefficients that no vector has. `signs`, `block` and the attributes are those
    of FrameAnalysis.
    """
    rows = op.Constant(value_int=left)
    lower = op.Constant(value_int=middle)
    factor = op.Constant(value_int=odd)
    flat = op.Constant(value_ints=[-1])
    size = op.Reshape(rows * lower * factor, flat)
    from_right = op.Transpose(FrameRight(block, lower, factor), perm=[1, 0])
    wide = op.Slice(op.Shape(from_right), op.Constant(value_ints=[0]), op.Constant(value_ints=[1]))
    leading = op.Slice(op.Shape(x), op.Constant(value_ints=[0]), flat)

    matrix = op.Reshape(x, op.Concat(leading, op.Reshape(rows, flat), wide, axis=0))
    mixed = op.MatMul(FrameHadamard(rows), op.MatMul(matrix, from_right))
    signed = op.Reshape(mixed, op.Concat(leading, size, axis=0))
    return signed * FrameSigns(signs, size)
