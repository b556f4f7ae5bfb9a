"""Levels by rule, against the published formulas."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.formats.uniform import UniformFormat, ZeroPoint
from onnxq.solvers.grid import Grid
from onnxq.solvers.span import min_max_grid, two_sigma_grid
from tests.solvers.cases import gaussian

HALF = 2.0**-11
"""Relative rounding of a float16 scale."""


def column(bits: int) -> UniformFormat:
    return UniformFormat(bits, None, ZeroPoint.PER_GROUP_INTEGER)


def steps(grid: Grid) -> np.ndarray:
    return grid.scales.astype(np.float64) * grid.gain


def test_min_max_by_hand() -> None:
    """3 steps over [-1, 2]: a step of 1, zero at level 1. Zero belongs to the range of one-sided rows."""
    weight = np.array([[-1, 2, 0.5, 0], [1, 3, 2, 6], [-3, -1.5, -2, -1], [0, 0, 0, 0]], np.float32)
    grid = min_max_grid(weight, column(2))
    np.testing.assert_allclose(steps(grid).ravel(), [1, 2, 1, 0], rtol=HALF)
    np.testing.assert_array_equal(column(2).zero_of(grid.zero_points).ravel()[:3], [1, 0, 3])


def test_two_sigma_by_hand() -> None:
    """Row 0: mean 0, sigma sqrt(4 / 3). Row 1: the same about 1: levels reach from 1 - 2 sigma to 1 + 2 sigma."""
    weight = np.array([[-1, 1, -1, 1], [0, 2, 0, 2]], np.float32)
    sigma = np.sqrt(4 / 3)
    grid, clipped = two_sigma_grid(weight, column(2))
    np.testing.assert_allclose(steps(grid).ravel(), [4 * sigma / 3] * 2, rtol=HALF)
    # (1 - mean / (2 sigma)) * 3 / 2 is 1.5 and 0.85; halves go to the even number.
    np.testing.assert_array_equal(column(2).zero_of(grid.zero_points).ravel(), [2, 1])
    np.testing.assert_array_equal(clipped, weight)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_rules_hold_for_random_rows(bits: int) -> None:
    weight = gaussian(20, 300) + np.linspace(-1, 1, 20, dtype=np.float32)[:, None]
    top = 2**bits - 1
    low, high = np.minimum(weight.min(axis=1), 0), np.maximum(weight.max(axis=1), 0)
    grid = min_max_grid(weight, column(bits))
    np.testing.assert_allclose(steps(grid).ravel(), (high - low) / top, rtol=HALF)
    zeros = column(bits).zero_of(grid.zero_points).ravel()
    np.testing.assert_array_equal(zeros, np.clip(np.rint(-low / ((high - low) / top)), 0, top))

    mean, sigma = weight.mean(axis=1), weight.std(axis=1, ddof=1)
    grid, clipped = two_sigma_grid(weight, column(bits))
    np.testing.assert_allclose(steps(grid).ravel(), 2 * sigma / (top / 2), rtol=HALF)
    zeros = column(bits).zero_of(grid.zero_points).ravel()
    np.testing.assert_array_equal(zeros, np.clip(np.rint((1 - mean / (2 * sigma)) * top / 2), 0, top))
    np.testing.assert_allclose(clipped.min(axis=1), np.maximum(weight.min(axis=1), mean - 2 * sigma), rtol=1e-5)
    np.testing.assert_allclose(clipped.max(axis=1), np.minimum(weight.max(axis=1), mean + 2 * sigma), rtol=1e-5)
    assert clipped.dtype == np.float32


def test_a_single_input_has_no_spread() -> None:
    grid, clipped = two_sigma_grid(np.array([[0.5]], np.float32), column(2))
    assert np.isfinite(steps(grid)).all()
    np.testing.assert_array_equal(clipped, [[0.5]])


@pytest.mark.parametrize("rule", [min_max_grid, two_sigma_grid])
@pytest.mark.parametrize(
    "format",
    [UniformFormat(2, 32, ZeroPoint.PER_GROUP_INTEGER), UniformFormat(2, None, ZeroPoint.INTEGER)],
)
def test_rules_need_one_group_and_a_whole_zero_of_its_own(rule, format: UniformFormat) -> None:
    with pytest.raises(ValueError, match="one group a row and per-group-integer zero points, not uniform 2-bit"):
        rule(gaussian(4, 64), format)
