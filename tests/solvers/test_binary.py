"""Binary fits: by hand, against each other, against published errors; and with error feedback."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.formats.binary import BinaryEncoding, BinaryFormat
from onnxq.formats.uniform import UniformFormat, ZeroPoint
from onnxq.solvers.binary import BinaryFit, binary_codes, plane_errors
from onnxq.solvers.binary_feedback import binary_feedback
from onnxq.solvers.error_feedback import error_feedback
from onnxq.solvers.factor import Order, factorise
from onnxq.solvers.loss import relative_error, relative_proxy_loss
from onnxq.solvers.nearest import nearest
from tests.solvers.cases import gaussian, heavy_tailed, moment

FLOAT32 = 1e-5
"""Relative difference of losses that float32 products explain."""

# Relative squared errors of 512 columns by planes: greedy, refined, alternating (nmt_bcq, section 2.4).
GAUSSIAN = {
    1: (0.363, 0.363, 0.363),
    2: (0.131, 0.125, 0.117),
    3: (0.0587, 0.0505, 0.0367),
    4: (0.0331, 0.0245, 0.0115),
}
STUDENT = {2: (0.221, 0.208, 0.184), 3: (0.140, 0.121, 0.0664), 4: (0.102, 0.0752, 0.0257)}
STUDENT_GROUPS = {3: (0.137, 0.117, 0.0545), 4: (0.0984, 0.0664, 0.0167)}
TABLE = [
    *((gaussian, None, planes, errors) for planes, errors in GAUSSIAN.items()),
    *((heavy_tailed, None, planes, errors) for planes, errors in STUDENT.items()),
    *((heavy_tailed, 128, planes, errors) for planes, errors in STUDENT_GROUPS.items()),
]


def losses(weight: np.ndarray, encoding: BinaryEncoding, importance: np.ndarray | None = None) -> np.ndarray:
    """Weighted squared errors, float64 [N]."""
    squares = np.square(weight.astype(np.float64) - encoding.dequantize())
    total: np.ndarray = (squares if importance is None else squares * importance).sum(axis=1)
    return total


def proxy_losses(weight: np.ndarray, encoding: BinaryEncoding, second_moment: np.ndarray) -> np.ndarray:
    errors = weight.astype(np.float64) - encoding.dequantize()
    total: np.ndarray = np.einsum("nk,kl,nl->n", errors, second_moment.astype(np.float64), errors)
    return total


@pytest.mark.parametrize("fit", list(BinaryFit))
def test_a_sum_of_signs_is_found_exactly(fit: BinaryFit) -> None:
    """3, 1, -1, -3 are 2 and 1 with signs, whoever looks for them."""
    weight = np.array([[3, -1, 1, -3], [0.5, 0.5, -0.5, -0.5], [0, 0, 0, 0]], np.float32)
    encoding = binary_codes(weight, BinaryFormat.of(3, 2), fit=fit)
    np.testing.assert_array_equal(encoding.dequantize(), weight)
    np.testing.assert_array_equal(encoding.scales[:, 0, 0].astype(float) * encoding.gain, [2, 1])
    np.testing.assert_array_equal(encoding.codes[0], [0b11, 0b10, 0b01, 0b00])


def test_greedy_planes_by_hand() -> None:
    """Scale 2.5, then what is left of 4, 1, -2, -3: 1.5, -1.5, 0.5, -0.5, of mean magnitude 1."""
    weight = np.array([[4, 1, -2, -3]], np.float32)
    greedy = binary_codes(weight, BinaryFormat.of(1, 2), fit=BinaryFit.GREEDY)
    np.testing.assert_array_equal(greedy.dequantize(), [[3.5, 1.5, -1.5, -3.5]])
    # Least squares of the same signs: they are at right angles, so that nothing is gained.
    refined = binary_codes(weight, BinaryFormat.of(1, 2), fit=BinaryFit.REFINED)
    np.testing.assert_array_equal(refined.dequantize(), greedy.dequantize())


def test_an_offset_takes_the_mean_away() -> None:
    weight = np.array([[5, 7, 5, 7]], np.float32)
    encoding = binary_codes(weight, BinaryFormat.of(1, 1, offset=True), fit=BinaryFit.GREEDY)
    np.testing.assert_array_equal(encoding.dequantize(), weight)
    assert encoding.offsets is not None
    assert float(encoding.offsets[0, 0]) * encoding.gain == 6


@pytest.mark.parametrize(
    ("source", "group_size", "planes", "expected"),
    TABLE,
    ids=[f"{case[0].__name__} {case[1]} {case[2]}" for case in TABLE],
)
def test_errors_are_those_of_the_literature(source, group_size: int | None, planes: int, expected) -> None:
    """Alternating is better than stated where more starts and rounds find more."""
    weight = source(256, 512)
    format = BinaryFormat.of(256, planes, group_size)
    greedy, refined, alternating = (
        relative_error(weight, binary_codes(weight, format, fit=fit).dequantize()) for fit in BinaryFit
    )
    assert greedy == pytest.approx(expected[0], rel=0.06)
    assert refined == pytest.approx(expected[1], rel=0.06)
    assert 0.8 * expected[2] < alternating < 1.02 * expected[2]


@pytest.mark.parametrize("planes", range(1, 7))
@pytest.mark.parametrize("group_size", [None, 128])
@pytest.mark.parametrize("source", [gaussian, heavy_tailed])
def test_free_scales_beat_equal_steps(source, group_size: int | None, planes: int) -> None:
    weight = source(128, 512)
    binary = binary_codes(weight, BinaryFormat.of(128, planes, group_size))
    uniform = nearest(weight, UniformFormat(planes, group_size, ZeroPoint.MIDRISE))
    errors = [relative_error(weight, encoding.dequantize()) for encoding in (binary, uniform)]
    assert errors[0] < (1.001 if planes == 1 else 0.995) * errors[1]
    if source is heavy_tailed and planes in (3, 4, 5):
        assert errors[0] < 0.85 * errors[1]


@st.composite
def weights(draw: st.DrawFn) -> tuple[np.ndarray, BinaryFormat, np.ndarray | None, np.ndarray | None]:
    n, k = draw(st.integers(1, 6)), draw(st.integers(1, 80))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["gaussian", "heavy", "few values", "one sided", "zeros"]))
    weight = {
        "gaussian": rng.standard_normal((n, k)),
        "heavy": rng.standard_cauchy((n, k)),
        "few values": rng.choice([-1.0, 0.25, 3.0], (n, k)),
        "one sided": rng.exponential(size=(n, k)) + 5,
        "zeros": rng.standard_normal((n, k)) * rng.integers(0, 2, (n, 1)),
    }[kind] * 2.0 ** draw(st.integers(-40, 40))
    planes = np.array(draw(st.lists(st.integers(1, 6), min_size=n, max_size=n)))
    group = draw(st.sampled_from([None, 32, 64]))
    format, rows = BinaryFormat.by_row(planes, group, offset=draw(st.booleans()))
    importance = rng.exponential(size=k) if draw(st.booleans()) else None
    return weight.astype(np.float32), format, rows, importance


@given(weights())
@settings(max_examples=120, deadline=None)
def test_no_fit_is_worse_than_the_one_before_it(case) -> None:
    weight, format, rows, importance = case
    # A group whose importance sums up to little counts as much as others in the fit of its own.
    greedy, refined, alternating = (
        losses(weight, binary_codes(weight, format, importance, rows=rows, fit=fit), importance) for fit in BinaryFit
    )
    scale = np.square(weight.astype(np.float64)).sum(axis=1) * (1 if importance is None else importance.max())
    assert (refined <= greedy + 1e-10 * scale).all()
    assert (alternating <= refined + 1e-10 * scale).all()


@given(weights())
@settings(max_examples=60, deadline=None)
def test_codes_are_those_of_the_nearest_levels(case) -> None:
    """No other code of a group comes nearer to a weight, up to float32."""
    weight, format, rows, importance = case
    encoding = binary_codes(weight, format, importance, rows=rows)
    source = weight if rows is None else weight[rows]
    decoded = encoding.dequantize() if rows is None else encoding.dequantize()[rows]
    size = format.effective_group(weight.shape[1])
    for planes, run in format.runs():
        for r, k in itertools.product(range(run.start, run.stop), range(weight.shape[1])):
            group = k // size
            signs = np.array(list(itertools.product([-1, 1], repeat=planes)))
            levels = signs @ encoding.scales[:planes, r, group].astype(np.float64)
            levels += 0 if encoding.offsets is None else float(encoding.offsets[r, group])
            best = np.abs(levels * encoding.gain - source[r, k]).min()
            assert abs(decoded[r, k] - source[r, k]) <= best * (1 + 1e-5) + 1e-6 * np.abs(levels).max() * encoding.gain


def test_rows_of_several_widths_are_fitted_as_if_alone() -> None:
    weight, planes = heavy_tailed(50, 96), np.random.default_rng(0).integers(1, 7, 50)
    format, rows = BinaryFormat.by_row(planes, 32, offset=True)
    together = binary_codes(weight, format, rows=rows).dequantize()
    for width in range(1, 7):
        # The largest weight sets the gain, so it stays in.
        alone = binary_codes(weight, BinaryFormat.of(50, width, 32, offset=True)).dequantize()
        np.testing.assert_array_equal(together[planes == width], alone[planes == width])


@pytest.mark.parametrize("fit", list(BinaryFit))
@pytest.mark.parametrize("power", [-100, -20, 20, 100])
def test_huge_and_tiny_weights_are_coded_alike(power: int, fit: BinaryFit) -> None:
    weight = heavy_tailed(20, 70)
    plain, moved = (
        binary_codes(each, BinaryFormat.of(20, 3, 32), fit=fit) for each in (weight, weight * np.float32(2.0**power))
    )
    np.testing.assert_array_equal(moved.codes, plain.codes)
    np.testing.assert_array_equal(moved.dequantize(), plain.dequantize() * np.float32(2.0**power))


@pytest.mark.parametrize("fit", list(BinaryFit))
@pytest.mark.parametrize("planes", [1, 2, 6])
def test_rows_of_zeros_and_of_one_value_are_exact(planes: int, fit: BinaryFit) -> None:
    weight = np.zeros((4, 50), np.float32)
    weight[1:] = np.array([[0.75], [-3], [1]])
    for offset in (False, True):
        encoding = binary_codes(weight, BinaryFormat.of(4, planes, 32, offset=offset), fit=fit)
        np.testing.assert_allclose(encoding.dequantize(), weight, rtol=2e-3)
        np.testing.assert_array_equal(encoding.dequantize()[0], 0)


def test_what_counts_more_is_kept_better() -> None:
    weight, importance = heavy_tailed(64, 128), np.geomspace(0.01, 100, 128)
    format = BinaryFormat.of(64, 2, 64)
    plain, weighted = binary_codes(weight, format), binary_codes(weight, format, importance)
    assert losses(weight, weighted, importance).sum() < 0.9 * losses(weight, plain, importance).sum()
    assert losses(weight, plain).sum() < losses(weight, weighted).sum()


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("weighted", [False, True])
def test_errors_of_planes_are_those_of_codes(weighted: bool, group_size: int | None) -> None:
    weight = heavy_tailed(40, 100) * np.geomspace(1e-3, 1e3, 40, dtype=np.float32)[:, None]
    importance = np.geomspace(0.1, 1000, 100) if weighted else None
    errors = plane_errors(weight, BinaryFormat.of(40, 1, group_size), importance)
    assert errors.shape == (40, 6)
    assert (np.diff(errors, axis=1) <= 0).all()
    for planes in (1, 2, 5):
        encoding = binary_codes(weight, BinaryFormat.of(40, planes, group_size), importance)
        np.testing.assert_allclose(errors[:, planes - 1], losses(weight, encoding, importance), rtol=1e-3)


def test_what_can_not_be_fitted_is_refused() -> None:
    weight = gaussian(4, 40)
    with pytest.raises(ValueError, match="is for 5 rows, not 4"):
        binary_codes(weight, BinaryFormat.of(5, 2))
    with pytest.raises(ValueError, match=r"importance must be \[K\] = \[40\]"):
        binary_codes(weight, BinaryFormat.of(4, 2), np.ones(4))
    weight[0, 0] = np.nan
    with pytest.raises(ValueError, match="infinities or NaNs"):
        binary_codes(weight, BinaryFormat.of(4, 2))


@pytest.mark.parametrize("planes", range(1, 7))
@pytest.mark.parametrize("group_size", [None, 64])
def test_feedback_lowers_the_proxy_loss(group_size: int | None, planes: int) -> None:
    weight, second = heavy_tailed(96, 192), moment(192)
    factor = factorise(second, 192, 0.01, Order.ACTIVATION)
    format = BinaryFormat.of(96, planes, group_size)
    plain = relative_proxy_loss(weight, binary_codes(weight, format, factor.importance()).dequantize(), second)
    fed = relative_proxy_loss(weight, binary_feedback(weight, format, factor).dequantize(), second)
    assert fed < (0.65 if planes == 1 else 0.45) * plain
    uniform = error_feedback(weight, UniformFormat(planes, group_size), factor)
    assert fed < 1.01 * relative_proxy_loss(weight, uniform.dequantize(), second)


@given(weights(), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_feedback_is_worse_for_no_row(case, seed: int) -> None:
    weight, format, rows, _ = case
    factor = factorise(moment(weight.shape[1], seed), weight.shape[1], 0.01, Order.ACTIVATION)
    plain, once, twice = (
        proxy_losses(weight, encoding, factor.moment)
        for encoding in (
            binary_codes(weight, format, factor.importance(), rows=rows),
            binary_feedback(weight, format, factor, rows=rows, rounds=1),
            binary_feedback(weight, format, factor, rows=rows, rounds=2),
        )
    )
    scale = np.einsum("nk,kl,nl->n", weight, factor.moment, weight, dtype=np.float64)
    assert (once <= plain * (1 + FLOAT32) + 1e-6 * scale).all()
    assert (twice <= once * (1 + FLOAT32) + 1e-6 * scale).all()


def test_independent_inputs_leave_feedback_nothing_to_do() -> None:
    weight = heavy_tailed(32, 64)
    format = BinaryFormat.of(32, 3)
    plain, fed = binary_codes(weight, format), binary_feedback(weight, format, np.eye(64, dtype=np.float32))
    np.testing.assert_allclose(losses(weight, fed), losses(weight, plain), rtol=2e-3)


@pytest.mark.parametrize("offset", [False, True], ids=["", "offset"])
@pytest.mark.parametrize("order", list(Order))
def test_feedback_on_rows_of_several_widths(order: Order, offset: bool) -> None:
    weight, second = heavy_tailed(70, 100), moment(100)
    weight[3] = 0
    format, rows = BinaryFormat.by_row(np.random.default_rng(0).integers(1, 5, 70), 32, offset=offset)
    encoding = binary_feedback(weight, format, second, rows=rows, order=order)
    plain = binary_codes(weight, format, np.diagonal(second), rows=rows)
    assert encoding.format == plain.format == format
    assert relative_proxy_loss(weight, encoding.dequantize(), second) < 0.7 * relative_proxy_loss(
        weight, plain.dequantize(), second
    )
    np.testing.assert_allclose(encoding.dequantize()[3], 0, atol=1e-6)


def test_a_block_at_a_time_is_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, second = heavy_tailed(50, 64), moment(64)
    format, rows = BinaryFormat.by_row(np.random.default_rng(0).integers(1, 4, 50))
    whole = binary_feedback(weight, format, second, rows=rows)
    monkeypatch.setattr("onnxq.solvers.binary_feedback._BLOCK_ELEMENTS", 64 * 7)
    np.testing.assert_allclose(
        binary_feedback(weight, format, second, rows=rows).dequantize(), whole.dequantize(), atol=1e-3
    )


def test_options_that_make_no_sense_are_refused() -> None:
    weight = gaussian(4, 40)
    with pytest.raises(ValueError, match="rounds=0 must be 1 or more"):
        binary_feedback(weight, BinaryFormat.of(4, 2), moment(40), rounds=0)
    with pytest.raises(ValueError, match="damping=-1 must not be negative"):
        binary_feedback(weight, BinaryFormat.of(4, 2), moment(40), damping=-1)
    with pytest.raises(ValueError, match=r"must be \[K, K\] = \[40, 40\]"):
        binary_feedback(weight, BinaryFormat.of(4, 2), moment(20))
