"""Operators that make, shape, cut and join tensors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from onnxq.backprop.call import Call, Op, integers
from onnxq.backprop.convert import torch_type
from onnxq.errors import ModelError


def _constant(call: Call) -> Tensor:
    for name, kind in (("value_float", torch.float32), ("value_int", torch.int64)):
        for key in (name, f"{name}s"):
            if key in call.attributes:
                return torch.tensor(call.attributes[key], dtype=kind)
    if "value" not in call.attributes:
        raise ModelError(f"its value ({', '.join(call.attributes)}) is not a tensor of numbers")
    value: Tensor = call.attributes["value"]
    return value


def _constant_of_shape(call: Call, shape: Tensor) -> Tensor:
    value = call.attributes.get("value")
    if value is None:
        return torch.zeros(integers(shape))
    return torch.full(integers(shape), value.item(), dtype=value.dtype)


def _range(_: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    first, last, step = start.item(), limit.item(), delta.item()
    count = max(math.ceil((last - first) / step), 0)
    return start.reshape(()) + torch.arange(count).to(start.dtype) * delta.reshape(())


def _eye_like(call: Call, x: Tensor) -> Tensor:

    dtype = torch_type(call.attributes["dtype"]) if "dtype" in call.attributes else x.dtype
    rows, columns = x.shape
    return torch.ones(rows, columns).triu(call.integer("k", 0)).tril(call.integer("k", 0)).to(dtype)


def _shape(call: Call, x: Tensor) -> Tensor:
    end = call.attributes.get("end")
    return torch.tensor(list(x.shape)[call.integer("start", 0) : end], dtype=torch.int64)


def _size(_: Call, x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


def _reshape(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    target = integers(shape)
    if not call.integer("allowzero", 0):
        target = [x.shape[axis] if d == 0 else d for axis, d in enumerate(target)]
    if -1 in target and x.numel() == 0:  # torch can't infer a dimension of an empty tensor
        known = math.prod(d for d in target if d != -1)
        target[target.index(-1)] = 0 if known else 1
    return x.reshape(target)


def _flatten(call: Call, x: Tensor) -> Tensor:
    axis = call.integer("axis", 1)
    axis += x.dim() if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _transpose(call: Call, x: Tensor) -> Tensor:
    return x.permute(call.attributes.get("perm", tuple(reversed(range(x.dim())))))


def _squeeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = call.axes(axes)
    return x.squeeze() if given is None else x.squeeze(tuple(given))


def _unsqueeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = call.axes(axes) or []
    rank = x.dim() + len(given)
    for axis in sorted(axis % rank for axis in given):
        x = x.unsqueeze(axis)
    return x


def _expand(_: Call, x: Tensor, shape: Tensor) -> Tensor:
    target = torch.broadcast_shapes(x.shape, tuple(integers(shape)))  # type: ignore[no-untyped-call]
    return x.expand(target)


def _tile(_: Call, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(integers(repeats))


def _concat(call: Call, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, call.integer("axis", 0))


def _split(call: Call, x: Tensor, split: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = call.integer("axis", 0)
    sizes = call.axes(split, "split")
    if sizes is None:
        # The parts are equal; from opset 18 on the last may be smaller.
        parts, total = call.integer("num_outputs", call.outputs), x.shape[axis]
        size = -(-total // parts)
        sizes = [min(size, total - size * part) for part in range(parts)]
    return torch.split(x, sizes, axis)


def _slice(
    _: Call, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    first, last = integers(starts), integers(ends)
    where = list(range(len(first))) if axes is None else integers(axes)
    by = [1] * len(first) if steps is None else integers(steps)
    for axis, start, end, step in zip(where, first, last, by, strict=True):
        taken = range(*slice(start, end, step).indices(x.shape[axis]))
        if step == 1:
            x = x.narrow(axis, min(taken.start, x.shape[axis]), len(taken))
        else:
            x = x.index_select(axis, torch.tensor(list(taken), dtype=torch.int64))
    return x


def _trilu(call: Call, x: Tensor, k: Tensor | None = None) -> Tensor:
    diagonal = 0 if k is None else int(k)
    return x.triu(diagonal) if call.integer("upper", 1) else x.tril(diagonal)


def _pad(call: Call, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
    amounts = integers(pads)
    where = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in integers(axes)]
    mode = call.text("mode", "constant")
    before_after = dict(zip(where, zip(amounts[: len(where)], amounts[len(where) :], strict=True), strict=True))
    if mode == "constant":
        flat = [amount for axis in reversed(range(x.dim())) for amount in before_after.get(axis, (0, 0))]
        return F.pad(x, flat, value=0.0 if value is None else value.item())
    for axis, (before, after) in before_after.items():
        size = x.shape[axis]
        position = torch.arange(-before, size + after)
        if mode == "edge":
            position = position.clamp(0, size - 1)
        elif mode == "wrap":
            position = position % size
        elif mode == "reflect":
            period = max(2 * (size - 1), 1)
            position = position % period
            position = torch.minimum(position, period - position) if size > 1 else position * 0
        else:
            raise ModelError(f"the padding mode '{mode}' is unknown")
        x = x.index_select(axis, position)
    return x


def _depth_to_space(call: Call, x: Tensor) -> Tensor:
    block = call.integer("blocksize", 1)
    b, c, h, w = x.shape
    if call.text("mode", "DCR") == "DCR":
        x = x.reshape(b, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(b, c // block**2, block, block, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(b, c // block**2, h * block, w * block)


def _space_to_depth(call: Call, x: Tensor) -> Tensor:
    block = call.integer("blocksize", 1)
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(b, c * block**2, h // block, w // block)


OPS: dict[str, Op] = {
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "EyeLike": _eye_like,
    "Flatten": _flatten,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
