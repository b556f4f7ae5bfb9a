"""Rounding to the mixed format: what each depth costs each input, which depths are best, and the codes.

1. `measure_depths` finds the squared error of every input at every depth, with the best scale for each, from a
   histogram of its weights. No law of rate and distortion is assumed: at 0 to 3 bits, where it matters, none holds; and
   all outputs are looked at, since a few large weights of a loud input can cost more than all others.
2. `choose_depths` finds the best depths for a mean: every block of a band takes the depth that costs least at one price
   for a bit, which is exact for the rates that prices lead to (a Lagrangian over the lower convex hulls).
3. `mixed_feedback` rounds with error feedback, as in `onnxq.solvers.error_feedback`, trellis codes as in
   `onnxq.solvers.trellis`.

Sources: Young, CVXQ (arXiv 2409.02026), for depths by the variance of gradients and weights; the rest is ours.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from onnxq.formats import packing
from onnxq.formats.mixed import COLUMN_STEPS, DEEPEST, MixedEncoding, MixedFormat, values_of, window_of
from onnxq.formats.tables import GAUSSIAN_TABLES
from onnxq.solvers.factor import Factor, Recursion
from onnxq.solvers.viterbi import closed_path

DEPTHS = DEEPEST + 1
_REACH = np.arange(-6, 33)
"""Scales that are tried for an input, in steps of a column scale around its root mean square."""
_BINS_PER_OCTAVE, _FIRST_OCTAVE, _OCTAVES, _POINTS_PER_BIN = 12, -6, 13, 8
"""Of the histogram of magnitudes over their root mean square."""
_ONE_BIT_LEVEL = math.sqrt(2 / math.pi)
_LAST_COLUMN = 255
_TRELLIS_RUNS = 512
_LEAF = 32
_ROUNDS = 64
"""Of bisection: to the last digit of a price."""


@dataclasses.dataclass(frozen=True, eq=False)
class DepthErrors:
    """What each depth costs each input of each band.

    Attributes:
        squares: float64 [M, K, 9]: squared error, summed over the band's outputs.
        band: outputs of a band.
    """

    squares: np.ndarray
    band: int


@dataclasses.dataclass(frozen=True, eq=False)
class Depths:
    """A choice of depths.

    Attributes:
        by_band: uint8 [M, J], inputs in the order that was given.
        loss: what it costs.
    """

    by_band: np.ndarray
    loss: float


def bands_of(n: int, rows: int) -> int:
    """Outputs of each of the bands that N outputs are cut into, about `rows` each: whole tiles, the last the rest."""
    tiles = packing.ceil_div(n, packing.TILE_N)
    count = max(1, round(n / rows))
    return packing.ceil_div(tiles, count) * packing.TILE_N


def measure_depths(weight: np.ndarray, band: int) -> DepthErrors:
    """Squared errors of nearest rounding at every depth, the best scale for each.

    Memory: a few copies of a band.

    Args:
        weight: float [N, K].
        band: outputs that have depths of their own, a multiple of 32.
    """
    scales, _ = _scales(weight)
    bands = packing.ceil_div(len(weight), band)
    squares = np.empty((bands, weight.shape[1], DEPTHS))
    for m in range(bands):
        rows = slice(m * band, (m + 1) * band)
        units = (weight[rows] / scales[rows, None]).astype(np.float32)
        shares = np.square(scales[rows])
        squares[m, :, 0] = shares @ np.square(units, dtype=np.float64)
        squares[m, :, 1:] = _best_columns(units, shares)[1]
        tiles = packing.ceil_div(len(units), packing.TILE_N)
        squares[m, :, 1:] *= [_trellis_gain(depth, tiles) for depth in range(1, DEPTHS)]
    return DepthErrors(squares, band)


def input_order(importance: np.ndarray) -> np.ndarray:
    """The order that puts inputs of like importance into one block: float [K] to int [K]."""
    order: np.ndarray = np.argsort(-importance, kind="stable")
    return order


def choose_depths(
    errors: DepthErrors, importance: np.ndarray, order: np.ndarray, n: int, means: Sequence[float]
) -> list[Depths]:
    """The best depths for each mean number of code bits.

    Args:
        errors: of the weight [N, K].
        importance: float [M, K], what a squared error costs.
        order: int [K].
        n: number of outputs.
        means: ceilings, each for a choice of its own.
    """
    blocks = packing.ceil_div(len(order), packing.BLOCK_K)
    losses = np.zeros((len(errors.squares), blocks, DEPTHS))
    ordered = (errors.squares * importance[:, :, None])[:, order]
    for block in range(blocks):
        losses[:, block] = ordered[:, block * packing.BLOCK_K : (block + 1) * packing.BLOCK_K].sum(1)
    # A deeper block never costs more: where measuring says so, it is the sample's noise.
    losses = np.minimum.accumulate(losses, axis=2)
    tiles = packing.ceil_div(n, packing.TILE_N)
    heights = np.diff(np.append(np.arange(len(losses)) * (errors.band // packing.TILE_N), tiles))
    return [_at_mean(losses, heights, mean) for mean in means]


def _at_mean(losses: np.ndarray, heights: np.ndarray, mean: float) -> Depths:
    """The depths at the lowest price whose mean, over tiles and blocks, is no more."""
    bits = heights[:, None, None] * np.arange(DEPTHS)
    room = mean * heights.sum() * losses.shape[1]

    def at(price: float) -> np.ndarray:
        chosen: np.ndarray = (losses + price * bits).argmin(axis=2)
        return chosen

    def spent(chosen: np.ndarray) -> float:
        return float((heights[:, None] * chosen).sum())

    largest = float(losses.max(initial=0.0)) or 1.0
    low, high = -200.0, math.log2(largest) + 1
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(at(2.0**middle)) > room else (low, middle)
    chosen = at(2.0**high)
    m, j = np.ogrid[: losses.shape[0], : losses.shape[1]]
    return Depths(chosen.astype(np.uint8), float(losses[m, j, chosen].sum()))


def mixed_feedback(
    weight: np.ndarray, format: MixedFormat, factor: Factor | None, *, refit: bool = True
) -> MixedEncoding:
    """Round a weight so that the output of its layer moves little.

    Memory: about 20 bytes for each element of a band at a time, and the result.

    Args:
        weight: float [N, K].
        format: order and depths.
        factor: of the inputs' second moment; None rounds to nearest.
        refit: afterwards fit the scales of outputs to the codes, under the whole second moment.

    Raises:
        ValueError: a shape does not fit, or a value is not finite.
    """
    n, k = weight.shape
    if not np.isfinite(weight).all():
        raise ValueError("the weight holds infinities or NaNs")
    scales, gain = _scales(weight)
    stored = scales.astype(np.float16)
    scales = stored.astype(np.float32)
    by_band = format.by_band()
    rows = packing.ceil_div(n, packing.TILE_N) * packing.TILE_N
    width = by_band.shape[1] * packing.BLOCK_K
    codes = np.zeros((rows, width), np.uint8)
    columns = np.zeros((len(by_band), width), np.uint8)
    place = np.empty(k, np.int64)
    place[format.inputs()] = np.arange(k)
    for m, blocks in enumerate(by_band):
        first, last = m * format.band, min((m + 1) * format.band, n)
        depths = np.repeat(blocks, packing.BLOCK_K)[place]
        values = weight[first:last] / np.float32(gain)
        band = _Band(values, scales[first:last], depths)
        band.feed_back(factor)
        if refit and factor is not None:
            stored[first:last] = band.refitted(factor.moment, stored[first:last])
        codes[first : first + len(band.units), place] = band.codes.T
        columns[m, place] = band.columns
    return MixedEncoding(format, codes, columns, stored, gain)


class _Band:
    """The outputs of one band on their way to codes; rows behind the last are there for trellises to run through."""

    def __init__(self, values: np.ndarray, scales: np.ndarray, depths: np.ndarray) -> None:
        """Take values float [R, K] over the gain, scales float32 [R] and depths [K]."""
        self._real = len(values)
        self._tiles = packing.ceil_div(self._real, packing.TILE_N)
        self._depths = depths
        self._values = np.zeros((values.shape[1], self._tiles * packing.TILE_N), np.float32)
        self._values[:, : self._real] = values.T
        self.units = np.ones(self._values.shape[1], np.float32)
        self.units[: self._real] = np.where(scales > 0, scales, 1)
        self.columns = np.zeros(len(depths), np.uint8)
        self._levels = np.zeros_like(self._values)
        self.codes = np.zeros(self._values.shape, np.uint8)

    def feed_back(self, factor: Factor | None) -> None:
        """Round all inputs, in the factor's order."""
        if factor is None:
            for k in range(len(self._values)):
                self._round(k, self._values[k])
            return
        visit = factor.visit
        Recursion(self._values[visit], factor, _LEAF).visit(
            0, len(visit), lambda j, wanted: self._round(int(visit[j]), wanted)
        )

    def _round(self, k: int, wanted: np.ndarray) -> np.ndarray:
        """Fit the scale of an input to what is wanted of it and code it; the error that is left of its own values."""
        depth = int(self._depths[k])
        if depth:
            real = slice(self._real)
            columns, _ = _best_columns((wanted[real] / self.units[real])[:, None], np.square(self.units[real]))
            self.columns[k] = columns[0, depth - 1]
            unit = self.units * np.float32(2.0 ** (-float(self.columns[k]) / COLUMN_STEPS))
            index = _coded(wanted, unit, depth, self._tiles)
            self.codes[k] = index & ((1 << depth) - 1)
            self._levels[k] = values_of(depth)[index] * unit
        error: np.ndarray = self._values[k] - self._levels[k]
        return error

    def refitted(self, moment: np.ndarray, stored: np.ndarray) -> np.ndarray:
        """Scales float16 [R] that suit the codes best: one factor for each output, under the second moment."""
        levels, values = self._levels[:, : self._real], self._values[:, : self._real]
        image = moment @ levels
        own = np.einsum("kr,kr->r", levels, image, dtype=np.float64)
        cross = np.einsum("kr,kr->r", values, image, dtype=np.float64)
        better = np.divide(cross, own, out=np.ones_like(own), where=own > 0)
        # A factor below 0 would say that the codes are worse than nothing; leave that to the next solver.
        fitted: np.ndarray = (stored.astype(np.float32) * np.maximum(better, 0)).astype(np.float16)
        return fitted


