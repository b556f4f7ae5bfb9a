"""CodebookMatMul in plain numpy, written from the op's text alone, literal on purpose as `layout_reference` is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from tests.custom_ops import layout_reference
from tests.custom_ops.layout_reference import TILE, product_model, with_bias

LEVEL_BITS = 7
INPUTS = ["packed", "table", "scales", "zero_points", "bias"]


@dataclass(frozen=True)
class CodebookWeight:
    """Codes uint8 [32 T, K], table uint8 [2**window], scales float16 [N, G], zero points uint8 [N, G] or [1, 1]."""

    codes: np.ndarray
    table: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    bits: int
    window: int
    group_size: int
    gain: float

    @property
    def n(self) -> int:
        return self.scales.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1]

    def levels(self) -> np.ndarray:
        """Table entries [N, K]: one output after the other, one predecessor after the other."""
        rows = len(self.codes)
        out = np.zeros((self.n, self.k), np.uint8)
        for n in range(self.n):
            index = np.zeros(self.k, np.int64)
            for before in range(self.window):
                index += self.codes[(n - TILE * before) % rows].astype(np.int64) << (before * self.bits)
            out[n] = self.table[index % 2**self.window]
        return out

    def dequantize(self) -> np.ndarray:
        """float64 [N, K]."""
        group = np.arange(self.k) // self.group_size
        zero = np.broadcast_to(self.zero_points.astype(np.float64), self.scales.shape) / 2
        return self.gain * self.scales.astype(np.float64)[:, group] * (self.levels() - zero[:, group])

    def pack(self) -> dict[str, np.ndarray]:
        """Codes of all tiles; scales and zero points of the outputs that exist."""
        groups = self.scales.shape[1]
        shared = np.zeros((1, 1), np.uint8)
        no_scales = np.zeros((len(self.codes), groups), np.float16)
        codes = layout_reference.Weight(self.codes, no_scales, shared, self.bits, self.group_size, 1.0).pack()
        no_codes = np.zeros((self.n, self.k), np.uint8)
        side = layout_reference.Weight(no_codes, self.scales, self.zero_points, 1, self.group_size, 1.0).pack()
        return side | {"packed": codes["packed"], "table": self.table}


def random_codebook(
    rng: np.random.Generator,
    n: int,
    k: int,
    bits: int,
    window: int,
    group_size: int,
    *,
    shared_zero: bool = True,
    gain: float = 1.0,
) -> CodebookWeight:
    """Any codes, also behind N where the first outputs look back at them, and any levels, 0 and 127 among them."""
    groups = -(-k // group_size)
    table = rng.integers(0, 2**LEVEL_BITS, 2**window, dtype=np.uint8)
    table[[0, -1]] = [127, 0]
    return CodebookWeight(
        codes=rng.integers(0, 2**bits, (-(-n // TILE) * TILE, k), dtype=np.uint8),
        table=table,
        scales=rng.uniform(0.01, 0.1, (n, groups)).astype(np.float16),
        zero_points=rng.integers(0, 256, (1, 1) if shared_zero else (n, groups), dtype=np.uint8),
        bits=bits,
        window=window,
        group_size=group_size,
        gain=gain,
    )


def column_group(k: int) -> int:
    """K rounded up to 32: one scale for a whole column."""
    return -(-k // 32) * 32


def relative_error(y: np.ndarray, x: np.ndarray, weight: CodebookWeight, bias: np.ndarray | float = 0.0) -> float:
    """Largest difference over the sum of |x| |level| scale, since levels are summed before the zero point goes off."""
    group = np.arange(weight.k) // weight.group_size
    size = abs(weight.gain) * np.abs(weight.scales.astype(np.float64))[:, group] * 2**LEVEL_BITS
    bound = np.abs(x).astype(np.float64) @ size.T + np.abs(bias) + 1e-12
    expected = x.astype(np.float64) @ weight.dequantize().T + bias
    return float(np.max(np.abs(y - expected) / bound, initial=0.0))


def codebook_model(
    weight: CodebookWeight,
    bias: np.ndarray | None = None,
    *,
    accuracy_level: int = 4,
    x_shape: list[int | str | None] | None = None,
    replace: dict[str, np.ndarray] | None = None,
    **overrides: object,
) -> onnx.ModelProto:
    """x -> CodebookMatMul -> y. `replace` swaps initializers and `overrides` attributes, to build wrong models."""
    attributes = {
        "K": weight.k,
        "N": weight.n,
        "bits": weight.bits,
        "window": weight.window,
        "group_size": weight.group_size,
        "gain": weight.gain,
        "accuracy_level": accuracy_level,
        "layout_version": 1,
    }
    arrays = weight.pack() | with_bias(bias) | (replace or {})
    return product_model("CodebookMatMul", INPUTS, arrays, attributes | overrides, weight.k, x_shape)
