"""Data that the models of one folder share: bytes that one file holds already are referred to by the next."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxq.graph.tensors import read_array


@dataclass
class DataPool:
    """Regions of the external data files of a folder, by content.

    ONNX lets a model refer to any data file in its folder. An encoder and three decoders that hold one embedding then
    store it once, and ONNX Runtime maps the same pages in each session.
    """

    _regions: dict[str, tuple[str, int]] = field(default_factory=dict)

    def find(self, content: str) -> tuple[str, int] | None:
        """File name and offset of bytes with this content (`digest_of`)."""
        return self._regions.get(content)

    def add(self, content: str, file: str, offset: int) -> None:
        """Notes a region of a file that is in place."""
        self._regions.setdefault(content, (file, offset))


def digest_of(tensor: ir.TensorProtocol) -> str:
    """Equal for tensors of one type whose bytes are; shape doesn't count."""
    data = np.ascontiguousarray(read_array(tensor)).reshape(-1).view(np.uint8)
    return f"{tensor.dtype.name} {tensor.nbytes} {hashlib.blake2b(data.data, digest_size=16).hexdigest()}"
