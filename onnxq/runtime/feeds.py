"""Inputs for timing a model when there is no data: as the model wants them, values from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import ops
from onnxq.calibration.inputs import Feed, ModelInput, model_inputs
from onnxq.errors import ModelError
from onnxq.runtime.optimized import initializer, read_graph

_VIEWS = frozenset(["Cast", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten"])
_UNKNOWN_BOUND = 2
"""Integers stay below this where no table tells their range: 0 and 1 are valid almost everywhere."""


def random_feed(path: str | Path, *, batch: int = 1, length: int = 128, past: int = 0, seed: int = 0) -> Feed:
    """One feed for a model.

    Free dimensions are told apart by name: those with "batch" in it, and a nameless first one, take `batch`;
    those with "past" in it take `past`; all others `length`; sums such as "past_sequence_length + length" are
    added up. Token ids are drawn below the number of rows of the table that they look up; masks are all ones.

    Args:
        path: the .onnx file.
        batch: size of the batch.
        length: of free dimensions.
        past: length of the past that a decoder is given.
        seed: of the values.

    Raises:
        ModelError: an input of a type or shape that can't be made up.
    """
    model = read_graph(path)
    rng = np.random.default_rng(seed)
    feed: Feed = {}
    values = {value.name: value for value in model.graph.inputs}
    for wanted in model_inputs(model):
        if wanted.optional:
            continue
        if wanted.shape is None or wanted.dtype is None or wanted.dtype == object:
            raise ModelError(f"No values can be made up for the input {wanted.describe()}: give data with --data.")
        shape = [_size(dim, axis, batch, length, past) for axis, dim in enumerate(wanted.shape)]
        feed[wanted.name] = _values(wanted, wanted.dtype, values[wanted.name], shape, past, rng)
    return feed


def _size(dim: int | str | None, axis: int, batch: int, length: int, past: int) -> int:
    if isinstance(dim, int):
        return dim
    if dim is None:
        return batch if axis == 0 else length
    total = 0
    for term in dim.split("+"):
        word = term.strip()
        if word.isdigit():
            total += int(word)
        else:
            total += batch if "batch" in word else past if "past" in word else length
    return total


def _values(
    wanted: ModelInput,
    dtype: np.dtype[Any],
    value: ir.Value,
    shape: list[int],
    past: int,
    rng: np.random.Generator,
) -> np.ndarray:
    if dtype == np.bool_:
        return np.full(shape, past > 0 if "cache" in wanted.name else True)
    if not np.issubdtype(dtype, np.integer):
        return rng.standard_normal(shape).astype(dtype)
    if "mask" in wanted.name:
        return np.ones(shape, dtype)
    if "position" in wanted.name and shape:
        return np.broadcast_to(np.arange(past, past + shape[-1]), shape).astype(dtype)
    if "type" in wanted.name:
        return np.zeros(shape, dtype)
    bound = min((rows for rows in _tables_behind(value, set())), default=_UNKNOWN_BOUND)
    return rng.integers(0, bound, shape).astype(dtype)


def _tables_behind(value: ir.Value, seen: set[ir.Value]) -> Iterator[int]:
    """Rows of the tables that a value looks up, through operators that keep the values."""
    if value in seen:
        return
    seen.add(value)
    for node, index in value.uses():
        if node.domain == ops.DOMAIN and node.op_type == "LowBitGather" and index == 0:
            yield node.attributes.get_int("N", _UNKNOWN_BOUND)
        elif node.op_type in ("Gather", "GatherBlockQuantized") and index == 1:
            data = node.inputs[0]
            while data is not None and initializer(data) is None and (maker := data.producer()) is not None:
                data = maker.inputs[0] if maker.inputs else None
            tensor = initializer(data)
            if tensor is not None and tensor.size:
                yield int(tensor.shape.numpy()[0])
        elif node.op_type in _VIEWS and index == 0:
            yield from _tables_behind(node.outputs[0], seen)
