from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.allocation.dual_ascent import dual_ascent


def spreads(groups: int, seed: int, level: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradient and weight variances whose logarithms are Gaussian, and sizes."""
    rng = np.random.default_rng(seed)
    gradients, variances = np.exp2(rng.normal(level, 2, groups)), np.exp2(rng.normal(-8, 1, groups))
    return gradients, variances, rng.integers(200, 600, groups)


def test_depths_by_hand() -> None:
    """Logs of 0, 4, 8 for equal sizes: 1, 3 and 5 bits are a mean of 3, at a multiplier of -2."""
    found = dual_ascent(np.array([1.0, 16, 16]), np.array([1.0, 1, 16]), np.full(3, 10), 3)
    assert found.depths.tolist() == [1, 3, 5]
    assert (found.multiplier, found.rate) == (pytest.approx(-2), 3)


def test_clamps_by_hand() -> None:
    """A group that nothing depends on, a constant one, and one beyond 8 bits, whose bits the fourth one gets."""
    found = dual_ascent(np.array([0.0, 1, 2.0**60, 4]), np.array([1.0, 0, 1, 1]), np.ones(4, int), 2.75)
    assert found.depths.tolist() == [0, 0, 8, 3]
    assert found.rate == 2.75


def test_sizes_count() -> None:
    """The large group takes 1 of 4 bits: 3 x 1 + 1 x 5 weights' bits are a mean of 2."""
    found = dual_ascent(np.array([1.0, 256]), np.ones(2), np.array([3, 1]), 2)
    assert found.depths.tolist() == [1, 5]
    assert found.rate == 2


def test_steps_by_hand() -> None:
    """From a multiplier that is 2 too low, the first step sees 1 bit too many, the second moves by 1.9."""
    gradients, ones = np.exp2(np.array([2.0, 4, 6])), np.ones(3)
    found = [dual_ascent(gradients, ones, ones, 2, multiplier=-2, steps=steps) for steps in (1, 2)]
    assert [(item.multiplier, item.rate) for item in found] == [(-2, 3), (pytest.approx(-0.1), 2)]


def test_nothing_matters() -> None:
    found = dual_ascent(np.zeros(4), np.ones(4), np.ones(4), 3)
    assert found.depths.tolist() == [0] * 4


@given(st.integers(0, 2**16), st.floats(0.5, 7), st.floats(-40, 10))
def test_the_rate_is_met_and_depths_follow_the_law(seed: int, rate: float, level: float) -> None:
    gradients, variances, sizes = spreads(2000, seed, level)
    found = dual_ascent(gradients, variances, sizes, rate)
    assert found.rate == pytest.approx(rate, abs=0.01)
    assert found.rate == pytest.approx(found.depths @ sizes / sizes.sum())
    law = np.clip(0.5 * np.log2(gradients * variances) - 0.5 * found.multiplier, 0, 8)
    assert np.abs(found.depths - law).max() <= 0.5 + 1e-9
    order = np.argsort(gradients * variances)
    assert np.all(np.diff(found.depths[order].astype(int)) >= 0)


@given(st.integers(0, 2**16), st.floats(1, 6))
def test_a_warm_start_is_where_the_last_one_ended(seed: int, rate: float) -> None:
    """Statistics that drift a little need a step or two only."""
    gradients, variances, sizes = spreads(2000, seed)
    first = dual_ascent(gradients, variances, sizes, rate)
    drifted = gradients * np.exp2(np.random.default_rng(seed + 1).normal(0.3, 0.2, len(gradients)))
    second = dual_ascent(drifted, variances, sizes, rate, multiplier=first.multiplier, steps=4)
    assert second.rate == pytest.approx(rate, abs=0.01)


@given(st.integers(0, 2**16), st.integers(-30, 30))
def test_the_unit_of_gradients_does_not_matter(seed: int, exponent: int) -> None:
    gradients, variances, sizes = spreads(500, seed)
    plain = dual_ascent(gradients, variances, sizes, 3)
    scaled = dual_ascent(np.ldexp(gradients, exponent), variances, sizes, 3)
    np.testing.assert_array_equal(plain.depths, scaled.depths)


@pytest.mark.parametrize(
    ("gradients", "sizes", "rate", "message"),
    [
        (np.ones(2), np.ones(3), 3, "one number for each group"),
        (np.ones(0), np.ones(0), 3, "one number for each group"),
        (np.ones(3), np.ones(3), 9, "a rate is 0 to 8"),
        (-np.ones(3), np.ones(3), 3, "negative or not finite"),
        (np.full(3, np.nan), np.ones(3), 3, "negative or not finite"),
    ],
)
def test_what_makes_no_sense_is_refused(gradients: np.ndarray, sizes: np.ndarray, rate: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dual_ascent(gradients, np.ones(len(gradients)), sizes, rate)
