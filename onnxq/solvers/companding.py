"""CVXQ's quantiser: equal cells after the Laplace law's compander; and equal steps, which it is measured against.

A group is P weights with one depth B, one location mu and one scale, each of the two stored in float16:

    value = location + scale * levels(B)[code]        code = 0 .. 2**B - 1

Companding. The density of levels that suits squared error is the cube root of the weights' own. For the Laplace law of
standard deviation S that is the Laplace law of scale b = 3 S / sqrt(2), and its distribution function is the compander:

    sigma(w) = 1/2 + sgn(w - mu)/2 * (1 - exp(-|w - mu| / b))
    code = min(floor(2**B sigma(w)), 2**B - 1)
    levels(B)[code] = L((code + 1/2) / 2**B)          L(u) = ln(2 u) for u < 1/2, else -ln(2 (1 - u))

Source: Young, Radio (arXiv 2505.03031), section 3.2, and CVXQ (arXiv 2409.02026). Erratum: Radio's equation (8) as
printed, (1 + sgn)/2 * exp(-sqrt(2) |w - mu| / 3 S), is 0 on the left and falls on the right, so no compander; the form
above follows from the paper's own derivation.

1. The location is the median, S the root mean square about it; depth 0 leaves the location alone, not zero.
2. The search multiplies the scale with 2**m for 33 values of m and takes the least squared error, then moves the
   location by t S 2**m for 33 values of t. A search never does worse than none.
3. Equal steps (`uniform`) are the same with sigma(w) = 1/2 + (w - mu) / R cut off at 0 and 1, R = 2**B steps being the
   scale. Without a search the cells span the group from its least to its largest weight. The search goes out from the
   median, by fractions of that span, and may return to it.

No graph, no files. Memory: the codes, and a few MB for the block in work.
"""

from __future__ import annotations

import abc
import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

DEEPEST = 8
LAYOUT_BITS = 32
"""Bits of a group beside its codes: location and scale in float16."""
DEPTH_BITS = 3
"""Bits of a group's depth as the paper counts them, though 0 to 8 are nine depths."""

_OFFSETS = np.linspace(-2, 2, 33)
# Elements worked on at a time: the temporaries of one block then stay in the second-level cache.
_BLOCK_ELEMENTS = 1 << 16


@dataclass(frozen=True, eq=False)
class CodedGroups:
    """Groups of weights as codes.

    Attributes:
        law: whose levels the codes name.
        codes: uint8 [groups, P].
        depths: uint8 [groups], 0 to 8.
        locations, scales: float16 [groups].
    """

    law: Literal["laplace", "uniform"]
    codes: np.ndarray
    depths: np.ndarray
    locations: np.ndarray
    scales: np.ndarray

    def decode(self) -> np.ndarray:
        """The weights that the codes stand for, float32 [groups, P]."""
        tables = np.concatenate([np.zeros(1, np.float32), *(levels(self.law, depth) for depth in range(DEEPEST + 1))])
        # All tables in one, as the paper's kernel has them: that of depth B starts at 2**B.
        found: np.ndarray = tables[self.codes + (1 << self.depths.astype(np.int64))[:, None]]
        found *= self.scales.astype(np.float32)[:, None]
        found += self.locations.astype(np.float32)[:, None]
        return found

    def code_bits(self) -> int:
        """Bits of the codes alone."""
        return int(self.depths.sum(dtype=np.int64)) * int(self.codes.shape[1])


def compand(values: np.ndarray, depths: np.ndarray, *, search: bool = False) -> CodedGroups:
    """Quantise groups by the Laplace compander.

    Args:
        values: float [groups, P].
        depths: int [groups], 0 to 8.
        search: for the scale and the location of least squared error (rule 2); without, the textbook's.

    Raises:
        ValueError: a shape does not fit, a depth is out of range, or a value is not finite.
    """
    return _coded(values, depths, _Laplace(), search)


def uniform(values: np.ndarray, depths: np.ndarray, *, search: bool = False) -> CodedGroups:
    """Quantise groups to equal steps; as `compand`, without a search by steps from the least to the largest weight."""
    return _coded(values, depths, _Uniform(), search)


def levels(law: Literal["laplace", "uniform"], depth: int) -> np.ndarray:
    """The levels of a depth for location 0 and scale 1, ascending, float32 [2**depth]."""
    return (_Laplace() if law == "laplace" else _Uniform()).levels(depth)


def spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rule 1: medians and mean squares about them, float32 [groups, P] to two float64 [groups]."""
    medians = np.median(values, axis=1).astype(np.float64)
    squares: np.ndarray = np.square(values - medians[:, None]).mean(axis=1)
    return medians, squares


class _Law(abc.ABC):
    """How a law places levels. x is a weight minus the location over the scale, float32, any shape."""

    name: Literal["laplace", "uniform"]
    exponents: np.ndarray
    """The m of the search."""
    deviation: float
    """Standard deviation of the law over its scale: what S 2**m of rule 2 is a multiple of."""

    @abc.abstractmethod
    def unsearched(self, values: np.ndarray, medians: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Locations and scales of groups, float64 [groups] each."""

    @abc.abstractmethod
    def compressed(self, x: np.ndarray) -> np.ndarray:
        """sigma; may go beyond 0 and 1."""

    @abc.abstractmethod
    def levels(self, depth: int) -> np.ndarray:
        """See `levels`."""


