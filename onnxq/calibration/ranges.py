"""What rounding of activations needs to know of a tensor: how its values are spread, and a sample of its rows.

Values are counted in the bins of a short float, by the exponent and the top five mantissa bits: 32 bins an octave, each
of one width within its octave, whose edges are exact (`bin_edges`). So the bins are as fine for small values as for
large ones, whatever the scale, and no range has to be known before the data is seen.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from onnxq.errors import CalibrationError

SAMPLED_ROWS = 256
BINS_PER_OCTAVE = 32
SMALLEST_EXPONENT, LARGEST_EXPONENT = -40, 24
"""Values below 2**-40 count in the first bin, those of 2**24 and more in the last."""
BINS = BINS_PER_OCTAVE * (LARGEST_EXPONENT - SMALLEST_EXPONENT)

_BLOCK_ROWS = 2048
_SHIFT = 18  # float32's 23 mantissa bits, less the five that choose the bin
_FIRST = (SMALLEST_EXPONENT + 127) * BINS_PER_OCTAVE


def bin_edges() -> np.ndarray:
    """Edges of the bins of magnitudes, float64 [BINS + 1]."""
    octaves = np.exp2(np.arange(SMALLEST_EXPONENT, LARGEST_EXPONENT, dtype=np.float64))
    edges = octaves[:, None] * (1 + np.arange(BINS_PER_OCTAVE) / BINS_PER_OCTAVE)
    return np.append(edges.ravel(), 2.0**LARGEST_EXPONENT)


@dataclasses.dataclass(frozen=True, eq=False)
class RangeStatistics:
    """Of one tensor's rows, padding left out.

    Attributes:
        count: rows seen.
        minimum: smallest value.
        maximum: largest value.
        mean_square: mean of x^2.
        zeros: values that are exactly zero.
        negative: int64 [BINS], how many values have a magnitude in each bin and are below zero.
        positive: int64 [BINS], those above zero.
        rows: float32 [at most SAMPLED_ROWS, K], drawn evenly from all rows; where rows differ in width (attention
            weights), the narrower are filled up with zeros, which every grid holds.
        keys: float64, the random number of each sampled row, rising: the rows with the smallest are the sample.
    """

    count: int
    minimum: float
    maximum: float
    mean_square: float
    zeros: int
    negative: np.ndarray
    positive: np.ndarray
    rows: np.ndarray
    keys: np.ndarray

    @property
    def largest(self) -> float:
        """Largest magnitude."""
        return max(self.maximum, -self.minimum)

    @property
    def elements(self) -> int:
        """Values seen."""
        return int(self.negative.sum() + self.positive.sum()) + self.zeros

    def merge(self, other: RangeStatistics) -> RangeStatistics:
        """Of both sets of rows together."""
        if not self.count or not other.count:
            return self if self.count else other
        elements = self.elements + other.elements
        rows, keys = _smallest([(self.rows, self.keys), (other.rows, other.keys)])
        return RangeStatistics(
            self.count + other.count,
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
            self.mean_square * (self.elements / elements) + other.mean_square * (other.elements / elements),
            self.zeros + other.zeros,
            self.negative + other.negative,
            self.positive + other.positive,
            rows,
            keys,
        )


class RangeAccumulator:
    """Counts values and draws rows, in one pass.

    Peak memory: 32 KB of counts, 4 * SAMPLED_ROWS * K bytes of rows (twice while new ones come in), and one block of
    2048 rows in float32 with its bin numbers (12 bytes a value).

    Args:
        seed: Of the draw. The sample depends on it and on the order of the rows, not on how they are handed in.
    """

    def __init__(self, seed: int = 0) -> None:
        self.count = 0
        self._random = np.random.default_rng(seed)
        self._minimum, self._maximum = np.inf, -np.inf
        self._elements, self._zeros, self._squares = 0, 0, 0.0
        self._signs = np.zeros(2 * BINS, np.int64)
        self._rows, self._keys = np.zeros((0, 0), np.float32), np.zeros(0)

    def add(self, rows: np.ndarray) -> None:
        """Rows [n, K] of any float dtype; K may differ from call to call."""
        for start in range(0, rows.shape[0], _BLOCK_ROWS):
            block = np.ascontiguousarray(rows[start : start + _BLOCK_ROWS], dtype=np.float32)
            if not block.size or not self.finite:
                return
            self.count += block.shape[0]
            # NaN spreads to both, and `finite` tells.
            self._minimum = min(float(block.min()), self._minimum)
            self._maximum = max(float(block.max()), self._maximum)
            if not self.finite:
                return
            self._elements += block.size
            self._squares += float(np.einsum("nk,nk->", block, block, dtype=np.float64))
            self._count(block)
            self._draw(block)

    @property
    def finite(self) -> bool:
        """False once a NaN or infinity was added."""
        return not self.count or bool(np.isfinite(self._minimum) and np.isfinite(self._maximum))

    def finish(self) -> RangeStatistics:
        """What was seen so far.

        Raises:
            CalibrationError: a NaN or infinity was added.
        """
        if not self.finite:
            raise CalibrationError("Values hold NaN or infinity; no grid can hold their range.")
        low, high = (self._minimum, self._maximum) if self.count else (0.0, 0.0)
        mean_square = self._squares / max(self._elements, 1)
        negative, positive = self._signs[BINS:].copy(), self._signs[:BINS].copy()
        order = np.argsort(self._keys)
        return RangeStatistics(
            self.count, low, high, mean_square, self._zeros, negative, positive, self._rows[order], self._keys[order]
        )

    def _count(self, block: np.ndarray) -> None:
        bits = block[block != 0].view(np.uint32)
        self._zeros += block.size - bits.size
        place = ((bits & 0x7FFFFFFF) >> _SHIFT).astype(np.int32) - _FIRST
        np.clip(place, 0, BINS - 1, out=place)
        place += BINS * (bits >> 31).astype(np.int32)
        self._signs += np.bincount(place, minlength=2 * BINS)

    def _draw(self, block: np.ndarray) -> None:
        keys = self._random.random(len(block))
        if self._keys.size == SAMPLED_ROWS:
            near = keys < self._keys[-1]
            block, keys = block[near], keys[near]
        self._rows, self._keys = _smallest([(self._rows, self._keys), (block, keys)])


def _smallest(samples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of all samples with the smallest keys, in their order."""
    keys = np.concatenate([keys for _, keys in samples])
    chosen = np.argsort(keys, kind="stable")[:SAMPLED_ROWS]
    rows = np.zeros((chosen.size, max(rows.shape[1] for rows, _ in samples)), np.float32)
    start = 0
    for source, _ in samples:
        mine = (chosen >= start) & (chosen < start + source.shape[0])
        rows[mine, : source.shape[1]] = source[chosen[mine] - start]
        start += source.shape[0]
    return rows, keys[chosen]
