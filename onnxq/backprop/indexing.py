"""Operators that pick elements by index, or put them there."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from onnxq.backprop.call import Call, Op, integers
from onnxq.errors import ModelError

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _from_start(indices: Tensor, size: int) -> Tensor:
    """Indices that may count from the end, as ones that don't."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


def _gather(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.integer("axis", 0) % max(x.dim(), 1)
    position = _from_start(indices, x.shape[axis])
    picked = x.index_select(axis, position.reshape(-1))
    return picked.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _gather_elements(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.integer("axis", 0)
    return x.gather(axis, _from_start(indices, x.shape[axis]))


def _gather_nd(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    batch = call.integer("batch_dims", 0)
    leading = [
        torch.arange(size).reshape([-1] + [1] * (indices.dim() - 2 - axis)) for axis, size in enumerate(x.shape[:batch])
    ]
    picks = (*leading, *indices.to(torch.int64).unbind(-1))
    return x[picks]


def _scatter_elements(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis, reduction = call.integer("axis", 0), call.text("reduction", "none")
    position = _from_start(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, position, updates)
    return x.scatter_reduce(axis, position, updates, _reduction(reduction), include_self=True)


def _scatter_nd(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    reduction = call.text("reduction", "none")
    depth = indices.shape[-1]
    outer, inner = x.shape[:depth], x.shape[depth:]
    rows = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for axis, size in enumerate(outer):
        rows = rows * size + _from_start(indices[..., axis], size)
    rows = rows.reshape(-1)
    table, new = x.reshape(outer.numel(), inner.numel()), updates.reshape(rows.numel(), inner.numel())
    if reduction == "none":
        result = table.index_put((rows,), new)
    elif reduction == "add":
        result = table.index_add(0, rows, new)
    else:
        spread = rows[:, None].expand_as(new)
        result = table.scatter_reduce(0, spread, new, _reduction(reduction), include_self=True)
    return result.reshape(x.shape)


def _reduction(name: str) -> str:
    if name not in _REDUCTIONS:
        raise ModelError(f"the reduction '{name}' is unknown")
    return _REDUCTIONS[name]


def _non_zero(_: Call, x: Tensor) -> Tensor:
    return x.nonzero().T.contiguous()


def _one_hot(call: Call, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    count = integers(depth)[0]
    axis = call.integer("axis", -1)
    whole = indices.to(torch.int64)
    inside = (whole >= -count) & (whole < count)
    hot = F.one_hot(whole % count, count).bool() & inside[..., None]
    hot = hot.movedim(-1, axis)
    return torch.where(hot, values[1], values[0])


def _compress(call: Call, x: Tensor, condition: Tensor) -> Tensor:
    axis = call.attributes.get("axis")
    if axis is None:
        x, axis = x.reshape(-1), 0
    return x.index_select(axis, condition.nonzero()[:, 0])


OPS: dict[str, Op] = {
    "Compress": _compress,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "NonZero": _non_zero,
    "OneHot": _one_hot,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
}
