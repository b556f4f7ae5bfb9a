"""Search of the step, and of the zero point where each group has its own, that nearest rounding likes best.

Per group the search minimises

    sum_k importance[k] * (w[k] - scale * (code[k] - zero))**2
    code[k] = clip(round(w[k] / scale + zero), 0, 2**bits - 1)

1. Steps in geometric progression are tried, from the one that suits a Gaussian of the group's root mean
   square up to the one that reaches its largest magnitude. Each is replaced by the least-squares step of the
   codes it leads to.
2. The best is refined: steps between its neighbours, then rounding and least squares in turn.
3. Where groups have zero points, the same is done for ranges that shrink towards the middle of the group,
   with step and zero fitted together, and the better of 2 and 3 is kept: own zero points never lose to a
   shared one.

Losses are those of the float16 scale and the fixed-point zero that are stored, never of the ones wished for.
`INTEGER` levels reach one step further down than up, so a scale may be negative there to turn the long side
where it is needed. A group of zeros gets the scale 0. Rows are done a block at a time: beside the weight,
memory is a few MB a thread.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Callable
from typing import Protocol

import numpy as np

from onnxq.formats.uniform import UniformFormat, ZeroPoint, choose_gain

# Elements handled at a time: the temporaries of one block then stay in the second-level cache.
_BLOCK_ELEMENTS = 1 << 15
# Steps of the optimal uniform quantiser of a unit Gaussian, by bits (Max 1960); the search starts a little
# below.
_GAUSSIAN_STEP = (0.0, 1.596, 0.996, 0.586, 0.335, 0.188, 0.104, 0.0569, 0.0308)
_SEARCH_BELOW = 0.75
_COARSE_STEPS = 12
_REFINING_STEPS = (0.94, 0.97, 1.03, 1.06)
_LEAST_SQUARES_ROUNDS = 3
_RANGE_STEPS = 8
_LARGEST_FLOAT16 = 65504.0


class Grouping(Protocol):
    """What is asked here of any format whose weights share scales in groups along K."""

    def effective_group(self, k: int) -> int:
        """See `UniformFormat.effective_group`."""
        ...

    def groups(self, k: int) -> int:
        """See `UniformFormat.groups`."""
        ...


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the levels of every group lie.

    Attributes:
        scales: float16 [N, G].
        zero_points: uint8 fixed point, [N, G], or [1, 1] when the format shares one.
        gain: power of two that multiplies every scale.
    """

    scales: np.ndarray
    zero_points: np.ndarray
    gain: float


def search_grid(weight: np.ndarray, format: UniformFormat, importance: np.ndarray | None = None) -> Grid:
    """The grid of least weighted squared error under nearest rounding.

    Args:
        weight: float [N, K].
        format: width, grouping and kind of zero point.
        importance: float [K], not negative: what a squared error costs per input, mean x**2 as a rule. None
            means equal. A group whose inputs are all of importance 0 is fitted as if they were equal.

    Raises:
        ValueError: a shape does not fit, a value is not finite, or an importance is negative.
    """
    gain = safe_gain(weight, format)
    n, k = weight.shape
    if format.one_scale:
        # One long row: the same search, with all weights in one group.
        alone = dataclasses.replace(format, one_scale=False)
        tiled = None if importance is None else np.tile(importance, n)
        grid = search_grid(weight.reshape(1, -1), alone, tiled)
        return dataclasses.replace(grid, scales=np.repeat(grid.scales, n, axis=0))
    shares = group_importance(importance, format, k)
    scales = np.zeros((n, format.groups(k)), np.float16)
    zero_points = empty_zero_points(format, n, k)

    def solve(rows: slice) -> None:
        scales[rows], zeros = fit_groups(into_groups(weight[rows], format, gain), shares, format)
        if not format.zero_point.shared:
            zero_points[rows] = zeros

    run_over_rows(solve, n, k)
    return Grid(scales, zero_points, gain)


def round_to_grid(weight: np.ndarray, format: UniformFormat, grid: Grid) -> np.ndarray:
    """Codes of the levels nearest to a weight: float [N, K] -> uint8 [N, K]."""
    n, k = weight.shape
    size = format.effective_group(k)
    zeros = format.zero_of(grid.zero_points)
    codes = np.empty((n, k), np.uint8)

    def solve(rows: slice) -> None:
        step = np.repeat(grid.scales[rows].astype(np.float32), size, axis=1)[:, :k]
        zero = zeros if format.zero_point.shared else np.repeat(zeros[rows], size, axis=1)[:, :k]
        values = weight[rows].astype(np.float32) / np.float32(grid.gain)
        codes[rows] = nearest_codes(values, step, zero, format.levels - 1)

    run_over_rows(solve, n, k)
    return codes


