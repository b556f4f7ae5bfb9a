from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.solvers.companding import CodedGroups, compand, levels, spread, uniform
from onnxq.solvers.loss import relative_error
from tests.solvers.cases import heavy_tailed

SAMPLES = 200_000
# Relative squared error of one large group by depth, without a search and with one. The Laplace law's at depths 1 to 4
# and the Gaussian's are the table in the notes on the paper.
LAPLACE = {1: (1.083, 0.501), 2: (0.275, 0.195), 3: (0.0695, 0.0631), 4: (0.0175, 0.0172)}
GAUSSIAN = {1: (0.816, 0.363), 2: (0.308, 0.143), 3: (0.0631, 0.0539), 4: (0.0153, 0.0134)}
# Equal steps of least error on a Gaussian. Source: Max, Quantizing for minimum distortion, 1960.
BEST_UNIFORM = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154}
TOLERANCE = 0.02

shapes = st.tuples(st.integers(1, 6), st.integers(1, 300))
depths_of = st.integers(0, 8)
seeds = st.integers(0, 2**16)
quantisers = st.sampled_from((compand, uniform))


def errors(values: np.ndarray, coded: CodedGroups) -> np.ndarray:
    """Squared error of each group."""
    squares: np.ndarray = np.square(values - coded.decode()).sum(axis=1)
    return squares


def same(count: int, depth: int) -> np.ndarray:
    return np.full(count, depth)


@pytest.mark.parametrize(
    ("depth", "magnitudes"), [(1, [0.6931]), (2, [0.2877, 1.3863]), (3, [0.1335, 0.4700, 0.9808, 2.0794])]
)
def test_unit_tables(depth: int, magnitudes: list[float]) -> None:
    expected = [-m for m in reversed(magnitudes)] + magnitudes
    np.testing.assert_allclose(levels("laplace", depth), expected, atol=5e-5)


def test_equal_steps_are_equal() -> None:
    np.testing.assert_array_equal(levels("uniform", 2), [-0.375, -0.125, 0.125, 0.375])
    np.testing.assert_array_equal(levels("uniform", 0), [0])


def test_a_group_by_hand() -> None:
    """Median 0, root mean square sqrt(2), so b = 3; sigma of 3 ln 2 is 3/4, where a cell of two bits ends."""
    edge = 3 * np.log(2)
    for depth, code in ((1, [0, 1, 1]), (2, [1, 2, 2]), (3, [2, 4, 5])):
        coded = compand(np.array([[-np.sqrt(3), 0, np.sqrt(3)]], np.float32), same(1, depth))
        assert coded.codes.tolist() == [code]
        assert coded.scales[0] == pytest.approx(3)
        np.testing.assert_allclose(coded.decode(), 3 * levels("laplace", depth)[None, code])
    inside, beyond = (
        compand(np.array([[-w, 0, w]], np.float32) / np.float32(edge) * np.float32(np.sqrt(3)), same(1, 2))
        for w in (0.99 * edge, 1.5 * edge)
    )
    assert inside.codes.tolist() == beyond.codes.tolist()  # the scale goes along with the weights


def test_equal_steps_by_hand() -> None:
    values = np.array([[0, 1, 2, 4]], np.float32)
    coded = uniform(values, same(1, 2))
    assert coded.codes.tolist() == [[0, 1, 2, 3]]  # a cell takes its lower end
    np.testing.assert_array_equal(coded.decode(), [[0.5, 1.5, 2.5, 3.5]])


