"""Operators that reduce axes, and running sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onnxq.backprop.call import Call, Op

Reduce = Callable[[Tensor, list[int], bool], Tensor]


def _reduction(reduce: Reduce) -> Op:
    """``reduce(x, axes, keepdims)`` as an operator: axes are an input, or an attribute before opset 18 (Sum: 13)."""

    def op(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
        given = call.axes(axes)
        if not given:
            if call.integer("noop_with_empty_axes", 0):
                return x
            given = list(range(x.dim()))
        return reduce(x, given, bool(call.integer("keepdims", 1)))

    return op


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype)  # torch widens small integers, ONNX does not


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=keep)
    count = x.numel() // max(_sum(x, axes, keep).numel(), 1)
    return torch.div(_sum(x, axes, keep), count, rounding_mode="trunc")


def _max(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.amax(axes, keepdim=keep)


def _min(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.amin(axes, keepdim=keep)


def _l2(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, 2, axes, keepdim=keep)
    return length


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keepdim=keep)


def _extreme(function: Callable[..., Tensor]) -> Op:
    def op(call: Call, x: Tensor) -> Tensor:
        axis, keep = call.integer("axis", 0), bool(call.integer("keepdims", 1))
        if not call.integer("select_last_index", 0):
            return function(x, axis, keepdim=keep)
        return x.shape[axis] - 1 - function(x.flip(axis), axis, keepdim=keep)

    return op


def _top_k(call: Call, x: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    largest, in_order = bool(call.integer("largest", 1)), bool(call.integer("sorted", 1))
    values, indices = torch.topk(x, int(k), call.integer("axis", -1), largest, in_order)
    return values, indices


def _cumulative(function: Callable[..., Tensor], start: int) -> Op:
    def op(call: Call, x: Tensor, axis: Tensor) -> Tensor:
        along = int(axis)
        if call.integer("reverse", 0):
            x = x.flip(along)
        if call.integer("exclusive", 0):
            first = torch.full_like(x.narrow(along, 0, 1), start)
            x = torch.cat([first, x.narrow(along, 0, x.shape[along] - 1)], along)
        result = function(x, along, dtype=x.dtype)
        return result.flip(along) if call.integer("reverse", 0) else result

    return op


OPS: dict[str, Op] = {
    "ArgMax": _extreme(torch.argmax),
    "ArgMin": _extreme(torch.argmin),
    "CumProd": _cumulative(torch.cumprod, 1),
    "CumSum": _cumulative(torch.cumsum, 0),
    "ReduceL1": _reduction(lambda x, axes, keep: _sum(x.abs(), axes, keep)),
    "ReduceL2": _reduction(_l2),
    "ReduceLogSum": _reduction(lambda x, axes, keep: _sum(x, axes, keep).log()),
    "ReduceLogSumExp": _reduction(_log_sum_exp),
    "ReduceMax": _reduction(_max),
    "ReduceMean": _reduction(_mean),
    "ReduceMin": _reduction(_min),
    "ReduceProd": _reduction(_product),
    "ReduceSum": _reduction(_sum),
    "ReduceSumSquare": _reduction(lambda x, axes, keep: _sum(x * x, axes, keep)),
    "TopK": _top_k,
}