def nearest_codes(values: np.ndarray, step: np.ndarray, zero: np.ndarray, top: int) -> np.ndarray:
    """Codes 0..top as float32; a step of 0 gives the code next to the zero. Arguments broadcast."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        codes: np.ndarray = values / step
    if not np.all(step):
        codes = np.where(step == 0, np.float32(0), codes)
    codes += zero
    np.rint(codes, out=codes)
    np.clip(codes, 0, top, out=codes)
    return codes


def fit_groups(values: np.ndarray, shares: np.ndarray | None, format: UniformFormat) -> tuple[np.ndarray, np.ndarray]:
    """The search proper, on weights already cut into groups and in units of the gain.

    Args:
        values: float32 [R, G, S], finite.
        shares: float32 [G, S] from `group_importance`, or None for equal.
        format: width and kind of zero point.

    Returns:
        float16 scales [R, G] and uint8 fixed-point zero points [R, G] (the same everywhere when shared).
    """
    search = _Search(values, shares, format)
    symmetric = ZeroPoint.INTEGER if format.zero_point.whole else ZeroPoint.MIDRISE
    shared = dataclasses.replace(format, zero_point=symmetric)
    search.shared_zero(float(shared.zero_of(shared.quantize_zero(shared.shared_zero()))))
    if not format.zero_point.shared:
        search.own_zeros()
    return search.best_step.astype(np.float16), format.quantize_zero(search.best_zero)


class _Search:
    """Values of some groups, and the best step and zero that each has met so far."""

    def __init__(self, values: np.ndarray, shares: np.ndarray | None, format: UniformFormat) -> None:
        self.values = values
        self.shares = shares
        self.format = format
        self.top = format.levels - 1
        shape = values.shape[:2]
        # A step of 0 is what a group of zeros keeps; its loss is that of a weight set to zero.
        self.best_step = np.zeros(shape, np.float32)
        self.best_zero = np.full(shape, format.zero_of(format.quantize_zero(self.top / 2)), np.float32)
        self.best_loss = self._dot(values, values)

    def shared_zero(self, zero: float) -> None:
        """Rules 1 and 2 with one zero for all."""
        zeros = np.full(self.best_step.shape, zero, np.float32)
        self.best_zero[...] = zeros
        highest, lowest = self.values.max(axis=2), self.values.min(axis=2)
        above, below = np.float32(self.top - zero), np.float32(zero)
        # With one bit and an integer zero there is no level above zero, so only one side counts.
        if above > 0:
            reach = np.maximum(np.maximum(highest, 0) / above, np.maximum(-lowest, 0) / below)
        else:
            reach = np.maximum(-lowest, 0) / below
        self._steps(reach, zeros)
        if above != below:
            turned = np.maximum(-lowest, 0) / above if above > 0 else np.zeros_like(reach)
            self._steps(-np.maximum(turned, np.maximum(highest, 0) / below), zeros)
        # Constant groups are exact on the levels next to zero, where no division rounds.
        nearest_level = 1.0 if zero.is_integer() else 0.5
        self._try_step(np.maximum(np.abs(highest), np.abs(lowest)) / np.float32(nearest_level), zeros)
        self._refine()

    def _steps(self, reach: np.ndarray, zeros: np.ndarray) -> None:
        magnitude = np.abs(reach)
        rms = np.sqrt(self._dot(self.values, self.values) / self._total())
        small = np.minimum(magnitude, rms * np.float32(_SEARCH_BELOW * _GAUSSIAN_STEP[self.format.bits]))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(small > 0, reach / small, 0)
        for i in range(_COARSE_STEPS):
            share = i / (_COARSE_STEPS - 1)
            self._try_step(small * np.sign(ratio) * np.abs(ratio) ** np.float32(share), zeros)

    def _refine(self) -> None:
        centre = self.best_step.copy()
        for factor in _REFINING_STEPS:
            self._try_step(centre * np.float32(factor), self.best_zero)
        for _ in range(_LEAST_SQUARES_ROUNDS):
            self._try_step(self.best_step, self.best_zero)

    def own_zeros(self) -> None:
        """Rule 3."""
        # Zero has to lie on the grid's stretch, since stored zeros do.
        highest, lowest = np.maximum(self.values.max(axis=2), 0), np.minimum(self.values.min(axis=2), 0)
        middle = (highest + lowest) / 2
        half = (highest - lowest) / 2
        for share in np.linspace(1.0, 0.35 if self.format.bits <= 4 else 0.7, _RANGE_STEPS, dtype=np.float32):
            self._try_line(2 * share * half / self.top, middle)
        for _ in range(_LEAST_SQUARES_ROUNDS):
            self._try_line(self.best_step, (self.top / 2 - self.best_zero) * self.best_step)
        self._refine()

    def _try_line(self, step: np.ndarray, middle: np.ndarray) -> None:
        """Levels of this step about this middle, then the line through values over codes."""
        with np.errstate(divide="ignore", invalid="ignore"):
            zero = np.where(step == 0, self.top / 2, self.top / 2 - middle / step).astype(np.float32)
        codes = nearest_codes(self.values, step[..., None], zero[..., None], self.top)
        total = self._total()
        mean_value = self._sum(self.values) / total
        mean_code = self._sum(codes) / total
        codes -= mean_code[..., None]
        spread = self._dot(codes, codes)
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = self._dot(codes, self.values) / spread
            zero = mean_code - mean_value / slope
        good = np.isfinite(zero) & (slope > 0)
        zero = np.where(good, zero, self.best_zero)
        slope = np.where(good, slope, self.best_step)
        self._try_step(slope, self.format.zero_of(self.format.quantize_zero(zero)))

    def _try_step(self, step: np.ndarray, zero: np.ndarray) -> None:
        """Round, refit the step to the codes, keep where that beats the best so far."""
        levels = nearest_codes(self.values, step[..., None], zero[..., None], self.top)
        levels -= zero[..., None]
        length = self._dot(levels, levels)
        with np.errstate(divide="ignore", invalid="ignore"):
            step = np.where(length > 0, self._dot(levels, self.values) / length, 0)
        step = np.clip(step, -_LARGEST_FLOAT16, _LARGEST_FLOAT16).astype(np.float16).astype(np.float32)
        levels *= step[..., None]
        np.subtract(self.values, levels, out=levels)
        loss = self._dot(levels, levels)
        better = loss < self.best_loss
        self.best_loss = np.where(better, loss, self.best_loss)
        self.best_step = np.where(better, step, self.best_step)
        self.best_zero = np.where(better, zero, self.best_zero)

    def _dot(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        weighted = left if self.shares is None else left * self.shares
        products: np.ndarray = np.einsum("rgs,rgs->rg", weighted, right)
        return products

    def _sum(self, values: np.ndarray) -> np.ndarray:
        sums: np.ndarray = values.sum(axis=2) if self.shares is None else np.einsum("rgs,gs->rg", values, self.shares)
        return sums

    def _total(self) -> np.ndarray | float:
        return float(self.values.shape[2]) if self.shares is None else self.shares.sum(axis=1)


def safe_gain(weight: np.ndarray, format: UniformFormat) -> float:
    """A gain under which no step that a search can want leaves float16's range.

    Raises:
        ValueError: see `largest_magnitude`.
    """
    # The coarsest sensible grid puts the largest weight on the level nearest to zero.
    reach = largest_magnitude(weight) * (2 if format.zero_point is ZeroPoint.MIDRISE else 1)
    return choose_gain(np.asarray(reach))


def largest_magnitude(weight: np.ndarray) -> float:
    """Of a weight [N, K].

    Raises:
        ValueError: it is no matrix, is empty, or holds infinities or NaNs.
    """
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"a weight must be a matrix [N, K] with elements in it, not {list(weight.shape)}")
    largest = max(float(weight.max()), -float(weight.min()))
    if not math.isfinite(largest):
        raise ValueError("the weight holds infinities or NaNs, which no grid can store")
    return largest


def empty_zero_points(format: UniformFormat, n: int, k: int) -> np.ndarray:
    """uint8: the one zero point [1, 1] of a format that shares it, else zeros [N, G] to be filled in."""
    if format.zero_point.shared:
        return format.quantize_zero(format.shared_zero()).reshape(1, 1)
    return np.zeros((n, format.groups(k)), np.uint8)


def into_groups(weight: np.ndarray, format: Grouping, gain: float) -> np.ndarray:
    """Rows [R, K] as float32 [R, G, S] in units of the gain; a ragged last group is filled with its edge."""
    rows, k = weight.shape
    size = format.effective_group(k)
    values = weight.astype(np.float32) / np.float32(gain)
    missing = format.groups(k) * size - k
    if missing:
        values = np.pad(values, ((0, 0), (0, missing)), mode="edge")
    groups: np.ndarray = values.reshape(rows, -1, size)
    return groups


def group_importance(importance: np.ndarray | None, format: Grouping, k: int) -> np.ndarray | None:
    """Importance [K] as float32 [G, S] of mean 1 in each group, 0 where a ragged group is filled up.

    Raises:
        ValueError: the length does not fit, or a value is not finite or negative.
    """
    size, groups = format.effective_group(k), format.groups(k)
    if importance is None:
        if k == groups * size:
            return None
        importance = np.ones(k)
    if importance.shape != (k,):
        raise ValueError(f"importance must be [K] = [{k}], not {list(importance.shape)}")
    if not np.isfinite(importance).all() or (importance < 0).any():
        raise ValueError("importance must be finite and not negative: it is a mean of squares")
    filler = groups * size - k
    shares = np.pad(importance.astype(np.float64), (0, filler)).reshape(groups, size)
    equal = np.pad(np.ones(k), (0, filler)).reshape(groups, size)
    grouped = np.where(shares.any(axis=1, keepdims=True), shares, equal)
    grouped /= grouped.mean(axis=1, keepdims=True)
    return grouped.astype(np.float32)


def run_over_rows(solve: Callable[[slice], None], n: int, k: int) -> None:
    """Call solve on blocks of rows, on every core: most of what it does is numpy, which runs side by side."""
    rows = max(1, _BLOCK_ELEMENTS // k)
    blocks = [slice(start, min(start + rows, n)) for start in range(0, n, rows)]
    workers = min(len(blocks), os.cpu_count() or 1)
    if workers == 1:
        for block in blocks:
            solve(block)
        return
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(solve, blocks):
            pass
