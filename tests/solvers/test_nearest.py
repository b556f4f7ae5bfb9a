from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.formats.uniform import UniformEncoding, UniformFormat, ZeroPoint
from onnxq.solvers.grid import search_grid
from onnxq.solvers.loss import relative_error
from onnxq.solvers.nearest import nearest
from tests.solvers.cases import gaussian, heavy_tailed

# Relative mean squared error of the best uniform quantiser of a Gaussian. Source: Max, Quantizing for minimum
# distortion, 1960.
BEST_UNIFORM = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.003495}
# A sample of this size strays by about half a percent.
SAMPLE_TOLERANCE = 0.015

formats = st.builds(
    UniformFormat,
    bits=st.integers(1, 8),
    group_size=st.sampled_from((32, 64, 128, None)),
    zero_point=st.sampled_from(ZeroPoint),
)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 200))
seeds = st.integers(0, 2**16)


def error_per_group(weight: np.ndarray, encoding: UniformEncoding) -> np.ndarray:
    """Squared error [N, G]."""
    n, k = weight.shape
    size = encoding.format.effective_group(k)
    squares = np.pad((weight - encoding.dequantize()) ** 2, ((0, 0), (0, -k % size)))
    errors: np.ndarray = squares.reshape(n, -1, size).sum(axis=2)
    return errors


def test_a_matrix_by_hand() -> None:
    """Two bits about zero on a step of 1: halves are kept, and what lies past 1.5 is cut off."""
    weight = np.array(
        [
            [-1.5, -0.5, 0.5, 1.5, -1.5, -0.5, 0.5, 1.5],
            [-3.0, -1.0, 1.0, 3.0, 3.0, 1.0, -1.0, -3.0],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25],
        ],
        np.float32,
    )
    encoding = nearest(weight, UniformFormat(2, None, ZeroPoint.MIDRISE))
    np.testing.assert_array_equal(encoding.dequantize(), weight)
    np.testing.assert_array_equal(encoding.codes[:2], [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 3, 2, 1, 0]])
    np.testing.assert_array_equal(encoding.scales[2], [0])


@pytest.mark.parametrize(("bits", "expected"), BEST_UNIFORM.items())
def test_a_gaussian_reaches_the_best_uniform_quantiser(bits: int, expected: float) -> None:
    weight = gaussian(16, 16384)
    got = relative_error(weight, nearest(weight, UniformFormat(bits, None, ZeroPoint.MIDRISE)).dequantize())
    assert got == pytest.approx(expected, rel=SAMPLE_TOLERANCE)


@settings(max_examples=40, deadline=None)
@given(formats, shapes, seeds)
def test_codes_are_in_range_and_levels_are_the_nearest(
    format: UniformFormat, shape: tuple[int, int], seed: int
) -> None:
    weight = heavy_tailed(*shape, seed)
    encoding = nearest(weight, format)
    assert encoding.codes.max() < format.levels
    k = shape[1]
    step = np.repeat(np.abs(encoding.effective_scales()), format.effective_group(k), axis=1)[:, :k]
    inside = (encoding.codes > 0) & (encoding.codes < format.levels - 1)
    distance = np.abs(weight - encoding.dequantize())
    assert np.all(distance[inside] <= 0.5001 * step[inside])


@settings(max_examples=30, deadline=None)
@given(formats, shapes, seeds, st.integers(-20, 20))
def test_a_power_of_two_changes_the_gain_alone(
    format: UniformFormat, shape: tuple[int, int], seed: int, exponent: int
) -> None:
    weight = heavy_tailed(*shape, seed)
    plain, scaled = nearest(weight, format), nearest(np.ldexp(weight, exponent), format)
    assert scaled.gain == np.ldexp(plain.gain, exponent)
    np.testing.assert_array_equal(scaled.codes, plain.codes)
    np.testing.assert_array_equal(scaled.scales, plain.scales)
    np.testing.assert_array_equal(scaled.zero_points, plain.zero_points)


