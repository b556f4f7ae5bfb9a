"""Error feedback for binary codes: inputs are rounded one after the other to levels that are there before.

1. Every group gets levels of its own (`onnxq.solvers.binary`), inputs weighted by what no later input makes up for.
2. Inputs are rounded to the nearest of their group's levels, and those behind make up for the errors
   (`onnxq.solvers.factor`).
3. Scales and offsets are fitted to the codes, under the whole second moment, group by group.

2 and 3 may be repeated on the fitted levels. Each row keeps what it lost least with, the fit of 1 included.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from onnxq.formats.binary import BinaryEncoding, BinaryFormat
from onnxq.solvers.binary import binary_codes, signs_of, stored_levels
from onnxq.solvers.factor import Factor, Order, Recursion, factorise

# Elements of the rows that are solved together.
_BLOCK_ELEMENTS = 1 << 22
_LEAF = 32
_RIDGE = 1e-6
"""Share of the mean stiffness that keeps equal planes apart."""


def binary_feedback(
    weight: np.ndarray,
    format: BinaryFormat,
    second_moment: np.ndarray | Factor,
    *,
    rows: np.ndarray | None = None,
    damping: float = 0.01,
    order: Order = Order.ACTIVATION,
    rounds: int = 2,
) -> BinaryEncoding:
    """Round a weight so that the output of its layer moves little.

    Memory: beside the result and its first fit, 20 bytes and 8 more for each plane, for each of at most 2**22 elements
    at a time; and K x K matrices, as of `onnxq.solvers.error_feedback`.

    Args:
        weight: float [N, K].
        format: planes of rows, grouping, offsets.
        second_moment: float [K, K], the mean of x x^T over inputs x, whose scale does not matter; or its factor, which
            damping and order are part of.
        rows: int [N], those of the weight in the order in which they are stored; None for natural.
        damping: as of `error_feedback`.
        order: see `Order`. All levels are fitted before, whatever the order.
        rounds: passes through the inputs, each with levels fitted to the one before.

    Raises:
        ValueError: a shape does not fit, a value is not finite, or an option is out of range.
        CalibrationError: the second moment is not one: it stays indefinite however it is damped.
    """
    if damping < 0 or rounds < 1:
        raise ValueError(f"{damping=} must not be negative, and {rounds=} must be 1 or more")
    k = weight.shape[1]
    factor = second_moment if isinstance(second_moment, Factor) else factorise(second_moment, k, damping, order)
    first = binary_codes(weight, format, factor.importance(), rows=rows)
    codes, scales = first.codes.copy(), first.scales.copy()
    offsets = None if first.offsets is None else first.offsets.copy()
    source = np.arange(len(weight)) if rows is None else rows
    height = max(1, _BLOCK_ELEMENTS // k)
    for planes, run in format.runs():
        for start in range(run.start, run.stop, height):
            stored = slice(start, min(start + height, run.stop))
            values = weight[source[stored]].T.astype(np.float32) / np.float32(first.gain)
            # Levels go with groups first and rows last.
            levels = scales[:planes, stored].transpose(2, 0, 1)
            if offsets is not None:
                levels = np.concatenate([levels, offsets[stored].T[:, None]], axis=1)
            block = _Block(values, codes[stored].T, levels.astype(np.float32), planes, format.effective_group(k))
            for _ in range(rounds):
                block.feed_back(factor)
            codes[stored] = block.best_codes.T
            scales[:planes, stored] = block.best_levels[:, :planes].transpose(1, 2, 0)
            if offsets is not None:
                offsets[stored] = block.best_levels[:, planes].T
    return dataclasses.replace(first, codes=codes, scales=scales, offsets=offsets)


class _Block:
    """Some rows with as many planes: values, codes [K, R] and levels [G, planes (+ 1), R]; and the best of both."""

    def __init__(self, values: np.ndarray, codes: np.ndarray, levels: np.ndarray, planes: int, size: int) -> None:
        self.values = np.ascontiguousarray(values)
        self.signs = signs_of(planes, levels.shape[1] > planes).astype(np.float32)
        self.planes = planes
        self.size = size
        self.codes = np.ascontiguousarray(codes)
        self.levels = levels
        self.best_codes, self.best_levels = self.codes.copy(), levels.copy()
        self.best_loss: np.ndarray | None = None

    def feed_back(self, factor: Factor) -> None:
        """One pass through the inputs on the present levels, then levels that suit its codes."""
        if self.best_loss is None:
            self.best_loss = self._losses(factor.moment @ self._errors())
        heights = self._heights()
        code = np.argsort(heights, axis=1, kind="stable")
        heights = np.take_along_axis(heights, code, axis=1)
        middles = (heights[:, 1:] + heights[:, :-1]) / 2
        lane = np.arange(self.values.shape[1])

        def round_input(j: int, wanted: np.ndarray) -> np.ndarray:
            k = int(factor.visit[j])
            g = k // self.size
            index = np.zeros(len(wanted), np.int64)
            for power in reversed(range(self.planes)):
                probe = index + (1 << power)
                index = np.where(middles[g, probe - 1, lane] < wanted, probe, index)
            self.codes[k] = code[g, index, lane]
            error: np.ndarray = self.values[k] - heights[g, index, lane]
            return error

        Recursion(self.values[factor.visit], factor, _LEAF).visit(0, len(self.values), round_input)
        losses = self._refit(factor.moment)
        better = losses < self.best_loss
        self.best_loss[better] = losses[better]
        self.best_codes[:, better] = self.codes[:, better]
        self.best_levels[:, :, better] = self.levels[:, :, better]

    def _spans(self) -> list[slice]:
        """The inputs of each group."""
        return [slice(start, start + self.size) for start in range(0, len(self.values), self.size)]

    def _heights(self) -> np.ndarray:
        """What each code is worth, float32 [G, 2**planes, R]."""
        heights: np.ndarray = np.einsum("lu,gur->glr", self.signs, self.levels)
        return heights

    def _errors(self) -> np.ndarray:
        """Values less what codes are worth, float32 [K, R]."""
        errors: np.ndarray = self.values.copy()
        for span, heights in zip(self._spans(), self._heights(), strict=True):
            errors[span] -= np.take_along_axis(heights, self.codes[span], axis=0)
        return errors

    def _losses(self, slopes: np.ndarray) -> np.ndarray:
        """The proxy loss of each row, float64 [R], from the moment's image of its errors."""
        losses: np.ndarray = np.einsum("kr,kr->r", self._errors(), slopes, dtype=np.float64)
        return losses

    def _refit(self, moment: np.ndarray) -> np.ndarray:
        """Fit the levels of each group to its codes, the others held; returns the losses of rows, float64 [R]."""
        slopes = moment @ self._errors()
        for g, span in enumerate(self._spans()):
            signs = np.moveaxis(self.signs[self.codes[span]], 2, 0)  # [U, S, R]
            image = np.stack([moment[span, span] @ sign for sign in signs])
            pull = np.einsum("usr,sr->ru", signs, slopes[span], dtype=np.float64)
            stiffness = np.empty((signs.shape[2], len(signs), len(signs)))
            for u, v in np.ndindex(len(signs), len(signs)):
                stiffness[:, u, v] = np.einsum("sr,sr->r", signs[u], image[v]) if u <= v else stiffness[:, v, u]
            ridge = _RIDGE * np.einsum("ruu->r", stiffness)[:, None, None] * np.eye(len(signs)) / len(signs)
            wanted = np.linalg.solve(stiffness + ridge, pull[..., None])[..., 0]
            change = stored_levels(self.levels[g].T + wanted) - self.levels[g].T
            gain = np.einsum("ru,ruv,rv->r", change, stiffness, change) - 2 * np.einsum("ru,ru->r", change, pull)
            change = np.where((gain < 0)[:, None], change, 0).astype(np.float32)
            self.levels[g] += change.T
            slopes -= moment[:, span] @ np.einsum("usr,ru->sr", signs, change)
        return self._losses(moment @ self._errors())
