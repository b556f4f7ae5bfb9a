"""Fitting of binary codes: scales and signs whose sum comes near the weights of a group.

Per group the fit minimises sum_k importance[k] * (w[k] - sum_p scale[p] * sign[p, k] - offset)**2.

- Greedy, as the paper has it: each plane takes the signs of what is left, and their mean magnitude as its scale.
- Refined: after each plane all scales are fitted anew, by least squares.
- Alternating: signs of the nearest of all 2**planes levels, and least squares, in turn, from several starts.

Nearest levels cut the line into pieces. So values are sorted once and summed up from the left, and a round of the
alternation, its least squares and its loss need the pieces' ends alone, whatever the size of the group.

Losses are those of the float16 scales that are stored. No method loses to the one before it, group by group.

Sources: Chung et al. (arXiv 2009.07453); Guo et al., Network sketching (arXiv 1706.02021), for refining; Xu et al.,
Alternating multi-bit quantization (arXiv 1802.00150).
"""

from __future__ import annotations

import dataclasses
import enum
import functools

import numpy as np

from onnxq.formats.binary import MOST_PLANES, BinaryEncoding, BinaryFormat
from onnxq.formats.packing import ceil_div
from onnxq.formats.uniform import choose_gain
from onnxq.solvers.grid import group_importance, into_groups, largest_magnitude, run_over_rows

ROUNDS = 15
_LARGEST_FLOAT16 = 65504.0
_RIDGE = 1e-9
"""Share of a group's importance that keeps equal planes apart."""
_GAUSSIAN_STEP = (1.596, 0.996, 0.586, 0.335, 0.188, 0.104)
"""Of the best equal steps for a unit Gaussian, by planes (Max 1960)."""
_LAST_ROUNDS = 3
"""Times as many rounds from the best level that all starts led to: from three planes on it pays."""
_LEAST_GAIN = 3e-4
"""Share of its loss that a group has to gain in a round, or it is done."""
_MORE_ROWS = 8
"""Times as many rows as `run_over_rows` takes at a time: a round costs little more for them."""
_STEPS = (1.0, 1.35, 2.0)
"""Equal steps to start from, over those: tails are often longer."""


class BinaryFit(enum.Enum):
    """How signs and scales are found."""

    GREEDY = "greedy"
    """Plane by plane, the paper's."""
    REFINED = "refined"
    """Plane by plane, all scales fitted anew after each."""
    ALTERNATING = "alternating"
    """All planes together."""


def binary_codes(
    weight: np.ndarray,
    format: BinaryFormat,
    importance: np.ndarray | None = None,
    *,
    rows: np.ndarray | None = None,
    fit: BinaryFit = BinaryFit.ALTERNATING,
    rounds: int = ROUNDS,
) -> BinaryEncoding:
    """Fit every group of a weight by itself.

    Memory: the result, scales in float16 for each plane, and some 20 MB a thread.

    Args:
        weight: float [N, K].
        format: planes of rows, grouping, offsets.
        importance: float [K], the diagonal of the inputs' second moment; None means equal.
        rows: int [N], those of the weight in the order in which they are stored; None for natural.
        fit: see `BinaryFit`.
        rounds: of the alternation, from each start; the best of them goes on for three times as many.

    Raises:
        ValueError: a shape does not fit, a value is not finite, or an importance is negative.
    """
    gain = _safe_gain(weight, format)
    n, k = weight.shape
    shares = group_importance(importance, format, k)
    codes = np.zeros((n, k), np.uint8)
    scales = np.zeros((len(format.planes), n, format.groups(k)), np.float16)
    offsets = np.zeros((n, format.groups(k)), np.float16) if format.offset else None
    source = np.arange(n) if rows is None else rows
    for planes, run in format.runs():

        def solve(block: slice, planes: int = planes, first: int = run.start) -> None:
            stored = slice(first + block.start, first + block.stop)
            values = into_groups(weight[source[stored]], format, gain)
            found = fit_groups(values, shares, planes, offset=format.offset, fit=fit, rounds=rounds)
            codes[stored] = found.codes.reshape(len(values), -1)[:, :k]
            scales[:planes, stored] = found.scales.transpose(2, 0, 1)
            if offsets is not None:
                offsets[stored] = found.offsets

        run_over_rows(solve, run.stop - run.start, ceil_div(k, _MORE_ROWS))
    order = None if rows is None else rows.astype(np.int32)
    return BinaryEncoding(format, codes, scales, offsets, order, gain)