@pytest.mark.parametrize(
    ("law", "depth", "expected"),
    [("laplace", *item) for item in LAPLACE.items()] + [("gaussian", *item) for item in GAUSSIAN.items()],
)
def test_errors_of_one_large_group(law: str, depth: int, expected: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    values = (rng.laplace(size=SAMPLES) if law == "laplace" else rng.standard_normal(SAMPLES)).astype(np.float32)[None]
    for search, error in zip((False, True), expected, strict=True):
        found = relative_error(values, compand(values, same(1, depth), search=search).decode())
        assert found == pytest.approx(error, rel=TOLERANCE)


@pytest.mark.parametrize(("depth", "expected"), BEST_UNIFORM.items())
def test_equal_steps_of_one_large_group(depth: int, expected: float) -> None:
    values = np.random.default_rng(0).standard_normal((1, SAMPLES)).astype(np.float32)
    found = relative_error(values, uniform(values, same(1, depth), search=True).decode())
    assert found == pytest.approx(expected, rel=TOLERANCE)


def test_depth_zero_is_the_location() -> None:
    values = heavy_tailed(5, 101) + 3
    for search in (False, True):
        coded = compand(values, same(5, 0), search=search)
        assert coded.code_bits() == 0
        np.testing.assert_array_equal(coded.codes, 0)
        np.testing.assert_array_equal(coded.decode(), np.repeat(coded.locations[:, None].astype(np.float32), 101, 1))
    np.testing.assert_array_equal(compand(values, same(5, 0)).locations, np.median(values, axis=1).astype(np.float16))


@settings(max_examples=40, deadline=None)
@given(shapes, st.lists(depths_of, min_size=6, max_size=6), seeds, quantisers)
def test_a_search_never_does_worse(shape: tuple[int, int], depths: list[int], seed: int, quantise: object) -> None:
    assert callable(quantise)
    values, own = heavy_tailed(*shape, seed), np.array(depths[: shape[0]])
    with_search, without = (errors(values, quantise(values, own, search=search)) for search in (True, False))
    assert np.all(with_search <= without * 1.0001)


@settings(max_examples=40, deadline=None)
@given(shapes, st.lists(depths_of, min_size=6, max_size=6), seeds, quantisers, st.booleans())
def test_groups_do_not_know_of_each_other(
    shape: tuple[int, int], depths: list[int], seed: int, quantise: object, search: bool
) -> None:
    assert callable(quantise)
    values, own = heavy_tailed(*shape, seed), np.array(depths[: shape[0]])
    whole = quantise(values, own, search=search)
    assert np.all(whole.codes < (1 << own[:, None]))
    assert whole.code_bits() == own.sum() * shape[1]
    decoded = whole.decode()
    for group in range(shape[0]):
        alone = quantise(values[group : group + 1], own[group : group + 1], search=search)
        np.testing.assert_allclose(alone.decode()[0], decoded[group], rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 8))
def test_codes_are_the_cells_of_the_distribution_function(seed: int, depth: int) -> None:
    values = heavy_tailed(1, 64, seed).astype(np.float64)
    coded = compand(values, same(1, depth))
    x = (values[0] - float(coded.locations[0])) / float(coded.scales[0])
    share = np.where(x < 0, 0.5 * np.exp(x), 1 - 0.5 * np.exp(-x)) * 2**depth  # Laplace's, in its usual form
    clear = np.abs(share - np.rint(share)) > 1e-4  # others may fall on either side of an edge
    np.testing.assert_array_equal(coded.codes[0][clear], np.floor(share)[clear])


def test_blocks_leave_no_seam() -> None:
    values = heavy_tailed(700, 256)
    whole = compand(values, same(700, 3), search=True)
    part = compand(values[250:270], same(20, 3), search=True)
    np.testing.assert_array_equal(whole.codes[250:270], part.codes)


@pytest.mark.parametrize("quantise", [compand, uniform])
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_constant_groups_are_exact(quantise: object, value: float) -> None:
    assert callable(quantise)
    for depth in (0, 1, 4, 8):
        for search in (False, True):
            decoded = quantise(np.full((2, 40), value, np.float32), same(2, depth), search=search).decode()
            np.testing.assert_array_equal(decoded, value)


def test_spread_is_about_the_median() -> None:
    medians, squares = spread(np.array([[0, 1, 5], [2, 2, 2]], np.float32))
    assert (medians.tolist(), squares.tolist()) == ([1, 2], [pytest.approx(17 / 3), 0])


@pytest.mark.parametrize(
    ("values", "depths", "message"),
    [
        (np.zeros((2, 3)), np.zeros(3, int), "a depth for each"),
        (np.zeros(3), np.zeros(3, int), "a depth for each"),
        (np.zeros((0, 3)), np.zeros(0, int), "a depth for each"),
        (np.zeros((1, 3)), np.array([9]), "0 to 8 bits"),
        (np.array([[np.nan, 0]]), np.array([2]), "NaN"),
    ],
)
def test_what_makes_no_sense_is_refused(values: np.ndarray, depths: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compand(values, depths)
