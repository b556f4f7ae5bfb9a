"""Planes of rows: algorithm 1 as the paper has it, and the cheapest by what is lost."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.errors import BudgetError
from onnxq.formats.binary import BinaryFormat
from onnxq.solvers.binary import binary_codes, plane_errors
from onnxq.solvers.planes import (
    convex_gains,
    planes_by_frequency,
    planes_by_loss,
    planes_by_mean,
    row_errors,
    row_weights,
)
from tests.solvers.cases import heavy_tailed


def zipf(n: int, seed: int = 0) -> np.ndarray:
    counts = 1e6 / np.arange(1, n + 1)
    return np.random.default_rng(seed).permutation(counts)


@pytest.mark.parametrize(("ratio", "mean"), [(1, 2.50), (2, 1.73), (4, 1.32), (8, 1.14)])
def test_averages_are_the_papers(ratio: float, mean: float) -> None:
    """Section 3.1, at its 32768 words."""
    counts = zipf(32768)
    planes = planes_by_frequency(counts, 4, ratio)
    assert planes.mean() == pytest.approx(mean, abs=0.006)
    assert (np.diff(planes[np.argsort(-counts)]) <= 0).all()
    sizes = [(planes == width).sum() for width in (4, 3, 2, 1)]
    share = 32768 / sum(ratio**i for i in range(4))
    for i, size in enumerate(sizes[:3]):
        assert size == round(share * ratio**i)
    assert sum(sizes) == 32768


def test_clusters_by_hand() -> None:
    """10 rows by thirds: 3, 3 and the rest; equals go by their place."""
    counts = np.array([5, 9, 5, 0, 1, 7, 5, 3, 0, 2])
    np.testing.assert_array_equal(planes_by_frequency(counts, 3, 1), [3, 3, 2, 1, 1, 3, 2, 2, 1, 1])
    np.testing.assert_array_equal(planes_by_frequency(counts, 1, 2), [1] * 10)
    # 10 / 7 and 20 / 7 rounded, and 6 left.
    np.testing.assert_array_equal(planes_by_frequency(counts, 3, 2), [2, 3, 2, 1, 1, 2, 1, 1, 1, 1])


@given(st.integers(1, 200), st.integers(1, 6), st.sampled_from([0.5, 1, 1.5, 2, 4, 8]))
@settings(max_examples=100, deadline=None)
def test_every_row_gets_planes(n: int, clusters: int, ratio: float) -> None:
    planes = planes_by_frequency(zipf(n), clusters, ratio)
    assert planes.shape == (n,)
    assert planes.min(initial=clusters) >= 1
    assert planes.max(initial=1) <= clusters
    shares = ratio ** np.arange(clusters) * n / (ratio ** np.arange(clusters)).sum()
    for i, share in enumerate(shares):
        assert abs((planes == clusters - i).sum() - share) <= max(1, clusters / 2)


@pytest.mark.parametrize(("clusters", "ratio"), [(0, 1), (7, 1), (3, 0), (3, -1), (3, np.nan)])
def test_clusters_that_make_no_sense_are_refused(clusters: int, ratio: float) -> None:
    with pytest.raises(ValueError, match="must be 1 to 6"):
        planes_by_frequency(np.ones(5), clusters, ratio)


def test_weights_of_rows() -> None:
    np.testing.assert_allclose(row_weights(np.array([3, 1, 0])), [0.75, 0.25, 0])
    np.testing.assert_allclose(row_weights(np.array([3, 1, 0]), 0.3), [0.85, 0.35, 0.1])
    np.testing.assert_allclose(row_weights(np.zeros(4), 1), [0.5] * 4)
    with pytest.raises(ValueError, match="not be negative"):
        row_weights(np.ones(2), -1)
    with pytest.raises(ValueError, match="not be negative"):
        row_weights(-np.ones(2))


def test_steps_that_only_pay_together_have_their_mean() -> None:
    losses = np.array([[10, 6, 4, 3.0], [10, 9, 2, 1], [5, 5, 5, 2], [4, 3, 2, 1]])
    np.testing.assert_allclose(convex_gains(losses), [[4, 2, 1], [4, 4, 1], [1, 1, 1], [1, 1, 1]])


# A plane of a whole tile of 64 rows by 32 inputs, and its scales; what one tile more costs.
TILE_BITS = 64 * 32 + 64 * 16


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Errors of a few kinds of rows, each kind 64 times, so that a row's plane costs a tile."""
    kinds, most = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    drops = draw(st.lists(st.lists(st.integers(0, 9), min_size=most, max_size=most), min_size=kinds, max_size=kinds))
    weights = draw(st.lists(st.integers(1, 5), min_size=kinds, max_size=kinds))
    return np.cumsum(np.array(drops, float)[:, ::-1], axis=1)[:, ::-1].copy(), np.array(weights, float)


