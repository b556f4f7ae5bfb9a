"""MixedBitMatMul in plain numpy, written from the op's text alone, literal on purpose as `layout_reference` is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from tests.custom_ops import layout_reference
from tests.custom_ops.layout_reference import BLOCK, TILE, product_model, with_bias

INPUTS = ["packed", "depths", "columns", "scales", "order", "tables", "steps", "bias"]
FIRST_ENTRY = {1: 0, 2: 16, 3: 32, 4: 48, 5: 64, 6: 96}
"""Where the table of a depth begins."""
ENTRIES = 160


@dataclass(frozen=True)
class MixedWeight:
    """Codes uint8 [32 T, 32 J] of inputs in their order, and the op's inputs; scales float16 [N]."""

    codes: np.ndarray
    depths: np.ndarray
    columns: np.ndarray
    scales: np.ndarray
    order: np.ndarray
    tables: np.ndarray
    steps: np.ndarray
    band: int
    gain: float

    @property
    def n(self) -> int:
        return len(self.scales)

    @property
    def k(self) -> int:
        return len(self.order)

    def value(self, n: int, p: int) -> float:
        """What the code of one output and stored input is worth, before scales."""
        m = n // self.band
        bits = int(self.depths[m, p // BLOCK])
        if bits == 0:
            return 0.0
        level = int(self.codes[n, p])
        if bits <= 6:
            window = max(bits, 4)
            first, rows = m * self.band, min(self.band, len(self.codes) - m * self.band)
            index = 0
            for before in range(window):  # more than enough: the mask drops what is too old
                index += int(self.codes[first + (n - first - TILE * before) % rows, p]) << (bits * before)
            level = int(self.tables[FIRST_ENTRY[bits] + index % 2**window])
        return float(self.steps[bits]) * (level - (128 if bits == 8 else 63.5))

    def dequantize(self) -> np.ndarray:
        """float64 [N, K]: one weight after the other."""
        weight = np.zeros((self.n, self.k))
        for n in range(self.n):
            for p in range(self.k):
                column = 2.0 ** (-int(self.columns[n // self.band, p]) / 8)
                weight[n, self.order[p]] = self.gain * float(self.scales[n]) * column * self.value(n, p)
        return weight

    def pack(self) -> dict[str, np.ndarray]:
        """The op's inputs but x and bias."""
        tiles = len(self.codes) // TILE
        parts = [np.zeros(0, np.uint8)]
        for bits in range(1, 9):
            for tile in range(tiles):
                for block in np.flatnonzero(self.depths[tile * TILE // self.band] == bits):
                    codes = self.codes[tile * TILE :, block * BLOCK :][:TILE, :BLOCK]
                    parts.append(_packed(codes, bits).ravel())
        scales = np.zeros(tiles * TILE, np.float16)
        scales[: self.n] = self.scales
        return {
            "packed": np.concatenate(parts),
            "depths": self.depths,
            "columns": self.columns,
            "scales": scales.reshape(tiles, 1, TILE),
            "order": self.order,
            "tables": self.tables,
            "steps": self.steps,
        }


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """One block: uint8 [32, 32] to [1, 1, bits, 32, 4]."""
    scales = np.zeros((TILE, 1), np.float16)
    return layout_reference.Weight(codes, scales, np.zeros((1, 1), np.uint8), bits, BLOCK, 1.0).pack()["packed"]


def random_mixed(
    rng: np.random.Generator, n: int, k: int, band: int, depths: Sequence[int] = range(9), *, gain: float = 1.0
) -> MixedWeight:
    """Any order, depths, codes (also behind N, where the first outputs look back at them), levels and steps."""
    bands, tiles, blocks = -(-n // band), -(-n // TILE), -(-k // BLOCK)
    by_band = rng.choice(np.array(depths, np.uint8), (bands, blocks))
    codes = np.zeros((tiles * TILE, blocks * BLOCK), np.uint8)
    for tile in range(tiles):
        for block in range(blocks):
            largest = 2 ** int(by_band[tile * TILE // band, block])
            codes[tile * TILE :, block * BLOCK :][:TILE, :BLOCK] = rng.integers(0, largest, (TILE, BLOCK))
    tables = rng.integers(0, 128, ENTRIES, dtype=np.uint8)
    tables[[0, -1]] = [127, 0]
    return MixedWeight(
        codes=codes,
        depths=by_band,
        columns=rng.integers(0, 40, (bands, blocks * BLOCK), dtype=np.uint8),
        scales=rng.uniform(0.01, 0.1, n).astype(np.float16),
        order=rng.permutation(k).astype(np.uint16),
        tables=tables,
        steps=np.array([0.0, *rng.uniform(0.01, 0.1, 8)], np.float32),
        band=band,
        gain=gain,
    )


def relative_error(y: np.ndarray, x: np.ndarray, weight: MixedWeight, bias: np.ndarray | float = 0.0) -> float:
    """Largest difference over the sum of |x| times what the largest level of a weight's depth is worth."""
    size = np.zeros((weight.n, weight.k))
    for n in range(weight.n):
        depth = np.repeat(weight.depths[n // weight.band], BLOCK)[: weight.k]
        column = 2.0 ** (-weight.columns[n // weight.band, : weight.k].astype(np.float64) / 8)
        largest = np.where(depth == 8, 128.0, 63.5) * weight.steps.astype(np.float64)[depth]
        size[n, weight.order] = abs(weight.gain) * float(weight.scales[n]) * column * largest
    bound = np.abs(x).astype(np.float64) @ size.T + np.abs(bias) + 1e-12
    expected = x.astype(np.float64) @ weight.dequantize().T + bias
    return float(np.max(np.abs(y - expected) / bound, initial=0.0))


def mixed_model(
    weight: MixedWeight,
    bias: np.ndarray | None = None,
    *,
    accuracy_level: int = 4,
    x_shape: list[int | str | None] | None = None,
    replace: dict[str, np.ndarray] | None = None,
    **overrides: object,
) -> onnx.ModelProto:
    """x -> MixedBitMatMul -> y. `replace` swaps initializers and `overrides` attributes, to build wrong models."""
    attributes = {
        "K": weight.k,
        "N": weight.n,
        "band": weight.band,
        "gain": weight.gain,
        "accuracy_level": accuracy_level,
        "layout_version": 1,
    }
    arrays = weight.pack() | with_bias(bias) | (replace or {})
    return product_model("MixedBitMatMul", INPUTS, arrays, attributes | overrides, weight.k, x_shape)
