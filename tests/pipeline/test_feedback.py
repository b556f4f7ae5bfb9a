"""What errors are expected to cost under error feedback, on the data it learnt from and on other data."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.calibration import InputStatistics
from onnxq.frames import frame_shape, make_frame
from onnxq.pipeline.feedback import input_costs
from onnxq.recipe import SolverSpec
from onnxq.solvers.factor import Order, expected_costs, factorise

K = 48
SPEC = SolverSpec(damping=1e-3)
NEAREST = SolverSpec(name="nearest")


def rows(count: int, seed: int) -> np.ndarray:
    """Correlated inputs of one distribution."""
    mixing = np.random.default_rng(1).standard_normal((K, K)) * np.geomspace(1, 0.05, K)[:, None]
    drawn: np.ndarray = np.random.default_rng(seed).standard_normal((count, K)) @ mixing
    return drawn.astype(np.float32)


def statistics(values: np.ndarray, *, full: bool = True) -> InputStatistics:
    squares = np.square(values).mean(0)
    moment = values.T @ values / len(values) if full else None
    return InputStatistics(len(values), moment, squares, values.mean(0), np.abs(values).max(0))


def test_on_its_own_moment_an_error_costs_what_the_factor_says() -> None:
    moment = statistics(rows(400, 0)).second_moment
    assert moment is not None
    factor = factorise(moment, K, 1e-9, Order.ACTIVATION)
    np.testing.assert_allclose(expected_costs(factor, moment), factor.importance(), rtol=0.02, atol=1e-6)


def test_costs_are_those_of_errors_that_are_fed_back() -> None:
    """Independent errors d become errors e = d U^-1: their loss, drawn many times, is what is expected."""
    moment, other = (statistics(rows(200, seed)).second_moment for seed in (0, 1))
    assert moment is not None
    assert other is not None
    factor = factorise(moment, K, 0.01, Order.NATURAL)
    upper = np.triu(factor.upper.astype(np.float64), 1) + np.eye(K)
    sizes = np.linspace(0.5, 2, K)
    drawn = np.random.default_rng(2).standard_normal((20000, K)) * sizes
    errors = np.linalg.solve(upper.T, drawn.T).T
    loss = np.einsum("nk,kj,nj->n", errors, other.astype(np.float64), errors).mean() / np.diagonal(other).mean()
    assert expected_costs(factor, other) @ sizes**2 == pytest.approx(loss, rel=0.03)


def test_two_halves_tell_what_other_data_will_lose() -> None:
    """Few rows: their own moment promises more than it holds, two halves come near the truth."""
    seen, truth = rows(120, 3), statistics(rows(200_000, 4)).second_moment
    assert truth is not None
    whole = statistics(seen)
    promised = input_costs(whole, None, SPEC)
    halves = input_costs(statistics(seen[::2]), statistics(seen[1::2]), SPEC)
    assert whole.second_moment is not None
    real = expected_costs(factorise(whole.second_moment, K, SPEC.damping, Order.ACTIVATION), truth).sum()
    assert promised.fed_back.sum() < 0.85 * real
    assert halves.fed_back.sum() == pytest.approx(real, rel=0.12)
    assert halves.gain(np.ones(K)) < promised.gain(np.ones(K))


def test_without_feedback_an_error_costs_the_mean_square() -> None:
    first, second = statistics(rows(100, 5), full=False), statistics(rows(300, 6), full=False)
    costs = input_costs(first, second, NEAREST)
    expected = first.merge(second).diagonal
    np.testing.assert_allclose(costs.plain, expected / expected.mean(), rtol=1e-5)
    np.testing.assert_array_equal(costs.fed_back, costs.plain)
    assert costs.gain(np.ones(K)) == 1


def test_a_frame_carries_the_costs_to_its_coefficients() -> None:
    found = statistics(rows(400, 7))
    frame = make_frame(frame_shape(K), 0)
    costs = input_costs(found, None, SPEC, frame)
    assert len(costs.plain) == frame.shape.coefficients
    # Mixing spreads the inputs' energy, and keeps what feedback gains to what it was at best.
    assert np.ptp(costs.plain) < np.ptp(input_costs(found, None, SPEC).plain)


def test_a_half_that_saw_nothing_counts_for_nothing() -> None:
    found = statistics(rows(50, 8))
    empty = InputStatistics(0, np.zeros((K, K), np.float32), *(np.zeros(K, np.float32) for _ in range(3)))
    np.testing.assert_array_equal(input_costs(found, empty, SPEC).fed_back, input_costs(found, None, SPEC).fed_back)
