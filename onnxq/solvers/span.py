"""Grids by rule, for reproducing published methods: levels that span a row's range, or two of its standard deviations.

    min-max      scale = (max - min) / (2**bits - 1),        zero = -min / scale, rounded; zero is in the range
    two-sigma    scale = 2 sigma / ((2**bits - 1) / 2),      zero = (1 - mean / (2 sigma)) (2**bits - 1) / 2, rounded

The first is GPTQ's (arXiv 2210.17323), the second FrameQuant's (arXiv 2403.06082 and its released code, which clips the
weight to the two sigma as well). At 2 bits two-sigma steps are a third too wide for Gaussian weights, and whole zero
points leave the levels off centre: `onnxq.solvers.grid` searches better ones.
"""

from __future__ import annotations

import numpy as np

from onnxq.formats.uniform import UniformFormat, ZeroPoint, choose_gain, round_scales
from onnxq.solvers.grid import Grid

_REACH = 2.0


def min_max_grid(weight: np.ndarray, format: UniformFormat) -> Grid:
    """Levels from the least to the largest weight of each row.

    Args:
        weight: float [N, K].
        format: one group a row, with a whole zero point of its own.

    Raises:
        ValueError: the format has several groups a row, or another kind of zero point.
    """
    _check(weight, format)
    low = np.minimum(weight.min(axis=1, keepdims=True), 0).astype(np.float64)
    high = np.maximum(weight.max(axis=1, keepdims=True), 0).astype(np.float64)
    return _grid((high - low) / (format.levels - 1), -low, format)


def two_sigma_grid(weight: np.ndarray, format: UniformFormat) -> tuple[Grid, np.ndarray]:
    """Levels over two standard deviations about each row's mean, and the weight clipped to them.

    Args:
        weight: float [N, K].
        format: one group a row, with a whole zero point of its own.

    Returns:
        The grid, and float32 [N, K].

    Raises:
        ValueError: the format has several groups a row, or another kind of zero point.
    """
    _check(weight, format)
    mean = weight.mean(axis=1, keepdims=True, dtype=np.float64)
    reach = _REACH * weight.std(axis=1, keepdims=True, dtype=np.float64, ddof=1 if weight.shape[1] > 1 else 0)
    grid = _grid(2 * reach / (format.levels - 1), reach - mean, format)
    return grid, np.clip(weight, mean - reach, mean + reach).astype(np.float32)


def _grid(scales: np.ndarray, below_zero: np.ndarray, format: UniformFormat) -> Grid:
    gain = choose_gain(scales)
    with np.errstate(divide="ignore", invalid="ignore"):
        zeros = np.where(scales > 0, below_zero / scales, (format.levels - 1) / 2)
    return Grid(round_scales(scales, gain), format.quantize_zero(zeros), gain)


def _check(weight: np.ndarray, format: UniformFormat) -> None:
    if format.groups(weight.shape[1]) != 1 or format.zero_point is not ZeroPoint.PER_GROUP_INTEGER:
        raise ValueError(f"levels by rule need one group a row and per-group-integer zero points, not {format.label()}")
