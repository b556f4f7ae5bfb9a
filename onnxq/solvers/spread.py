"""How much wider steps should be under error feedback than under nearest rounding.

Errors that are fed back widen what is rounded: the more strongly inputs are correlated and the more redundant a frame
is, the more. Steps of least rounding error then clip, and clipping is what feedback cannot mend. The factor is searched
in the loop itself: some rows of the weight are rounded with wider and wider steps until the proxy loss rises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from onnxq.formats.codebook import CodebookFormat
from onnxq.formats.uniform import UniformFormat
from onnxq.solvers.error_feedback import error_feedback
from onnxq.solvers.factor import Factor
from onnxq.solvers.grid import Grid, search_grid
from onnxq.solvers.loss import relative_proxy_loss
from onnxq.solvers.trellis import trellis_feedback

_ROWS = 64
_TRELLIS_ROWS = 256
"""Runs of outputs go through tiles of 32: of 8 tiles, they are long enough to be like longer ones."""
_SPREADS = (1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0)
_LARGEST_FLOAT16 = 65504.0


def best_spread(weight: np.ndarray, format: UniformFormat | CodebookFormat, factor: Factor) -> float:
    """The factor on the steps of least rounding error under which error feedback loses least.

    Memory: a few copies of at most 256 rows.

    Args:
        weight: float [N, K].
        format: the levels.
        factor: of the inputs' second moment.
    """
    if isinstance(format, CodebookFormat):
        codebook, sample = format, _some_rows(weight, _TRELLIS_ROWS)
        return _search(
            sample,
            factor,
            lambda spread: trellis_feedback(sample, codebook, factor, spread=spread, refit=False).dequantize(),
        )
    uniform, sample = format, _some_rows(weight, _ROWS)
    grid = search_grid(sample, uniform, factor.importance())
    return _search(
        sample,
        factor,
        lambda spread: error_feedback(sample, uniform, factor, grid=widened(grid, spread), refit=False).dequantize(),
    )


def widened(grid: Grid, spread: float) -> Grid:
    """The grid with its steps multiplied; zero points stay where they are in steps."""
    scales = np.clip(grid.scales.astype(np.float32) * spread, -_LARGEST_FLOAT16, _LARGEST_FLOAT16)
    return dataclasses.replace(grid, scales=scales.astype(np.float16))


def _some_rows(weight: np.ndarray, count: int) -> np.ndarray:
    picked = np.unique(np.linspace(0, len(weight) - 1, min(len(weight), count)).astype(int))
    return np.ascontiguousarray(weight[picked])


def _search(sample: np.ndarray, factor: Factor, rounded: Callable[[float], np.ndarray]) -> float:
    best, least = 1.0, np.inf
    for spread in _SPREADS:
        loss = relative_proxy_loss(sample, rounded(spread), factor.moment)
        if loss >= least:
            break
        best, least = spread, loss
    return best
