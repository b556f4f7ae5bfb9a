"""Rounding to the codebook format: Viterbi along the outputs, error feedback along the inputs.

All outputs of one input cost alike under error feedback, so an input's column is coded as a whole: runs of outputs by
the Viterbi algorithm, with the error of each output weighed by its squared step. What error is left goes to the inputs
that follow, as in `onnxq.solvers.error_feedback`.
"""

from __future__ import annotations

import numpy as np

from onnxq.formats import packing
from onnxq.formats.codebook import CodebookEncoding, CodebookFormat
from onnxq.formats.uniform import round_scales
from onnxq.solvers.factor import Factor, Order, Recursion, factorise
from onnxq.solvers.grid import safe_gain
from onnxq.solvers.refine import Rows, refine
from onnxq.solvers.viterbi import closed_path

# Inputs that are rounded one by one between two matrix products.
_LEAF = 32
# Elements of the outputs that are coded together: about 20 bytes each, beside the K x K matrices.
_BLOCK_ELEMENTS = 1 << 24
# Costs that one call of the Viterbi algorithm gets when nothing is fed back.
_PATH_ELEMENTS = 1 << 22


def trellis_feedback(
    weight: np.ndarray,
    format: CodebookFormat,
    second_moment: np.ndarray | Factor,
    *,
    damping: float = 0.01,
    order: Order = Order.ACTIVATION,
    spread: float = 1.0,
    refit: bool = True,
    sweeps: int = 0,
) -> CodebookEncoding:
    """Round a weight so that the output of its layer moves little.

    Memory: about 20 bytes for each of at most 2**24 elements at a time, the result, and `factorise`'s matrices.

    Args:
        weight: float [N, K]; the tables are made for Gaussian rows, as frames give them.
        format: width, window and grouping.
        second_moment: float [K, K], the mean of x x^T over inputs x, whose scale does not matter; or its factor.
        damping: share of the mean diagonal that is added to the diagonal.
        order: in which order inputs are rounded.
        spread: steps in units of what suits the group's root mean square. Errors that are fed back widen what is
            rounded, the more so the more redundant a frame is.
        refit: afterwards fit scales to the codes, under the whole second moment.
        sweeps: passes of coordinate descent that follow: each input's column is coded anew, all others held, and steps
            are fitted again. Each takes as long as the first pass.

    Raises:
        ValueError: a shape does not fit, or a value is not finite.
        CalibrationError: see `factorise`.
    """
    n, k = weight.shape
    factor = second_moment
    if not isinstance(factor, Factor):
        factor = factorise(factor, k, damping, order)
    gain, scales = _scales(weight, format, spread)
    tiles = packing.ceil_div(n, packing.TILE_N)
    codes = np.empty((tiles * packing.TILE_N, k), np.uint8)
    lanes = max(1, _BLOCK_ELEMENTS // (tiles * k))
    for first in range(0, packing.TILE_N, lanes):
        rows = _rows(tiles, range(first, min(first + lanes, packing.TILE_N)))
        runs = _Runs(_take(weight, rows) / np.float32(gain), _take(scales, rows).astype(np.float32), format, tiles)
        real = rows < n
        runs.feed_back(factor)
        if refit:
            runs.refit(factor.moment, real)
        for _ in range(sweeps):
            runs.sweep(factor.moment)
            if refit:
                runs.refit(factor.moment, real)
        codes[rows] = runs.codes.T
        scales[rows[real]] = runs.units.T[real]
    return CodebookEncoding(format, codes, scales, gain)


def trellis_nearest(weight: np.ndarray, format: CodebookFormat, *, spread: float = 1.0) -> CodebookEncoding:
    """Round a weight for the least squared error in itself, without regard to inputs.

    Args:
        weight: float [N, K].
        format: width, window and grouping.
        spread: see `trellis_feedback`.

    Raises:
        ValueError: the weight is empty or not finite.
    """
    n, k = weight.shape
    gain, scales = _scales(weight, format, spread)
    tiles = packing.ceil_div(n, packing.TILE_N)
    rows = np.arange(tiles * packing.TILE_N)
    values, units = _take(weight, rows) / np.float32(gain), _take(scales, rows).astype(np.float32)
    codes = np.empty((len(rows), k), np.uint8)
    width = max(1, _PATH_ELEMENTS // (len(rows) << format.window))
    for start in range(0, k, width):
        columns = np.arange(start, min(start + width, k))
        unit = units[:, columns // format.effective_group(k)]
        index = _indices(values[:, columns].reshape(tiles, -1), unit.reshape(tiles, -1), format)
        codes[:, columns] = (index & _mask(format)).reshape(len(rows), -1)
    return CodebookEncoding(format, codes, scales, gain)


class _Runs:
    """Some runs of outputs: the rows [R] of every tile's same lanes, tile after tile."""

    def __init__(self, values: np.ndarray, units: np.ndarray, format: CodebookFormat, tiles: int) -> None:
        """Take values float32 [R, K] and steps float32 [R, G], both in units of the gain."""
        self.values = np.ascontiguousarray(values.T)
        self.units = np.ascontiguousarray(units.T)
        self.format = format
        self.tiles = tiles
        self.levels = np.empty_like(self.values)
        self.codes = np.empty(self.values.shape, np.uint8)

    def feed_back(self, factor: Factor) -> None:
        """Round all inputs in the factor's order."""

        def round_input(j: int, wanted: np.ndarray) -> np.ndarray:
            return self._round(int(factor.visit[j]), wanted)

        Recursion(self.values[factor.visit], factor, _LEAF).visit(0, len(self.values), round_input)

    def sweep(self, moment: np.ndarray) -> None:
        """Round every input anew, all others held.

        With H the moment, e the errors and r = H e, the best error of input j is e[j] - r[j] / H[j, j].
        """
        k, size = len(self.values), self.format.effective_group(len(self.values))
        errors = self.values - self.levels * np.repeat(self.units, size, axis=0)[:k]
        slopes = moment @ errors
        for start in range(0, k, _LEAF):
            stop = min(start + _LEAF, k)
            before = errors[start:stop].copy()
            for j in range(start, stop):
                rest = slopes[j] / moment[j, j] - errors[j]
                error = self._round(j, self.values[j] + rest)
                slopes[j:stop] += np.outer(moment[j:stop, j], error - errors[j])
                errors[j] = error
            slopes[stop:] += moment[stop:, start:stop] @ (errors[start:stop] - before)

    def refit(self, moment: np.ndarray, real: np.ndarray) -> None:
        """Fit the steps of the rows that are there to the codes."""
        zero = np.float32(self.format.levels.shared_zero())
        rows = Rows(
            weight=np.ascontiguousarray(self.values[:, real]),
            codes=np.ascontiguousarray(self.levels[:, real] + zero),
            scales=np.ascontiguousarray(self.units[:, real]),
            zeros=np.full((len(self.units), int(real.sum())), zero),
        )
        refine(rows, self.format.levels, moment, move_codes=False)
        self.units[:, real] = rows.scales

    def _round(self, column: int, wanted: np.ndarray) -> np.ndarray:
        """Code an input's column; the error that is left of its own values."""
        unit = self.units[column // self.format.effective_group(len(self.values))]
        index = _indices(wanted.reshape(self.tiles, -1), unit.reshape(self.tiles, -1), self.format).ravel()
        self.codes[column] = index & _mask(self.format)
        self.levels[column] = _levels(self.format)[index]
        error: np.ndarray = self.values[column] - self.levels[column] * unit
        return error


def _indices(wanted: np.ndarray, unit: np.ndarray, format: CodebookFormat) -> np.ndarray:
    """Table indices of the best closed paths: values and steps float32 [tiles, runs] to int64 [tiles, runs]."""
    costs = wanted[..., None] - unit[..., None] * _levels(format)
    np.square(costs, out=costs)
    return closed_path(costs, format.bits, format.window)


def _levels(format: CodebookFormat) -> np.ndarray:
    levels: np.ndarray = format.table.astype(np.float32) - np.float32(format.levels.shared_zero())
    return levels


def _mask(format: CodebookFormat) -> int:
    return (1 << format.bits) - 1


def _scales(weight: np.ndarray, format: CodebookFormat, spread: float) -> tuple[float, np.ndarray]:
    """Gain, and float16 scales [N, G] that suit the root mean square of each group."""
    gain = safe_gain(weight, format.levels)
    k = weight.shape[1]
    starts = np.arange(0, k, format.effective_group(k))
    energy = np.add.reduceat(np.square(weight, dtype=np.float64), starts, axis=1)
    rms = np.sqrt(energy / np.diff([*starts, k]))
    return gain, round_scales(rms * (spread * format.unit), gain)


def _rows(tiles: int, lanes: range) -> np.ndarray:
    rows: np.ndarray = (np.arange(tiles)[:, None] * packing.TILE_N + np.array(lanes)[None]).ravel()
    return rows


def _take(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """These rows as they are, and zeros for those behind the last; float32 from float."""
    taken = np.zeros((len(rows), values.shape[1]), np.float32)
    real = rows < len(values)
    taken[real] = values[rows[real]]
    return taken
