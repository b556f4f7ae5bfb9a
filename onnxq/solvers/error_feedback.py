"""Error feedback: inputs are rounded one after the other, and later ones make up for earlier errors.

With H = U D U^T the second moment of the inputs, U unit upper triangular and D diagonal, the proxy loss of a
row with error e is

    sum_j D[j] * (e[j] + sum_{i<j} e[i] U[i, j])**2

So input j is rounded from w[j] + sum_{i<j} e[i] U[i, j]. This is LDLQ, and the same as GPTQ, which writes it
with the inverse of H.

Sources: Frantar et al., GPTQ (arXiv 2210.17323); Chee et al., QuIP (arXiv 2307.13304), section 3.
"""

from __future__ import annotations

import dataclasses
import enum
import math

import numpy as np

from onnxq.errors import CalibrationError
from onnxq.formats.uniform import UniformEncoding, UniformFormat
from onnxq.solvers.grid import (
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
# Inputs that calibration never excited count as this share of a mean one, so that nothing divides by zero.
_LEAST_DIAGONAL = 1e-6
_STRONGEST_DAMPING = 10.0
_FACTOR_BLOCK = 256


class Order(enum.Enum):
    """In which order inputs are rounded. The layout of codes is always natural."""

    NATURAL = "natural"
    """As they lie. A group's grid is fitted when it is reached, to weights that carry the errors so far."""
    ACTIVATION = "activation"
    """Largest mean square first, while many can still make up for them. All grids are fitted before."""


def error_feedback(
    weight: np.ndarray,
    format: UniformFormat,
    second_moment: np.ndarray,
    *,
    damping: float = 0.01,
    block_size: int = 32,
    order: Order = Order.ACTIVATION,
    refit: bool = True,
    sweeps: int = 0,
) -> UniformEncoding:
    """Round a weight so that the output of its layer moves little.

    Memory: about 20 bytes for each of at most 2**23 elements at a time, the result, and K x K matrices: one
    in float64 and two in float32 while the factor is found, then two in float32.

    Args:
        weight: float [N, K].
        format: width, grouping and kind of zero point.
        second_moment: float [K, K], the mean of x x^T over inputs x. Its scale does not matter.
        damping: share of the mean diagonal that is added to the diagonal; raised tenfold for as long as the
            result is not positive definite.
        block_size: inputs that are rounded one by one between two matrix products. Changes the speed alone.
        order: see `Order`.
        refit: afterwards fit scales and zero points to the codes, under the whole second moment.
        sweeps: passes of coordinate descent over all codes that follow, each with a refit.

    Raises:
        ValueError: a shape does not fit, a value is not finite, or an option is out of range.
        CalibrationError: the second moment is not one: it stays indefinite however it is damped.
    """
    if damping < 0 or block_size < 1 or sweeps < 0:
        raise ValueError(f"{damping=} and {sweeps=} must not be negative, and {block_size=} must be 1 or more")
    gain = safe_gain(weight, format)
    n, k = weight.shape
    moment, factor, conditional, visit = _factorise(_checked(second_moment, k), damping, order)
    groups = format.groups(k)
    scales = np.zeros((n, groups), np.float16)
    zero_points = empty_zero_points(format, n, k)
    codes = np.empty((n, k), np.uint8)
    grid = None
    if order is Order.ACTIVATION:
        importance = np.empty(k)
        importance[visit] = conditional
        grid = search_grid(weight, format, importance)

    height = max(1, _BLOCK_ELEMENTS // k)
    for start in range(0, n, height):
        block = slice(start, start + height)
        values = np.ascontiguousarray(weight[block].T, np.float32) / np.float32(gain)
        feedback = _Feedback(values, format, factor, conditional, visit, block_size)
        if grid is None:
            feedback.visit_groups(0, groups)
        else:
            zeros = grid.zero_points if format.zero_point.shared else grid.zero_points[block]
            feedback.set_grid(grid.scales[block], zeros)
            feedback.visit_inputs(0, k)
        rows = feedback.rows
        if refit:
            refine(rows, format, moment, move_codes=False)
        for _ in range(sweeps):
            refine(rows, format, moment, move_codes=True)
        codes[block] = rows.codes.T
        scales[block] = rows.scales.T
        if not format.zero_point.shared:
            zero_points[block] = format.quantize_zero(rows.zeros.T)
    return UniformEncoding(format, codes, scales, zero_points, gain)


class _Feedback:
    """Some rows on their way to codes. Arrays are [K, R] in visiting order, save for those of `rows`.

    `wanted` holds, for the inputs still to come, the weights that would make up for the errors so far.
    """

    def __init__(
        self,
        values: np.ndarray,
        format: UniformFormat,
        factor: np.ndarray,
        conditional: np.ndarray,
        visit: np.ndarray,
        block_size: int,
    ) -> None:
        k, r = values.shape
        self.format = format
        self.size = format.effective_group(k)
        self.factor = factor
        self.conditional = conditional
        self.visit = visit
        self.block_size = block_size
        self.wanted = values[visit]
        self.errors = np.zeros_like(values)
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
        k = len(self.wanted)
        start, stop = first * self.size, min(last * self.size, k)
        if last - first == 1:
            self._find_grid(first, start, stop)
            self.visit_inputs(start, stop)
            return
        middle = (first + last) // 2
        self.visit_groups(first, middle)
        self._pass_on(start, middle * self.size, stop)
        self.visit_groups(middle, last)

    def visit_inputs(self, start: int, stop: int) -> None:
        """Round these inputs, counted in visiting order, on grids that are there."""
        if stop - start > self.block_size:
            middle = start + (stop - start) // 2
            self.visit_inputs(start, middle)
            self._pass_on(start, middle, stop)
            self.visit_inputs(middle, stop)
            return
        rows, top = self.rows, self.format.levels - 1
        for j in range(start, stop):
            wanted = self.wanted[j]
            if j > start:
                wanted = wanted + self.factor[start:j, j] @ self.errors[start:j]
            k = self.visit[j]
            scale, zero = rows.scales[k // self.size], rows.zeros[k // self.size]
            codes = nearest_codes(wanted, scale, zero, top)
            rows.codes[k] = codes
            self.errors[j] = rows.weight[k] - (codes - zero) * scale

    def _pass_on(self, start: int, middle: int, stop: int) -> None:
        """Let the inputs middle..stop know of the errors of start..middle."""
        self.wanted[middle:stop] += self.factor[start:middle, middle:stop].T @ self.errors[start:middle]

    def _find_grid(self, group: int, start: int, stop: int) -> None:
        alone = dataclasses.replace(self.format, group_size=None)
        shares = group_importance(self.conditional[start:stop], alone, stop - start)

        def solve(block: slice) -> None:
            values = into_groups(self.wanted[start:stop, block].T, alone, 1.0)
            scales, zero_points = fit_groups(values, shares, self.format)
            self.rows.scales[group, block] = scales[:, 0]
            self.rows.zeros[group, block] = self.format.zero_of(zero_points[:, 0])

        run_over_rows(solve, self.wanted.shape[1], stop - start)


def _checked(second_moment: np.ndarray, k: int) -> np.ndarray:
    if second_moment.shape != (k, k):
        raise ValueError(f"the second moment must be [K, K] = [{k}, {k}], not {list(second_moment.shape)}")
    if not (math.isfinite(second_moment.max()) and math.isfinite(second_moment.min())):
        raise ValueError("the second moment holds infinities or NaNs")
    return second_moment


def _factorise(
    second_moment: np.ndarray, damping: float, order: Order
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Damp, order and factor the second moment H, brought to a mean diagonal of about 1.

    Returns:
        damped H, float32 [K, K] in natural order; U, float32 [K, K] in visiting order, of which only what
        lies above the diagonal counts; D, float64 [K] in visiting order; the visiting order, int [K].
    """
    diagonal = np.diagonal(second_moment).astype(np.float64)
    mean = float(diagonal.mean())
    if mean <= 0:
        # Nothing ever reached this layer: every error costs the same.
        mean, diagonal, second_moment = 1.0, np.ones_like(diagonal), np.diag(np.ones_like(diagonal))
    natural = np.arange(len(diagonal))
    visit = np.argsort(-diagonal, kind="stable") if order is Order.ACTIVATION else natural
    while True:
        moment = (second_moment / mean).astype(np.float32)
        moment[natural, natural] = np.maximum(diagonal / mean, _LEAST_DIAGONAL) + damping
        try:
            factor = moment[np.ix_(visit, visit)].astype(np.float64)
            factorise_upper(factor)
            break
        except np.linalg.LinAlgError:
            damping = max(10 * damping, 1e-4)
        if damping > _STRONGEST_DAMPING:
            size = len(diagonal)
            raise CalibrationError(
                f"the second moment of the inputs, [{size}, {size}], is not positive definite even with "
                f"{_STRONGEST_DAMPING:g} times its mean diagonal added. It has to be the mean of x x^T over "
                "inputs x: gather the statistics again."
            )
    roots = np.diagonal(factor).copy()
    factor /= roots
    return moment, factor.astype(np.float32), roots**2, visit


def factorise_upper(matrix: np.ndarray) -> None:
    """Replace the upper triangle of a positive definite H by that of M, where H = M M^T.

    A blocked Cholesky factorisation from the last row up, in place since K x K may be large. What lies below
    the diagonal afterwards means nothing.

    Raises:
        numpy.linalg.LinAlgError: H is not positive definite.
    """
    for stop in range(len(matrix), 0, -_FACTOR_BLOCK):
        start = max(0, stop - _FACTOR_BLOCK)
        corner = np.linalg.cholesky(matrix[start:stop, start:stop][::-1, ::-1])[::-1, ::-1]
        matrix[start:stop, start:stop] = corner
        panel = np.linalg.solve(corner, matrix[:start, start:stop].T)
        matrix[:start, start:stop] = panel.T
        for above in range(0, start, _FACTOR_BLOCK):
            below = min(above + _FACTOR_BLOCK, start)
            matrix[above:below, above:start] -= panel[:, above:below].T @ panel[:, above:]