def plane_errors(
    weight: np.ndarray,
    format: BinaryFormat,
    importance: np.ndarray | None = None,
    *,
    most: int = MOST_PLANES,
    fit: BinaryFit = BinaryFit.ALTERNATING,
) -> np.ndarray:
    """Squared error of every row with 1, 2, ... planes: float64 [N, most].

    Args:
        weight: float [N, K].
        format: for groups and offsets; its planes don't matter.
        importance: float [K], what a squared error counts; None means 1.
        most: planes that are tried.
        fit: see `BinaryFit`.

    Raises:
        ValueError: see `binary_codes`.
    """
    n, k = weight.shape
    gain = _safe_gain(weight, format)
    shares = group_importance(importance, format, k)
    errors = np.empty((n, most))
    # Shares have a mean of 1 in each group, whatever its inputs count and however many of them are filler.
    size = format.effective_group(k)
    counts = np.add.reduceat(np.ones(k) if importance is None else importance, np.arange(0, k, size)) / size

    def solve(rows: slice) -> None:
        values = into_groups(weight[rows], format, gain)
        for planes in range(1, most + 1):
            found = fit_groups(values, shares, planes, offset=format.offset, fit=fit)
            errors[rows, planes - 1] = found.losses @ counts

    run_over_rows(solve, n, ceil_div(k, _MORE_ROWS))
    errors *= gain**2
    # A plane more never costs more: where a fit says so, it is the fit's fault.
    return np.minimum.accumulate(errors, axis=1)


def _safe_gain(weight: np.ndarray, format: BinaryFormat) -> float:
    """A gain under which no scale that a fit can want leaves float16's range.

    Raises:
        ValueError: the weight does not suit the format, or is not finite.
    """
    gain = choose_gain(np.asarray(largest_magnitude(weight)))
    if len(weight) != format.planes[0]:
        raise ValueError(f"{format.label()} is for {format.planes[0]} rows, not {len(weight)}")
    return gain


@dataclasses.dataclass
class Fitted:
    """Groups with the best levels that were met so far.

    Attributes:
        codes: uint8 [R, G, S].
        scales: float16 [R, G, planes].
        offsets: float16 [R, G], 0 where there are none.
        losses: float64 [R, G], of what is stored.
    """

    codes: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray
    losses: np.ndarray


def fit_groups(
    values: np.ndarray,
    shares: np.ndarray | None,
    planes: int,
    *,
    offset: bool = False,
    fit: BinaryFit = BinaryFit.ALTERNATING,
    rounds: int = ROUNDS,
) -> Fitted:
    """The fit proper, on weights already cut into groups and in units of the gain.

    Args:
        values: float32 [R, G, S], finite.
        shares: float32 [G, S] from `group_importance`, or None for equal.
        planes: of each group.
        offset: whether groups have one.
        fit: see `BinaryFit`.
        rounds: of the alternation.
    """
    r, groups, size = values.shape
    flat = values.reshape(-1, size)
    counts = np.ones((1, size)) if shares is None else np.tile(shares.astype(np.float64), (r, 1))
    search = _Search(flat, np.broadcast_to(counts, flat.shape), planes, offset)
    if fit is BinaryFit.ALTERNATING:
        codes = search.alternate(rounds)
    else:
        codes = search.plane_by_plane(refine=fit is BinaryFit.REFINED)
    levels = search.best.astype(np.float16).reshape(r, groups, -1)
    offsets = levels[..., planes] if offset else np.zeros((r, groups), np.float16)
    losses = search.best_loss.reshape(r, groups)
    return Fitted(codes.reshape(values.shape), levels[..., :planes], offsets, losses)


@functools.cache
def signs_of(planes: int, offset: bool) -> np.ndarray:
    """What each code multiplies scales by, and a 1 for the offset: float64 [2**planes, planes (+ 1)]."""
    bits = np.arange(1 << planes)[:, None] >> np.arange(planes) & 1
    signs = 2.0 * bits - 1
    return np.concatenate([signs, np.ones((len(signs), 1))], axis=1) if offset else signs


def stored_levels(levels: np.ndarray) -> np.ndarray:
    """Scales and offsets float64 as what float16 makes of them."""
    rounded: np.ndarray = np.clip(levels, -_LARGEST_FLOAT16, _LARGEST_FLOAT16).astype(np.float16).astype(np.float64)
    return rounded


