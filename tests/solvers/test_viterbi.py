"""Paths through the trellis: against every path there is, where there are few, and against every start elsewhere."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxq.formats.tables import GAUSSIAN_TABLES
from onnxq.solvers import viterbi
from onnxq.solvers.viterbi import closed_path, open_path

SUMMATION = 1e-5
TURNED = {25: 0.12, 33: 0.06, 64: 0.02}
"""How much dearer than the best closed path the turned regime may be by steps, over runs of Gaussian costs."""


def cost_of(costs: np.ndarray, path: np.ndarray) -> np.ndarray:
    """Total cost of each run: [steps, runs, indices] and [steps, runs] to [runs]."""
    return np.take_along_axis(costs, path[..., None], axis=2)[..., 0].sum(axis=0, dtype=np.float64)


def check_steps(path: np.ndarray, bits: int, window: int, *, closed: bool) -> None:
    """Every index holds the codes before it: without its own code it is its predecessor without the oldest one."""
    states = 1 << (window - bits)
    before = np.roll(path, 1, axis=0)
    follows = path >> bits == before % states
    assert follows[0 if closed else 1 :].all()
    assert path.dtype == np.int64
    assert ((path >= 0) & (path < 1 << window)).all()


def indices_of(codes: tuple[int, ...], bits: int, window: int) -> list[int]:
    """The closed path of some codes, from the format's formula."""
    steps = len(codes)
    return [
        sum(codes[(t - before) % steps] << (bits * before) for before in range(window)) % (1 << window)
        for t in range(steps)
    ]


def random_costs(steps: int, runs: int, window: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((steps, runs, 1 << window)).astype(np.float32)


def gaussian_costs(steps: int, runs: int, bits: int, window: int, seed: int = 0) -> np.ndarray:
    """Squared errors of Gaussians against a stored table: the costs of real use."""
    table = GAUSSIAN_TABLES[bits, window]
    levels = (np.array(table.entries, np.float32) - np.float32(63.5)) * np.float32(table.step)
    samples = np.random.default_rng(seed).standard_normal((steps, runs, 1)).astype(np.float32)
    return np.square(samples - levels)


@pytest.mark.parametrize(
    ("bits", "window", "steps"),
    [
        (1, 1, 5),
        (2, 2, 3),
        (1, 2, 1),
        (1, 2, 6),
        (1, 3, 7),  # 4 states
        (2, 4, 1),
        (2, 4, 2),
        (2, 4, 5),
        (3, 4, 3),
        (1, 4, 8),  # 8 states, few steps
        (1, 6, 8),
        (2, 6, 1),
        (2, 6, 4),
    ],
)
def test_the_exact_regime_finds_the_best_of_all_codes(bits: int, window: int, steps: int) -> None:
    costs = random_costs(steps, 3, window)
    path = closed_path(costs, bits, window)
    check_steps(path, bits, window, closed=True)
    every = np.array([indices_of(codes, bits, window) for codes in itertools.product(range(1 << bits), repeat=steps)])
    for run in range(3):
        best = costs[np.arange(steps), run, every].sum(axis=1).min()
        assert cost_of(costs, path)[run] == pytest.approx(best, abs=SUMMATION)


@pytest.mark.parametrize(("bits", "window", "steps"), [(1, 3, 9), (2, 4, 5), (2, 6, 3), (3, 3, 4)])
def test_an_open_path_is_the_best_with_any_start(bits: int, window: int, steps: int) -> None:
    costs = random_costs(steps, 3, window)
    path = open_path(costs, bits, window)
    check_steps(path, bits, window, closed=False)
    # From every first index, all codes.
    best = np.full(3, np.inf)
    for first in range(1 << window):
        for codes in itertools.product(range(1 << bits), repeat=steps - 1):
            index, total = first, costs[0, :, first].astype(np.float64)
            for t, code in enumerate(codes, start=1):
                index = ((index << bits) | code) % (1 << window)
                total = total + costs[t, :, index]
            best = np.minimum(best, total)
    np.testing.assert_allclose(cost_of(costs, path), best, atol=SUMMATION)


@pytest.mark.parametrize("steps", sorted(TURNED))
@pytest.mark.parametrize(("bits", "window"), [(1, 4), (1, 6), (2, 6), (3, 6)])
def test_the_turned_regime_is_closed_and_near_the_best(
    bits: int, window: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = gaussian_costs(steps, 200, bits, window)
    turned = closed_path(costs, bits, window)
    check_steps(turned, bits, window, closed=True)
    monkeypatch.setattr(viterbi, "_EXACT_STATES", 1 << window)
    exact = closed_path(costs, bits, window)
    check_steps(exact, bits, window, closed=True)
    lost = cost_of(costs, turned) - cost_of(costs, exact)
    assert lost.min() >= -SUMMATION * steps
    assert lost.sum() <= TURNED[steps] * cost_of(costs, exact).sum()
    unbound = cost_of(costs, open_path(costs, bits, window))
    assert (unbound <= cost_of(costs, exact) + SUMMATION * steps).all()


def test_the_regimes_meet_at_their_border(monkeypatch: pytest.MonkeyPatch) -> None:
    """The turned regime really is another way: it loses something somewhere."""
    steps = viterbi._EXACT_STEPS + 1
    costs = random_costs(steps, 100, 6)
    turned = cost_of(costs, closed_path(costs, 1, 6))
    monkeypatch.setattr(viterbi, "_EXACT_STEPS", steps)
    exact = cost_of(costs, closed_path(costs, 1, 6))
    assert (exact <= turned + SUMMATION).all()
    assert (exact < turned - SUMMATION).any()


@pytest.mark.parametrize("steps", [9, 12, 24])
def test_short_runs_pay_little_for_being_closed(steps: int) -> None:
    """A run's 2 steps of start are bound by its end: of Gaussians, that costs less than coding one of them."""
    costs = gaussian_costs(steps, 200, 2, 6)
    closed, unbound = cost_of(costs, closed_path(costs, 2, 6)), cost_of(costs, open_path(costs, 2, 6))
    assert (closed >= unbound - SUMMATION * steps).all()
    assert (closed - unbound).mean() < 0.5


def test_without_a_state_every_step_is_alone() -> None:
    costs = random_costs(5, 7, 3)
    np.testing.assert_array_equal(closed_path(costs, 3, 3), costs.argmin(axis=2))


def test_runs_do_not_know_of_each_other() -> None:
    costs = gaussian_costs(20, 6, 2, 6)
    together = closed_path(costs, 2, 6)
    apart = np.concatenate([closed_path(costs[:, run : run + 1], 2, 6) for run in range(6)], axis=1)
    np.testing.assert_array_equal(together, apart)
