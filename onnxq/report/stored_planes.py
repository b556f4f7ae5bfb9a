"""Binary weights in stock ops, read back from a written model: their nodes say where the arrays are."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq.formats.binary import BinaryFormat
from onnxq.graph.tensors import read_array
from onnxq.passes.forms.planes import PLANES_PROPERTY, from_plane_rows
from onnxq.runtime.optimized import initializer

StoredPlanes = tuple[BinaryFormat, int, list[ir.Value], Callable[[], np.ndarray]]
_ROLES = ("signs", "scales", "offsets", "rank")


def planes_of(node: ir.Node, model: ir.Model) -> StoredPlanes | None:
    """What a node that reads planes says of its weight.

    Returns:
        The format, K, the initializers, signs first, and what decodes the weight, float32 [N, K]; None for other nodes,
        and where what is said does not fit the file.
    """
    text = node.metadata_props.get(PLANES_PROPERTY)
    if text is None:
        return None
    try:
        about: dict[str, Any] = json.loads(text)
        names = {role: about["tensors"][role] for role in _ROLES if role in about["tensors"]}
        planes, size, gain = tuple(about["planes"]), int(about["group_size"]), float(about["gain"])
        values = {role: model.graph.initializers[name] for role, name in names.items()}
        rows, width = (int(dim) for dim in _tensor(values["signs"]).shape.numpy())
        if sum(planes) != rows:
            return None
        k = 8 * width
        format = BinaryFormat(planes, None if size >= k else size, "offsets" in values, "rank" in values)
    except (ValueError, KeyError, TypeError, IndexError):
        return None

    def decode() -> np.ndarray:
        arrays = {role: read_array(_tensor(value)) for role, value in values.items()}
        sides = {role: array[:, :, 0] if array.ndim == 3 else array for role, array in arrays.items()}
        offsets, rank = sides.get("offsets"), sides.get("rank")
        return from_plane_rows(sides["signs"], sides["scales"], offsets, rank, format, gain).dequantize()

    return format, k, list(values.values()), decode


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    tensor = initializer(value)
    if tensor is None:
        raise KeyError(value.name)
    return tensor
