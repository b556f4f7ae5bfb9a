"""Fashion-MNIST as arrays (Xiao, Rasul and Vollgraf, 2017, arXiv:1708.07747)."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.packages import FetchError

MEAN, DEVIATION = 0.2860, 0.3530
"""Of the training pictures' values in 0 to 1."""

_UNSIGNED_BYTES = b"\0\0\x08"


@dataclass(frozen=True)
class Pictures:
    """Grey pictures and what they show.

    Attributes:
        pixels: uint8 [count, height, width].
        labels: int64 [count].
    """

    pixels: np.ndarray
    labels: np.ndarray

    def normalised(self) -> np.ndarray:
        """Float32 [count, 1, height, width] of mean 0 and variance 1 over the training set, what models take."""
        return normalise(self.pixels)


def normalise(pixels: np.ndarray) -> np.ndarray:
    """Pixels 0 to 255 [..., height, width] as float32 [..., 1, height, width] of mean 0 and variance 1."""
    scaled = (pixels.astype(np.float32) / 255 - MEAN) / DEVIATION
    return scaled[..., None, :, :]


def read_idx(content: bytes, name: str) -> np.ndarray:
    """An array of unsigned bytes in the IDX format of MNIST.

    Two zero bytes, a byte for the type (8 = unsigned byte), one for the number of dimensions, the sizes as big-endian
    32-bit integers, the values.

    Args:
        name: Of the file, for messages.

    Raises:
        FetchError: Another type, or the sizes do not fit the values.
    """
    if content[:3] != _UNSIGNED_BYTES or len(content) < 4 + 4 * content[3]:
        raise FetchError(f"{name} is not an IDX file of unsigned bytes")
    start = 4 + 4 * content[3]
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], ">u4"))
    if math.prod(shape) != len(content) - start:
        raise FetchError(f"{name} announces the shape {shape} but holds {len(content) - start} values")
    return np.frombuffer(content[start:], np.uint8).reshape(shape)


def load(folder: Path) -> tuple[Pictures, Pictures]:
    """Training set (60,000) and test set (10,000) from the artefact's folder."""
    train, test = (
        Pictures(
            read_idx(gzip.decompress((folder / f"{side}-images-idx3-ubyte.gz").read_bytes()), f"{side} images"),
            read_idx(gzip.decompress((folder / f"{side}-labels-idx1-ubyte.gz").read_bytes()), f"{side} labels").astype(
                np.int64
            ),
        )
        for side in ("train", "t10k")
    )
    return train, test
