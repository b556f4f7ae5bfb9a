"""Coordinate descent on the proxy loss: scales, zero points and codes, one at a time, all others held.

With the error e = w - v of a row and the second moment H of the inputs, the loss is e H e^T and its slope is
r = e H. Moving v by t along a direction d changes the loss by -2 t (d r^T) + t**2 (d H d^T), so that
t = (d r^T) / (d H d^T) is best. For a scale, d is its group's codes less their zero; for a zero point, minus
the scale on the whole group; for a code, the scale in one place. What is stored is rounded, and a move is
made only where the rounded one lowers the loss.

One pass costs a product [N, K] x [K, K]. Everything is transposed, [K, R] for a block of R rows, so that one
input of all rows lies together.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from onnxq.formats.uniform import UniformFormat
from onnxq.solvers.grid import nearest_codes

# Inputs whose codes are revisited one by one between two matrix products.
_LEAF = 32


@dataclasses.dataclass
class Rows:
    """Some rows of a weight on a grid, transposed and in units of the gain; solvers change it in place.

    Attributes:
        weight: float32 [K, R].
        codes: float32 [K, R], whole numbers.
        scales: float32 [G, R], each a float16 value.
        zeros: float32 [G, R], in steps, each one that the format can store.
    """

    weight: np.ndarray
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    def errors(self, format: UniformFormat) -> np.ndarray:
        """Weight less what the codes stand for, float32 [K, R]."""
        size = format.effective_group(len(self.weight))
        errors = np.empty_like(self.weight)
        for group, start in enumerate(range(0, len(errors), size)):
            stop = start + size
            levels = self.codes[start:stop] - self.zeros[group]
            errors[start:stop] = self.weight[start:stop] - levels * self.scales[group]
        return errors


def refine(rows: Rows, format: UniformFormat, moment: np.ndarray, *, move_codes: bool) -> None:
    """One pass over all groups: codes if asked for, then scales, then zero points where groups have them.

    Args:
        rows: changed in place; the loss of no row rises, up to float32 summation.
        format: the grid.
        moment: float32 [K, K], symmetric, with a positive diagonal.
        move_codes: whether codes move, or only scales and zero points.
    """
    slopes = moment @ rows.errors(format)
    _Pass(rows, format, moment, slopes, move_codes).visit(0, format.groups(len(slopes)))


@dataclasses.dataclass
class _Pass:
    """One pass; `slopes` hold for the groups still to come, and become the moves of those that are done."""

    rows: Rows
    format: UniformFormat
    moment: np.ndarray
    slopes: np.ndarray
    move_codes: bool

    def visit(self, first: int, last: int) -> None:
        """Refine these groups, halves of halves, so that what moved is passed on in large products."""
        size, k = self.format.effective_group(len(self.slopes)), len(self.slopes)
        start, stop = first * size, min(last * size, k)
        if last - first == 1:
            self.slopes[start:stop] = self._visit_group(first, slice(start, stop))
            return
        middle = (first + last) // 2
        self.visit(first, middle)
        moves = self.slopes[start : middle * size]
        self.slopes[middle * size : stop] -= self.moment[middle * size : stop, start : middle * size] @ moves
        self.visit(middle, last)

    def _visit_group(self, group: int, span: slice) -> np.ndarray:
        """Returns how far each level of the group moved, [S, R]."""
        moment, slopes = self.moment[span, span], self.slopes[span]
        moved = np.zeros_like(slopes)
        if self.move_codes:
            for start in range(0, len(slopes), _LEAF):
                leaf = slice(start, min(start + _LEAF, len(slopes)))
                codes = self.rows.codes[span][leaf]
                moved[leaf] = _move_codes(self.rows, self.format, moment[leaf, leaf], slopes[leaf], group, codes)
                slopes -= moment[:, leaf] @ moved[leaf]
        moved += _move_grid(self.rows, self.format, moment, slopes, group, span)
        return moved


def _move_codes(
    rows: Rows, format: UniformFormat, moment: np.ndarray, slopes: np.ndarray, group: int, codes: np.ndarray
) -> np.ndarray:
    """Give each weight of a leaf, [L, R] codes, its best code in turn; returns how far each level moved."""
    scale, zero, top = rows.scales[group], rows.zeros[group], format.levels - 1
    moved = np.zeros_like(slopes)
    for k in range(len(codes)):
        slope = slopes[k] - moment[k, :k] @ moved[:k] if k else slopes[k]
        # The value that this weight would like to have, the others staying as they are.
        level = (codes[k] - zero) * scale
        best = nearest_codes(level + slope / moment[k, k], scale, zero, top)
        best = np.where(scale == 0, codes[k], best)
        moved[k] = (best - codes[k]) * scale
        codes[k] = best
    return moved


def _move_grid(
    rows: Rows, format: UniformFormat, moment: np.ndarray, slopes: np.ndarray, group: int, span: slice
) -> np.ndarray:
    """Refit one group's scale and zero; returns how far its levels moved, [S, R]."""
    levels = rows.codes[span] - rows.zeros[group]
    image = moment @ levels
    pull = np.einsum("kr,kr->r", levels, slopes)
    stiffness = np.einsum("kr,kr->r", levels, image)
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = np.where(stiffness > 0, rows.scales[group] + pull / stiffness, rows.scales[group])
    change = np.clip(wanted, -65504, 65504).astype(np.float16).astype(np.float32) - rows.scales[group]
    change = np.where(change * (change * stiffness - 2 * pull) < 0, change, np.float32(0))
    rows.scales[group] += change
    moved: np.ndarray = levels * change
    if format.zero_point.shared:
        return moved
    slope = slopes.sum(axis=0) - change * image.sum(axis=0)
    scale, zero, total = rows.scales[group], rows.zeros[group], moment.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = np.where((scale != 0) & (total > 0), zero - slope / (scale * total), zero)
    stored = format.zero_of(format.quantize_zero(wanted))
    shift = (zero - stored) * scale
    better = shift * (shift * total - 2 * slope) < 0
    rows.zeros[group] = np.where(better, stored, zero)
    moved += np.where(better, shift, np.float32(0))
    return moved