@given(tables(), st.integers(0, 14))
@settings(max_examples=150, deadline=None)
def test_no_other_planes_lose_less_for_as_many(table: tuple[np.ndarray, np.ndarray], more: int) -> None:
    """All choices for whole kinds are tried, and no more is spent than there is."""
    errors, weights = table
    kinds, most = errors.shape
    n, format = 64 * kinds, BinaryFormat.of(64 * kinds, 1)
    spread, each = np.repeat(errors, 64, axis=0), np.repeat(weights, 64)
    order_bits = 32 * n
    budget = format.cost_bits(n, 32) + more * TILE_BITS + order_bits
    planes = planes_by_loss(spread, each, budget, 32, format)
    assert BinaryFormat.by_row(planes)[0].cost_bits(n, 32) <= budget
    loss = float((spread[np.arange(n), planes - 1] * each).sum())
    best = min(
        float(64 * (errors[np.arange(kinds), np.array(choice) - 1] * weights).sum())
        for choice in itertools.product(range(1, most + 1), repeat=kinds)
        if 64 * sum(choice) <= planes.sum()
    )
    assert loss <= best + 1e-9


def test_a_real_table_by_loss_beats_algorithm_1_at_its_price() -> None:
    table, counts = heavy_tailed(1500, 64), zipf(1500)
    table *= np.random.default_rng(1).uniform(0.3, 3, (1500, 1)).astype(np.float32)
    weights = row_weights(counts, 1.0)
    format = BinaryFormat.of(1500, 1)
    paper = planes_by_frequency(counts, 4, 1)
    price = BinaryFormat.by_row(paper)[0].cost_bits(1500, 64)
    errors = plane_errors(table, format)
    ours = planes_by_loss(errors, weights, price, 64, format)
    chosen, rows = BinaryFormat.by_row(ours)
    assert 0.995 * price < chosen.cost_bits(1500, 64) <= price

    def loss(planes: np.ndarray) -> float:
        found, order = BinaryFormat.by_row(planes)
        decoded = binary_codes(table, found, rows=order).dequantize()
        return float(weights @ np.square(table - decoded, dtype=np.float64).sum(axis=1))

    predicted = float(weights @ errors[np.arange(1500), ours - 1])
    assert loss(ours) == pytest.approx(predicted, rel=1e-3)
    assert loss(ours) < 0.7 * loss(paper)
    assert rows is not None


def test_enough_bits_are_all_planes_and_too_few_are_refused() -> None:
    errors = np.array([[4, 2, 1.0]] * 70)
    format = BinaryFormat.of(70, 1, 32, offset=True)
    full = BinaryFormat.of(70, 3, 32, offset=True).cost_bits(70, 64)
    np.testing.assert_array_equal(planes_by_loss(errors, np.ones(70), full, 64, format), [3] * 70)
    # A plane less for a few rows would cost as much, and an order of rows besides.
    assert planes_by_loss(errors, np.ones(70), full - 1, 64, format).mean() < 3
    floor = format.cost_bits(70, 64)
    np.testing.assert_array_equal(planes_by_loss(errors, np.ones(70), floor, 64, format), [1] * 70)
    with pytest.raises(BudgetError, match=r"table \[70, 64\] is below the floor"):
        planes_by_loss(errors, np.ones(70), floor - 1, 64, format)