def _coded(wanted: np.ndarray, unit: np.ndarray, depth: int, tiles: int) -> np.ndarray:
    """Table indices for values float32 [32 T] in steps of unit: int64 [32 T]."""
    values, window = values_of(depth), window_of(depth)
    if window == depth:
        return _nearest(wanted / unit, depth)
    costs = wanted[:, None] - unit[:, None] * values
    np.square(costs, out=costs)
    index: np.ndarray = closed_path(costs.reshape(tiles, packing.TILE_N, -1), depth, window).ravel()
    return index


def _nearest(values: np.ndarray, depth: int) -> np.ndarray:
    """Index of the nearest level of a table without predecessors."""
    table = values_of(depth)
    order = np.argsort(table)
    ends = (table[order][1:] + table[order][:-1]) / 2
    index: np.ndarray = order[np.searchsorted(ends, values)]
    return index


def _plain_levels(depth: int) -> np.ndarray:
    """Levels that codes of a depth have without predecessors, ascending: the trellis is worth a known factor more."""
    if depth == 1:
        return np.array([-_ONE_BIT_LEVEL, _ONE_BIT_LEVEL], np.float32)
    if (depth, depth) in GAUSSIAN_TABLES:
        found = GAUSSIAN_TABLES[depth, depth]
        levels: np.ndarray = np.sort((np.array(found.entries, np.float32) - np.float32(63.5)) * np.float32(found.step))
        return levels
    sorted_levels: np.ndarray = np.sort(values_of(depth))
    return sorted_levels