@settings(max_examples=30, deadline=None)
@given(formats, shapes, seeds)
def test_rows_do_not_know_of_each_other(format: UniformFormat, shape: tuple[int, int], seed: int) -> None:
    weight = heavy_tailed(*shape, seed)
    order = np.random.default_rng(seed).permutation(shape[0])
    plain, permuted = nearest(weight, format), nearest(weight[order], format)
    np.testing.assert_array_equal(permuted.codes, plain.codes[order])
    np.testing.assert_array_equal(permuted.scales, plain.scales[order])


def test_blocks_of_rows_leave_no_seam() -> None:
    """A weight that takes several blocks and threads is solved as its rows are alone."""
    weight, format = gaussian(300, 512), UniformFormat(3, 64, ZeroPoint.PER_GROUP)
    whole = nearest(weight, format)
    single = nearest(np.concatenate([weight[255:256], weight[:1]]), format)
    np.testing.assert_array_equal(whole.codes[255], single.codes[0])


@pytest.mark.parametrize("zero_point", ZeroPoint)
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_weight_on_a_grid_comes_back(bits: int, zero_point: ZeroPoint) -> None:
    format = UniformFormat(bits, 32, zero_point)
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, format.levels, (6, 96)).astype(np.uint8)
    codes[:, ::32], codes[:, 1::32] = 0, format.levels - 1
    scales = rng.uniform(1, 4, (6, 3)).astype(np.float16)
    if zero_point.shared:
        zeros = format.quantize_zero(np.full((1, 1), format.shared_zero()))
    else:
        zeros = format.quantize_zero(rng.uniform(0, format.levels - 1, (6, 3)))
    original = UniformEncoding(format, codes, scales, zeros, 2.0**-7)
    weight = original.dequantize()
    np.testing.assert_array_equal(nearest(weight, format).dequantize(), weight)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    ("own", "shared"),
    [(ZeroPoint.PER_GROUP, ZeroPoint.MIDRISE), (ZeroPoint.PER_GROUP_INTEGER, ZeroPoint.INTEGER)],
)
def test_own_zero_points_never_lose(bits: int, own: ZeroPoint, shared: ZeroPoint) -> None:
    weight = heavy_tailed(16, 128)
    better, worse = (error_per_group(weight, nearest(weight, UniformFormat(bits, 32, zero))) for zero in (own, shared))
    assert np.all(better <= worse * 1.0001)
    if bits > 2:
        assert better.sum() < 0.95 * worse.sum()


def test_one_sided_groups_use_every_level_with_their_own_zero() -> None:
    weight = np.abs(gaussian(8, 64))
    own = relative_error(weight, nearest(weight, UniformFormat(3, 32, ZeroPoint.PER_GROUP)).dequantize())
    shared = relative_error(weight, nearest(weight, UniformFormat(3, 32, ZeroPoint.MIDRISE)).dequantize())
    assert own < 0.4 * shared


def test_integer_levels_turn_their_long_side_to_the_outlier() -> None:
    """Levels -2, -1, 0, 1: an outlier above needs a negative scale to be kept."""
    weight = np.zeros((2, 32), np.float32)
    weight[:, 0], weight[:, 1] = (2.0, -2.0), (1.0, -1.0)
    encoding = nearest(weight, UniformFormat(2, 32, ZeroPoint.INTEGER))
    np.testing.assert_array_equal(encoding.dequantize(), weight)
    assert np.sign(encoding.scales[:, 0]).tolist() == [-1, 1]