def test_planes_that_save_nothing_are_not_bought() -> None:
    errors = np.array([[4, 4, 4.0], [4, 2, 2.0]])
    np.testing.assert_array_equal(planes_by_loss(errors, np.ones(2), 10**9, 32, BinaryFormat.of(2, 1)), [1, 2])
    np.testing.assert_array_equal(planes_by_loss(errors, np.array([1, 0]), 10**9, 32, BinaryFormat.of(2, 1)), [1, 1])


def test_a_large_vocabulary_takes_no_time() -> None:
    rng = np.random.default_rng(0)
    errors = np.cumsum(rng.exponential(size=(60000, 6)), axis=1)[:, ::-1]
    format = BinaryFormat.of(60000, 1)
    budget = BinaryFormat.of(60000, 3).cost_bits(60000, 512)
    planes = planes_by_loss(errors, row_weights(zipf(60000), 1.0), budget, 512, format)
    cost = BinaryFormat.by_row(planes)[0].cost_bits(60000, 512)
    tile = 64 * (512 + 16)
    assert budget - tile < cost <= budget


@given(tables(), st.floats(1, 4))
@settings(max_examples=100, deadline=None)
def test_mean_planes_are_spent_as_well_as_bits(table: tuple[np.ndarray, np.ndarray], mean: float) -> None:
    """All choices are tried. Steps that are one may leave less than a row's planes unspent."""
    errors, weights = table
    n, most = errors.shape
    planes = planes_by_mean(errors, weights, mean)
    assert planes.sum() <= mean * n
    loss = float((errors[np.arange(n), planes - 1] * weights).sum())
    for choice in itertools.product(range(1, most + 1), repeat=n):
        if sum(choice) <= planes.sum():
            assert loss <= float((errors[np.arange(n), np.array(choice) - 1] * weights).sum()) + 1e-9


def test_mean_planes_by_hand() -> None:
    """Steps save 6, 2 (twice as much counted: 12, 4) and 5, 1: the mean of 2 pays for the first of each."""
    errors, weights = np.array([[9, 3, 1.0], [7, 2, 1]]), np.array([2.0, 1])
    for mean, want in ((1, [1, 1]), (1.5, [2, 1]), (2, [2, 2]), (2.5, [3, 2]), (2.9, [3, 2]), (3, [3, 3])):
        np.testing.assert_array_equal(planes_by_mean(errors, weights, mean), want)
    with pytest.raises(ValueError, match="must be 1 or more"):
        planes_by_mean(errors, weights, 0.9)


@pytest.mark.parametrize("offset", [False, True])
def test_errors_of_a_large_table_follow_from_some_of_its_rows(offset: bool) -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_t(rng.integers(3, 30, (400, 1)), (400, 96)) * rng.lognormal(0, 0.5, (400, 1))
    table[7] = 0
    table = table.astype(np.float32)
    format = BinaryFormat.of(400, 1, 32, offset=offset)
    exact = plane_errors(table, format)
    found = row_errors(table, format, most_elements=100 * 96)
    np.testing.assert_array_equal(row_errors(table, format), exact)
    np.testing.assert_array_equal(found[:, 0], exact[:, 0])
    measured = np.unique(np.linspace(0, 399, 100).astype(int))
    np.testing.assert_array_equal(found[measured], exact[measured])
    np.testing.assert_array_equal(found[7], np.zeros(6))
    others = np.setdiff1d(np.arange(400), [*measured, 7])
    # A plane is a factor of three and more: what is off by less moves few planes.
    off = np.abs(np.log(found[others] / exact[others])).mean(axis=0)
    assert (off < [1e-12, 0.15, 0.2, 0.3, 0.35, 0.4]).all()
    assert np.corrcoef(np.log(found[others, 2]), np.log(exact[others, 2]))[0, 1] > 0.95
    assert (np.diff(found, axis=1) <= 0).all()
