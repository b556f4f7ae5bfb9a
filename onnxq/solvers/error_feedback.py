"""Error feedback: inputs are rounded one after the other, and later ones make up for earlier errors.

The recursion and its sources are in `onnxq.solvers.factor`; here it meets the uniform grid.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from onnxq.formats.uniform import UniformEncoding, UniformFormat
from onnxq.solvers.factor import Factor, Order, Recursion, factorise
from onnxq.solvers.grid import (
    Grid,
    empty_zero_points,
    fit_groups,
    group_importance,
    into_groups,
    nearest_codes,
    run_over_rows,
    safe_gain,
    search_grid,
)
from onnxq.solvers.refine import Rows, refine

# Elements of the rows that are solved together: about 20 bytes each, beside the K x K matrices.
_BLOCK_ELEMENTS = 1 << 23


def error_feedback(
    weight: np.ndarray,
    format: UniformFormat,
    second_moment: np.ndarray | Factor,
    *,
    damping: float = 0.01,
    block_size: int = 32,
    order: Order = Order.ACTIVATION,
    grid: Grid | None = None,
    refit: bool = True,
    sweeps: int = 0,
) -> UniformEncoding:
    """Round a weight so that the output of its layer moves little.

    Memory: about 20 bytes for each of at most 2**23 elements at a time, the result, and K x K matrices: one
    in float64 and two in float32 while the factor is found, then two in float32.

    Args:
        weight: float [N, K].
        format: width, grouping and kind of zero point.
        second_moment: float [K, K], the mean of x x^T over inputs x, whose scale does not matter; or its factor, which
            weights that read the same inputs may share, and which damping and order are part of.
        damping: share of the mean diagonal that is added to the diagonal; raised tenfold for as long as the
            result is not positive definite.
        block_size: inputs that are rounded one by one between two matrix products. Changes the speed alone.
        order: see `Order`.
        grid: levels found before; None searches them.
        refit: afterwards fit scales and zero points to the codes, under the whole second moment.
        sweeps: passes of coordinate descent over all codes that follow, each with a refit.

    Raises:
        ValueError: a shape does not fit, a value is not finite, or an option is out of range.
        CalibrationError: the second moment is not one: it stays indefinite however it is damped.
    """
    if damping < 0 or block_size < 1 or sweeps < 0:
        raise ValueError(f"{damping=} and {sweeps=} must not be negative, and {block_size=} must be 1 or more")
    gain = safe_gain(weight, format) if grid is None else grid.gain
    n, k = weight.shape
    factor = second_moment
    if not isinstance(factor, Factor):
        factor = factorise(factor, k, damping, order)
    groups = format.groups(k)
    scales = np.zeros((n, groups), np.float16)
    zero_points = empty_zero_points(format, n, k)
    codes = np.empty((n, k), np.uint8)
    if grid is None and order is Order.ACTIVATION:
        grid = search_grid(weight, format, factor.importance())

    height = max(1, _BLOCK_ELEMENTS // k)
    for start in range(0, n, height):
        block = slice(start, start + height)
        values = np.ascontiguousarray(weight[block].T, np.float32) / np.float32(gain)
        feedback = _Feedback(values, format, factor, block_size)
        if grid is None:
            feedback.visit_groups(0, groups)
        else:
            zeros = grid.zero_points if format.zero_point.shared else grid.zero_points[block]
            feedback.set_grid(grid.scales[block], zeros)
            feedback.visit_inputs(0, k)
        rows = feedback.rows
        if refit:
            refine(rows, format, factor.moment, move_codes=False)
        for _ in range(sweeps):
            refine(rows, format, factor.moment, move_codes=True)
        codes[block] = rows.codes.T
        scales[block] = rows.scales.T
        if not format.zero_point.shared:
            zero_points[block] = format.quantize_zero(rows.zeros.T)
    return UniformEncoding(format, codes, scales, zero_points, gain)


class _Feedback:
    """Some rows on their way to codes. Arrays are [K, R] in visiting order, save for those of `rows`."""

    def __init__(self, values: np.ndarray, format: UniformFormat, factor: Factor, block_size: int) -> None:
        k, r = values.shape
        self.format = format
        self.size = format.effective_group(k)
        self.visit_order = factor.visit
        self.conditional = factor.conditional
        self.recursion = Recursion(values[factor.visit], factor, block_size)
        groups = format.groups(k)
        shared = format.shared_zero() if format.zero_point.shared else 0.0
        zero = format.zero_of(format.quantize_zero(shared))
        self.rows = Rows(
            weight=values,
            codes=np.empty_like(values),
            scales=np.zeros((groups, r), np.float32),
            zeros=np.full((groups, r), zero, np.float32),
        )

    def set_grid(self, scales: np.ndarray, zero_points: np.ndarray) -> None:
        """Take a grid found before: float16 [R, G] and uint8 [R, G] or [1, 1]."""
        self.rows.scales[...] = scales.T
        self.rows.zeros[...] = self.format.zero_of(zero_points).T

    def visit_groups(self, first: int, last: int) -> None:
        """Round these groups, in natural order, finding the grid of each when its turn comes."""
        k = len(self.visit_order)
        start, stop = first * self.size, min(last * self.size, k)
        if last - first == 1:
            self._find_grid(first, start, stop)
            self.visit_inputs(start, stop)
            return
        middle = (first + last) // 2
        self.visit_groups(first, middle)
        self.recursion.pass_on(start, middle * self.size, stop)
        self.visit_groups(middle, last)

    def visit_inputs(self, start: int, stop: int) -> None:
        """Round these inputs, counted in visiting order, on grids that are there."""
        self.recursion.visit(start, stop, self._round)

    def _round(self, j: int, wanted: np.ndarray) -> np.ndarray:
        rows, k = self.rows, self.visit_order[j]
        scale, zero = rows.scales[k // self.size], rows.zeros[k // self.size]
        codes = nearest_codes(wanted, scale, zero, self.format.levels - 1)
        rows.codes[k] = codes
        error: np.ndarray = rows.weight[k] - (codes - zero) * scale
        return error

    def _find_grid(self, group: int, start: int, stop: int) -> None:
        alone = dataclasses.replace(self.format, group_size=None)
        shares = group_importance(self.conditional[start:stop], alone, stop - start)

        def solve(block: slice) -> None:
            values = into_groups(self.recursion.wanted[start:stop, block].T, alone, 1.0)
            scales, zero_points = fit_groups(values, shares, self.format)
            self.rows.scales[group, block] = scales[:, 0]
            self.rows.zeros[group, block] = self.format.zero_of(zero_points[:, 0])

        run_over_rows(solve, self.recursion.wanted.shape[1], stop - start)
