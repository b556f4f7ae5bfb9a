"""What every format has in common: a spec that prices a weight, and an encoding that holds one.

A *format* says how a weight [N, K] is stored. It is a small frozen value and the only place where sizes are
computed. An *encoding* is one weight in one format: arrays, no graph. To add a format, write one module with
both, an op body in ``onnxq/ops`` that decodes it, and its kernel.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Format(Protocol):
    """How a weight [N, K] is stored."""

    def cost_bits(self, n: int, k: int) -> int:
        """Bits that a weight [N, K] takes on disk: codes, all side data, and padding."""
        ...

    def label(self) -> str:
        """A short name for reports, such as ``"uniform 3-bit g64"``."""
        ...


class Encoding(Protocol):
    """One weight [N, K] in one format."""

    @property
    def format(self) -> Format:
        """The format that the weight is stored in."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight."""
        ...

    def dequantize(self) -> np.ndarray:
        """The weight that the runtime will use, float32 [N, K]."""
        ...

    def cost_bits(self) -> int:
        """Bits on disk; equals ``format.cost_bits(*shape)``."""
        ...
