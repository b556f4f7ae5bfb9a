"""Nearest rounding: every weight to the level next to it, on the grid that likes it best."""

from __future__ import annotations

import numpy as np

from onnxq.formats.uniform import UniformEncoding, UniformFormat
from onnxq.solvers.grid import Grid, round_to_grid, search_grid


def nearest(
    weight: np.ndarray, format: UniformFormat, importance: np.ndarray | None = None, *, grid: Grid | None = None
) -> UniformEncoding:
    """Round a weight to the nearest levels of the grid with the least weighted squared error.

    This is also the solver of tables: how often a row is looked up scales its whole error and moves no
    optimum.

    Args:
        weight: float [N, K].
        format: width, grouping and kind of zero point.
        importance: float [K], the diagonal of the inputs' second moment; None means equal.
        grid: levels found before; None searches them.

    Raises:
        ValueError: see `search_grid`.
    """
    if grid is None:
        grid = search_grid(weight, format, importance)
    return UniformEncoding(format, round_to_grid(weight, format, grid), grid.scales, grid.zero_points, grid.gain)
