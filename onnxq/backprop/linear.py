"""Operators with a sum over products: matrix products, convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from onnxq.backprop.call import Call, Op
from onnxq.errors import ModelError

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _matmul(_: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


def _gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.T if call.integer("transA", 0) else a
    b = b.T if call.integer("transB", 0) else b
    y, alpha, beta = a @ b, call.number("alpha", 1.0), call.number("beta", 1.0)
    if alpha != 1.0:
        y = y * alpha
    if c is None:
        return y
    return y + (c if beta == 1.0 else c * beta)


def _einsum(call: Call, *inputs: Tensor) -> Tensor:
    return torch.einsum(call.text("equation", ""), *inputs)


def _conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    spatial = x.dim() - 2
    if spatial not in _CONVOLUTIONS:
        raise ModelError(f"convolution over {spatial} axes; 1 to 3 are supported")
    strides = list(call.attributes.get("strides", [1] * spatial))
    dilations = list(call.attributes.get("dilations", [1] * spatial))
    x = F.pad(x, _padding(call, x, weight, strides, dilations))
    return _CONVOLUTIONS[spatial](x, weight, bias, strides, 0, dilations, call.integer("group", 1))


def _padding(call: Call, x: Tensor, weight: Tensor, strides: list[int], dilations: list[int]) -> list[int]:
    """Before and after, the last axis first, as torch wants it."""
    spatial, mode = x.dim() - 2, call.text("auto_pad", "NOTSET")
    if mode == "NOTSET":
        pads = list(call.attributes.get("pads", [0] * (2 * spatial)))
        pairs = [(pads[axis], pads[axis + spatial]) for axis in range(spatial)]
    elif mode == "VALID":
        pairs = [(0, 0)] * spatial
    else:
        pairs = []
        for axis in range(spatial):
            size, stride = x.shape[axis + 2], strides[axis]
            reach = (weight.shape[axis + 2] - 1) * dilations[axis] + 1
            total = max((-(-size // stride) - 1) * stride + reach - size, 0)
            small = total // 2
            pairs.append((small, total - small) if mode == "SAME_UPPER" else (total - small, small))
    return [amount for pair in reversed(pairs) for amount in pair]


OPS: dict[str, Op] = {
    "Conv": _conv,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "MatMul": _matmul,
}
