"""Operators that normalise: softmax, layer, root-mean-square, batch, group and instance norms."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from onnxq.backprop.call import Call, Op


def _softmax(call: Call, x: Tensor) -> Tensor:
    """A row of minus infinities gives NaN, as everywhere, but no NaN gradient to what is masked out after it.

    Exporters write attention as a softmax whose NaN rows a Where replaces; the plain derivative would still multiply
    that Where's zeros with NaN.
    """
    axis = call.integer("axis", -1)
    if x.requires_grad:
        empty = torch.isneginf(x).all(axis, keepdim=True)
        if bool(empty.any()):
            return torch.softmax(x.masked_fill(empty, 0.0), axis).masked_fill(empty, math.nan)
    return torch.softmax(x, axis)


def _log_softmax(call: Call, x: Tensor) -> Tensor:
    return torch.log_softmax(x, call.integer("axis", -1))


def _layer_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
    axis = call.integer("axis", -1) % x.dim()
    epsilon = call.number("epsilon", 1e-5)
    shape = x.shape[axis:]
    if call.outputs == 1 and scale.shape == shape and (bias is None or bias.shape == shape):
        return F.layer_norm(x, shape, scale, bias, epsilon)
    axes = list(range(axis, x.dim()))
    mean = x.mean(axes, keepdim=True)
    inverse = torch.rsqrt((x - mean).square().mean(axes, keepdim=True) + epsilon)
    y = (x - mean) * inverse * scale
    return (y if bias is None else y + bias, mean, inverse)


def _rms_norm(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    axes = list(range(call.integer("axis", -1) % x.dim(), x.dim()))
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + call.number("epsilon", 1e-5)) * scale


def _batch_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, call.number("epsilon", 1e-5))


def _instance_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=call.number("epsilon", 1e-5))


def _group_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups, epsilon = call.integer("num_groups", 1), call.number("epsilon", 1e-5)
    if call.opset < 21 or scale.shape[0] != x.shape[1]:  # opset 18 has one gain for a group
        each = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return F.group_norm(x, groups, scale, bias, epsilon)


def _lp_norm(call: Call, x: Tensor) -> Tensor:
    axis, order = call.integer("axis", -1), call.integer("p", 2)
    length: Tensor = torch.linalg.vector_norm(x, order, axis, keepdim=True)
    return x / length


OPS: dict[str, Op] = {
    "BatchNormalization": _batch_norm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": _log_softmax,
    "LpNormalization": _lp_norm,
    "RMSNormalization": _rms_norm,
    "SimplifiedLayerNormalization": _rms_norm,  # ONNX Runtime's name for it
    "Softmax": _softmax,
}