class _Laplace(_Law):
    name = "laplace"
    exponents = np.linspace(-2, 2, 33)
    deviation = math.sqrt(2) / 3

    def unsearched(self, values: np.ndarray, medians: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        squares = np.square(values - medians[:, None]).mean(axis=1)
        return medians, np.sqrt(squares) / self.deviation

    def compressed(self, x: np.ndarray) -> np.ndarray:
        tail: np.ndarray = np.abs(x)
        np.negative(tail, out=tail)
        np.exp(tail, out=tail)
        np.subtract(np.float32(1), tail, out=tail)
        np.copysign(tail, x, out=tail)
        tail *= np.float32(0.5)
        tail += np.float32(0.5)
        return tail

    def levels(self, depth: int) -> np.ndarray:
        return _laplace_levels(depth)


class _Uniform(_Law):
    name = "uniform"
    # Few bits want steps that cut off the tails: an eighth of the span is enough for what is in networks.
    exponents = np.linspace(-3, 1, 33)
    deviation = 1 / math.sqrt(12)

    def unsearched(self, values: np.ndarray, medians: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        least, largest = values.min(axis=1).astype(np.float64), values.max(axis=1).astype(np.float64)
        return (least + largest) / 2, largest - least

    def compressed(self, x: np.ndarray) -> np.ndarray:
        shifted: np.ndarray = x + np.float32(0.5)
        return shifted

    def levels(self, depth: int) -> np.ndarray:
        return _uniform_levels(depth)


@functools.cache
def _laplace_levels(depth: int) -> np.ndarray:
    middle = (np.arange(1 << depth) + 0.5) / (1 << depth)
    quantiles = np.where(middle < 0.5, np.log(2 * middle), -np.log(2 * (1 - middle)))
    return np.asarray(quantiles, np.float32)


@functools.cache
def _uniform_levels(depth: int) -> np.ndarray:
    found: np.ndarray = ((np.arange(1 << depth) + 0.5) / (1 << depth) - 0.5).astype(np.float32)
    return found


def _coded(values: np.ndarray, depths: np.ndarray, law: _Law, search: bool) -> CodedGroups:
    if values.ndim != 2 or 0 in values.shape or depths.shape != values.shape[:1]:
        raise ValueError(f"groups [groups, P] and a depth for each are needed, not {values.shape} and {depths.shape}")
    if depths.min() < 0 or depths.max() > DEEPEST:
        raise ValueError(f"a depth is 0 to {DEEPEST} bits")
    if not np.isfinite(values).all():
        raise ValueError("the weight holds infinities or NaNs")
    groups, size = values.shape
    codes = np.zeros(values.shape, np.uint8)
    locations, scales = np.zeros(groups, np.float16), np.zeros(groups, np.float16)
    step = max(1, _BLOCK_ELEMENTS // size)
    for depth in np.unique(depths):
        chosen = np.flatnonzero(depths == depth)
        for start in range(0, len(chosen), step):
            block = chosen[start : start + step]
            fit = _Fit(values[block].astype(np.float32), int(depth), law)
            if search:
                fit.search()
            locations[block], scales[block] = fit.locations, fit.scales
            codes[block] = fit.codes(fit.locations, fit.scales)
    return CodedGroups(law.name, codes, depths.astype(np.uint8), locations, scales)


class _Fit:
    """A block of groups of one depth, and the best location and scale that each has met so far."""

    def __init__(self, values: np.ndarray, depth: int, law: _Law) -> None:
        self._values, self._depth, self._law = values, depth, law
        self._levels = law.levels(depth)
        self._medians = np.median(values, axis=1).astype(np.float64)
        locations, self._first_scales = law.unsearched(values, self._medians)
        # Losses are those of what is stored, never of what was wished for.
        self.locations, self.scales = _half(locations), _half(self._first_scales)

    def search(self) -> None:
        """Rule 2."""
        self._losses = self._loss(self.locations, self.scales)
        for exponent in self._law.exponents:
            self._try(self._medians, self._first_scales * 2.0**exponent)
        middles, scales = self.locations.astype(np.float64), self.scales.astype(np.float64)
        for offset in _OFFSETS:
            self._try(middles + offset * self._law.deviation * scales, scales)

    def codes(self, locations: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """The cell of each weight, for float16 locations and scales [groups]: uint8 [groups, P]."""
        return self._cells(self._values - locations.astype(np.float32)[:, None], scales).astype(np.uint8)

    def _cells(self, centred: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """int32 [groups, P]; centred float32."""
        wide = scales.astype(np.float32)
        # A group whose weights are all equal has the scale 0: any code will do.
        x = centred / np.where(wide > 0, wide, np.float32(1))[:, None]
        share = self._law.compressed(x)
        share *= np.float32(1 << self._depth)
        np.clip(share, 0, (1 << self._depth) - 1, out=share)
        return share.astype(np.int32)  # cuts off, which from 0 on is the floor

    def _loss(self, locations: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Squared errors, float32 [groups]."""
        errors = self._values - locations.astype(np.float32)[:, None]
        found = self._levels[self._cells(errors, scales)]
        found *= scales.astype(np.float32)[:, None]
        errors -= found
        losses: np.ndarray = np.einsum("gp,gp->g", errors, errors)
        return losses

    def _try(self, locations: np.ndarray, scales: np.ndarray) -> None:
        """Keep a location and a scale, float64 [groups] each, where they are better than the best so far."""
        stored = _half(locations), _half(scales)
        losses = self._loss(*stored)
        better = losses < self._losses
        self._losses = np.where(better, losses, self._losses)
        self.locations = np.where(better, stored[0], self.locations)
        self.scales = np.where(better, stored[1], self.scales)


def _half(numbers: np.ndarray) -> np.ndarray:
    limits = np.finfo(np.float16)
    half: np.ndarray = np.clip(numbers, limits.min, limits.max).astype(np.float16)
    return half