@functools.cache
def _trellis_gain(depth: int, tiles: int) -> float:
    """Squared error of the depth's closed trellis through so many tiles over that of its plain levels.

    Of Gaussian weights, by experiment: short runs gain less, or nothing.
    """
    if window_of(depth) == depth:
        return 1.0
    samples = np.random.default_rng(depth).standard_normal((tiles, _TRELLIS_RUNS)).astype(np.float32)
    index = closed_path(np.square(samples[:, :, None] - values_of(depth)), depth, window_of(depth))
    levels = _plain_levels(depth)
    plain = samples - levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, samples)]
    return float(np.square(samples - values_of(depth)[index]).mean() / np.square(plain).mean())


def _best_columns(units: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each input and depth from 1 the column scale of least error, and that error.

    Args:
        units: values over their outputs' scales, float32 [R, K].
        shares: what an output's squared error counts, [R].

    Returns:
        uint8 [K, 8] and float64 [K, 8].
    """
    k = units.shape[1]
    rms = np.sqrt(np.square(units, dtype=np.float64).mean(0))
    rms = np.where(rms > 0, rms, 2.0**-31)
    magnitudes = np.abs(units / rms.astype(np.float32)) + np.float32(2.0**_FIRST_OCTAVE)
    bins = _BINS_PER_OCTAVE * _OCTAVES
    index = ((np.log2(magnitudes) - _FIRST_OCTAVE) * _BINS_PER_OCTAVE).astype(np.int64).clip(0, bins - 1)
    index += np.arange(k) * bins
    weights = np.broadcast_to(shares[:, None], units.shape)
    histogram = np.bincount(index.ravel(), weights.ravel(), k * bins).reshape(k, bins)
    errors = np.einsum("kb,bdr->kdr", histogram, _bin_errors(), optimize=True)
    best = errors.argmin(axis=2)
    least = np.take_along_axis(errors, best[:, :, None], 2)[:, :, 0] * np.square(rms)[:, None]
    middle = np.rint(-COLUMN_STEPS * np.log2(rms))[:, None]
    return np.clip(middle - _REACH[best], 0, _LAST_COLUMN).astype(np.uint8), least


@functools.cache
def _bin_errors() -> np.ndarray:
    """Mean squared error of the magnitudes in a bin, by depth from 1 and tried scale: float64 [bins, 8, scales]."""
    points = np.arange(_BINS_PER_OCTAVE * _OCTAVES * _POINTS_PER_BIN) + 0.5
    # The offset that keeps logarithms finite is taken back.
    values = np.exp2(points / (_BINS_PER_OCTAVE * _POINTS_PER_BIN) + _FIRST_OCTAVE) - 2.0**_FIRST_OCTAVE
    errors = np.empty((len(points), DEEPEST, len(_REACH)))
    for depth in range(1, DEPTHS):
        levels = _plain_levels(depth).astype(np.float64)
        ends = (levels[1:] + levels[:-1]) / 2
        for at, reach in enumerate(_REACH):
            scale = 2.0 ** (reach / COLUMN_STEPS)
            # Tables are symmetric but for their grid, and weights have both signs.
            both = [np.square(side - levels[np.searchsorted(ends, side / scale)] * scale) for side in (values, -values)]
            errors[:, depth - 1, at] = np.mean(both, axis=0)
    mean: np.ndarray = errors.reshape(-1, _POINTS_PER_BIN, DEEPEST, len(_REACH)).mean(1)
    return mean


def _scales(weight: np.ndarray) -> tuple[np.ndarray, float]:
    """A scale for each output, float64 [N], and the power of two that brings every column scale below 1.

    Columns over their root mean squares, then outputs: what is left is alike in all of them.
    """
    squares = np.square(weight, dtype=np.float64)
    columns = np.sqrt(squares.mean(0))
    columns = np.where(columns > 0, columns, 1)
    rows = np.sqrt((squares / columns**2).mean(1))
    rows = np.where(rows > 0, rows, 1)
    # The best scales reach 16 times the root mean square.
    gain = 2.0 ** math.ceil(math.log2(16 * float(columns.max())))
    return rows, gain