class _Line:
    """M groups of S values in rising order, summed up from the left: what lies between two levels is known at once."""

    def __init__(self, values: np.ndarray, counts: np.ndarray) -> None:
        self.order = np.argsort(values, axis=1)
        self.values = np.take_along_axis(values, self.order, axis=1)
        counts = np.take_along_axis(counts, self.order, axis=1)
        self.running = _running(counts), _running(counts * self.values)

    def ends(self, levels: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """How many values are nearest to each of the levels or one below: rising [A, L] of `rows` [A] to the same."""
        middles = (levels[:, 1:] + levels[:, :-1]) / 2
        size = self.values.shape[1]
        flat, first = self.values.ravel(), rows[:, None] * size - 1
        ends = np.zeros(levels.shape, np.int64)
        ends[:, -1] = size
        inner = ends[:, :-1]
        for power in reversed(range(size.bit_length())):
            probe = inner + (1 << power)
            below = flat.take(first + np.minimum(probe, size)) < middles
            np.copyto(inner, probe, where=(probe <= size) & below)
        return ends

    def sums(self, ends: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Importance and weighted values of each level's piece, [A, L]."""
        places = rows[:, None] * (self.values.shape[1] + 1) + ends
        counts, totals = (np.diff(running.ravel().take(places), axis=1, prepend=0) for running in self.running)
        return counts, totals

    def codes(self, ends: np.ndarray, code: np.ndarray) -> np.ndarray:
        """The code of its piece for each value, where it was before the sorting: [M, L] twice to uint8 [M, S]."""
        m, size = self.values.shape
        piece = np.zeros((m, size + 1), np.uint8)
        np.add.at(piece, (np.arange(m)[:, None], ends[:, :-1]), 1)
        piece = np.cumsum(piece[:, :size], axis=1, dtype=np.uint8)
        codes = np.empty((m, size), np.uint8)
        np.put_along_axis(codes, self.order, np.take_along_axis(code.astype(np.uint8), piece, axis=1), axis=1)
        return codes


class _Search:
    """M groups of S values, and the best scales and offset that each has met so far, [M, planes (+ 1)]."""

    def __init__(self, values: np.ndarray, counts: np.ndarray, planes: int, offset: bool) -> None:
        self.values = values
        self.counts = counts
        self.planes = planes
        self.offset = offset
        self.signs = signs_of(planes, offset)
        self.total = counts.sum(axis=1)
        self.squares = np.einsum("ms,ms,ms->m", counts, values, values)
        self.best = np.zeros((len(values), self.signs.shape[1]))
        self.best_loss = np.full(len(values), np.inf)

    def plane_by_plane(self, *, refine: bool) -> np.ndarray:
        """The greedy codes, uint8 [M, S], or the better of those and the refined ones."""
        codes, levels = self._greedy(refine=False)
        self._offer(levels, codes)
        if refine:
            refined, levels = self._greedy(refine=True)
            better = self._offer(levels, refined)
            codes[better] = refined[better]
        return codes

    def alternate(self, rounds: int) -> np.ndarray:
        """Nearest levels and least squares in turn, from every start; codes uint8 [M, S]."""
        line = _Line(self.values, self.counts)
        starts = [self._greedy(refine=refine)[1] for refine in (False, True)]
        if self.planes > 1:
            starts += [self._equal_steps(_GAUSSIAN_STEP[self.planes - 1] * step) for step in _STEPS]
        for start in starts:
            self._alternate_from(start, line, rounds)
        if rounds and self.planes > 2:
            self._alternate_from(self.best, line, _LAST_ROUNDS * rounds)
        rising, code = self._rising(self.best)
        return line.codes(line.ends(rising, np.arange(len(rising))), code)

    def _alternate_from(self, levels: np.ndarray, line: _Line, rounds: int) -> None:
        rows, lowest = np.arange(len(levels)), np.full(len(levels), np.inf)
        for _ in range(rounds + 1):
            levels = stored_levels(levels)
            rising, code = self._rising(levels)
            pieces = line.sums(line.ends(rising, rows), rows)
            counts, totals = np.empty(code.shape), np.empty(code.shape)
            for by_code, by_level in zip((counts, totals), pieces, strict=True):
                np.put_along_axis(by_code, code, by_level, axis=1)
            loss = self._keep(levels, counts, totals, rows)
            falling = loss < lowest * (1 - _LEAST_GAIN)
            rows, lowest = rows[falling], loss[falling]
            if not len(rows):
                return
            levels = _least_squares(counts[falling], totals[falling], self.signs)
            levels[:, : self.planes] = -np.sort(-np.abs(levels[:, : self.planes]), axis=1)

    def _greedy(self, *, refine: bool) -> tuple[np.ndarray, np.ndarray]:
        """Signs of what is left, plane by plane: codes uint8 [M, S] and stored levels."""
        levels = np.zeros_like(self.best)
        codes = np.zeros(self.values.shape, np.uint8)
        left = self.values.astype(np.float64)
        if self.offset:
            levels[:, -1] = (self.counts * left).sum(axis=1) / self.total
            left -= levels[:, -1:]
        for p in range(self.planes):
            plus = left >= 0
            codes |= plus.astype(np.uint8) << p
            levels[:, p] = (self.counts * np.abs(left)).sum(axis=1) / self.total
            if refine:
                signs = signs_of(p + 1, self.offset)
                found = _least_squares(*self._sums(codes, len(signs)), signs)
                levels[:, : p + 1] = found[:, : p + 1]
                levels[:, self.planes :] = found[:, p + 1 :]
                left = self.values - np.take_along_axis(found @ signs.T, codes, axis=1)
            else:
                left -= np.where(plus, levels[:, p, None], -levels[:, p, None])
        return codes, stored_levels(levels)

    def _equal_steps(self, step: float) -> np.ndarray:
        """Scales of equal steps, in root mean squares about the mean."""
        mean = (self.counts * self.values).sum(axis=1) / self.total if self.offset else np.zeros(len(self.values))
        spread = np.sqrt(np.maximum(self.squares / self.total - mean**2, 0))
        scales = spread[:, None] * step * 2.0 ** np.arange(self.planes - 2, -2, -1)
        return np.concatenate([scales, mean[:, None]], axis=1) if self.offset else scales

    def _rising(self, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What codes are worth, rising, and which codes they are: [A, planes (+ 1)] to [A, L] twice."""
        heights = levels @ self.signs.T
        code = np.argsort(heights, axis=1, kind="stable")
        return np.take_along_axis(heights, code, axis=1), code

    def _sums(self, codes: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
        """Importance and weighted values that fall to each code, [M, L]."""
        m = len(codes)
        index = (codes + np.arange(m)[:, None] * levels).ravel()
        counts = np.bincount(index, self.counts.ravel(), m * levels)
        totals = np.bincount(index, (self.counts * self.values).ravel(), m * levels)
        return counts.reshape(m, levels), totals.reshape(m, levels)

    def _offer(self, levels: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Keep stored levels with these codes where they lose less than the best so far; returns where, [M]."""
        before = self.best_loss.copy()
        better: np.ndarray = self._keep(levels, *self._sums(codes, len(self.signs)), np.arange(len(levels))) < before
        return better

    def _keep(self, levels: np.ndarray, counts: np.ndarray, totals: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The same for some rows, from sums; returns what they lose, [A]."""
        heights = levels @ self.signs.T
        loss: np.ndarray = self.squares[rows] + (heights * (heights * counts - 2 * totals)).sum(axis=1)
        better = loss < self.best_loss[rows]
        self.best[rows[better]], self.best_loss[rows[better]] = levels[better], loss[better]
        return loss


def _least_squares(counts: np.ndarray, totals: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Scales, and the offset, that suit codes best: importance and weighted values of codes to [A, planes (+ 1)]."""
    unknowns = signs.shape[1]
    products = (signs[:, :, None] * signs[:, None]).reshape(len(signs), -1)
    normal = (counts @ products).reshape(-1, unknowns, unknowns)
    normal[:, np.arange(unknowns), np.arange(unknowns)] += _RIDGE * counts.sum(axis=1)[:, None]
    solved: np.ndarray = np.linalg.solve(normal, (totals @ signs)[..., None])[..., 0]
    return solved


def _running(values: np.ndarray) -> np.ndarray:
    """Sums of the first 0, 1, ... of each row: float64 [M, S] to [M, S + 1]."""
    sums = np.zeros((len(values), values.shape[1] + 1))
    np.cumsum(values, axis=1, out=sums[:, 1:])
    return sums