@pytest.mark.parametrize("zero_point", ZeroPoint)
def test_more_bits_never_hurt(zero_point: ZeroPoint) -> None:
    weight = heavy_tailed(8, 256)
    errors = [
        relative_error(weight, nearest(weight, UniformFormat(bits, 64, zero_point)).dequantize())
        for bits in range(1, 9)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("zero_point", ZeroPoint)
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_constant_groups_are_exact(zero_point: ZeroPoint, value: float) -> None:
    weight = np.full((2, 40), value, np.float32)
    for bits in (2, 4, 8):
        np.testing.assert_array_equal(nearest(weight, UniformFormat(bits, 32, zero_point)).dequantize(), weight)


def test_equal_importance_is_none_at_all() -> None:
    weight, format = gaussian(4, 100), UniformFormat(3, 32, ZeroPoint.PER_GROUP)
    for importance in (np.full(100, 7.0), np.zeros(100)):
        weighted = nearest(weight, format, importance)
        np.testing.assert_array_equal(weighted.codes, nearest(weight, format).codes)
        np.testing.assert_array_equal(weighted.scales, nearest(weight, format).scales)


def test_importance_lowers_what_it_weights() -> None:
    weight, format = heavy_tailed(32, 256), UniformFormat(2, 64, ZeroPoint.MIDRISE)
    importance = np.exp(np.random.default_rng(1).standard_normal(256))
    weighted, plain = (
        float(((weight - nearest(weight, format, given).dequantize()) ** 2 @ importance).sum())
        for given in (importance, None)
    )
    assert weighted < 0.95 * plain


def test_the_search_is_close_to_an_exhaustive_one() -> None:
    """300 steps on every group gain less than two percent over the search."""
    weight, format = heavy_tailed(64, 64), UniformFormat(3, 64, ZeroPoint.MIDRISE)
    found = error_per_group(weight, nearest(weight, format))[:, 0]
    grid = search_grid(weight, format)
    best = np.full(len(weight), np.inf, np.float32)
    for factor in np.geomspace(0.2, 3, 300):
        scales = (np.abs(weight).max(axis=1, keepdims=True) / 3.5 * factor / grid.gain).astype(np.float16)
        step = scales.astype(np.float32) * np.float32(grid.gain)
        codes = np.clip(np.rint(weight / step + 3.5), 0, 7)
        best = np.minimum(best, ((weight - (codes - 3.5) * step) ** 2).sum(axis=1))
    assert found.sum() < 1.02 * best.sum()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e6, 1e30])
def test_any_magnitude_is_as_good_as_another(magnitude: float) -> None:
    weight, format = gaussian(4, 64), UniformFormat(4, 32, ZeroPoint.PER_GROUP)
    scaled = (weight * np.float32(magnitude)).astype(np.float32)
    got = relative_error(scaled / np.float32(magnitude), nearest(scaled, format).dequantize() / np.float32(magnitude))
    assert got == pytest.approx(relative_error(weight, nearest(weight, format).dequantize()), rel=0.02)


def test_half_precision_weights_are_taken_as_they_are() -> None:
    weight, format = gaussian(4, 64).astype(np.float16), UniformFormat(4, 32, ZeroPoint.MIDRISE)
    np.testing.assert_array_equal(nearest(weight, format).codes, nearest(weight.astype(np.float32), format).codes)


@pytest.mark.parametrize(
    ("weight", "importance", "message"),
    [
        (np.zeros((2, 2, 2), np.float32), None, "a matrix"),
        (np.zeros((0, 8), np.float32), None, "a matrix"),
        (np.array([[1.0, np.nan]], np.float32), None, "NaN"),
        (np.array([[1.0, np.inf]], np.float32), None, "NaN"),
        (np.ones((1, 8), np.float32), np.ones(7), r"importance must be \[K\] = \[8\]"),
        (np.ones((1, 8), np.float32), -np.ones(8), "not negative"),
        (np.ones((1, 8), np.float32), np.full(8, np.nan), "finite"),
    ],
)
def test_what_makes_no_sense_is_refused(weight: np.ndarray, importance: np.ndarray | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nearest(weight, UniformFormat(4), importance)


def test_the_format_decides_where_zero_points_go() -> None:
    weight = gaussian(4, 100)
    for zero_point in ZeroPoint:
        format = dataclasses.replace(UniformFormat(4, 32), zero_point=zero_point)
        assert nearest(weight, format).zero_points.shape == ((1, 1) if zero_point.shared else (4, 4))
