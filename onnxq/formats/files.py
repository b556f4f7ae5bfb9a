"""Encodings of any format as named arrays in a file, and back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnxq.formats.binary import BinaryEncoding, BinaryFormat
from onnxq.formats.codebook import CodebookEncoding, CodebookFormat
from onnxq.formats.float8 import Float8Encoding, Float8Format
from onnxq.formats.framed import FramedEncoding, FramedFormat
from onnxq.formats.mixed import MixedEncoding, MixedFormat
from onnxq.formats.uniform import UniformEncoding, UniformFormat

AnyFormat = UniformFormat | CodebookFormat | FramedFormat | MixedFormat | Float8Format | BinaryFormat
AnyEncoding = UniformEncoding | CodebookEncoding | FramedEncoding | MixedEncoding | Float8Encoding | BinaryEncoding

_KINDS: dict[str, type[AnyEncoding]] = {
    "uniform": UniformEncoding,
    "codebook": CodebookEncoding,
    "framed": FramedEncoding,
    "mixed": MixedEncoding,
    "float8": Float8Encoding,
    "binary": BinaryEncoding,
}


def encoding_to_arrays(encoding: AnyEncoding) -> dict[str, np.ndarray]:
    """Everything that `encoding_from_arrays` needs."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(encoding, cls))
    return {"kind": np.array(kind), **encoding.to_arrays()}


def encoding_from_arrays(arrays: Mapping[str, np.ndarray]) -> AnyEncoding:
    """Undoes `encoding_to_arrays`."""
    return _KINDS[str(arrays["kind"])].from_arrays(arrays)
