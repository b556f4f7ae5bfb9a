from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.errors import CalibrationError
from onnxq.formats.uniform import UniformEncoding, UniformFormat, ZeroPoint
from onnxq.solvers import error_feedback as module
from onnxq.solvers import factor as factor_module
from onnxq.solvers.error_feedback import error_feedback
from onnxq.solvers.factor import Order, factorise_upper
from onnxq.solvers.loss import relative_proxy_loss
from onnxq.solvers.nearest import nearest
from tests.solvers.cases import gaussian, heavy_tailed, moment

DAMPING = 0.01


def gptq(weight: np.ndarray, encoding: UniformEncoding, second_moment: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Codes of GPTQ as published, with the inverse of H, in float64, on the grid of an encoding."""
    k = weight.shape[1]
    size = encoding.format.effective_group(k)
    steps = np.repeat(encoding.effective_scales(), size, axis=1)[:, :k].astype(np.float64)
    zeros = encoding.format.zero_of(encoding.zero_points)
    zeros = np.broadcast_to(zeros if zeros.size == 1 else np.repeat(zeros, size, axis=1)[:, :k], weight.shape)
    h = second_moment.astype(np.float64)
    h = (h + DAMPING * np.diagonal(h).mean() * np.eye(k))[np.ix_(order, order)]
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    left = weight.astype(np.float64)[:, order]
    codes = np.zeros(weight.shape, np.uint8)
    for j, column in enumerate(order):
        step, zero = steps[:, column], zeros[:, column]
        codes[:, column] = np.clip(np.rint(left[:, j] / step + zero), 0, encoding.format.levels - 1)
        error = (left[:, j] - (codes[:, column] - zero) * step) / upper[j, j]
        left[:, j:] -= np.outer(error, upper[j, j:])
    return codes


def loss(weight: np.ndarray, encoding: UniformEncoding, second_moment: np.ndarray) -> float:
    return relative_proxy_loss(weight, encoding.dequantize(), second_moment)


def test_errors_cancel_where_inputs_are_equal() -> None:
    """With all inputs alike only the sum of a row counts; feedback keeps it to half a step."""
    weight = np.full((4, 8), 0.4, np.float32)
    weight[:, 0], weight[:, 1] = 7.0, -8.0
    weight[1:] += np.array([[0.05], [-0.07], [0.02]], np.float32)
    format = UniformFormat(4, None, ZeroPoint.INTEGER)
    alike = np.ones((8, 8), np.float32)
    fed = error_feedback(weight, format, alike, damping=1e-4, order=Order.NATURAL, refit=False)
    step = np.abs(fed.effective_scales()[:, 0])
    assert np.all(np.abs((weight - fed.dequantize()).sum(axis=1)) <= 0.51 * step)
    plain = nearest(weight, format)
    assert np.abs((weight - plain.dequantize()).sum(axis=1)).max() > 1.5 * step.max()


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize(
    "format",
    [
        UniformFormat(2, None, ZeroPoint.MIDRISE),
        UniformFormat(3, 32, ZeroPoint.PER_GROUP),
        UniformFormat(4, 64, ZeroPoint.INTEGER),
        UniformFormat(8, 32, ZeroPoint.PER_GROUP_INTEGER),
    ],
)
def test_it_is_gptq(format: UniformFormat, order: Order) -> None:
    weight, second_moment = heavy_tailed(24, 200), moment(200)
    encoding = error_feedback(weight, format, second_moment, damping=DAMPING, order=order, refit=False, block_size=16)
    visit = np.arange(200) if order is Order.NATURAL else np.argsort(-np.diagonal(second_moment), kind="stable")
    # float32 decides a tie otherwise now and then, and what follows in that row with it.
    same_rows = (encoding.codes == gptq(weight, encoding, second_moment, visit)).all(axis=1)
    assert same_rows.mean() > 0.8


@pytest.mark.parametrize("size", [1, 5, 64, 150])
def test_the_factor_is_upper_and_multiplies_back(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor_module, "_FACTOR_BLOCK", 64)
    original = moment(size).astype(np.float64) + 0.01 * np.eye(size)
    factor = original.copy()
    factorise_upper(factor)
    factor = np.triu(factor)
    np.testing.assert_allclose(factor @ factor.T, original, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(
    st.builds(
        UniformFormat,
        bits=st.integers(1, 8),
        group_size=st.sampled_from((32, 64, 128, None)),
        zero_point=st.sampled_from(ZeroPoint),
    ),
    st.integers(1, 4),
    st.integers(1, 150),
    st.sampled_from(Order),
    st.integers(0, 1),
)
def test_every_shape_and_format_works(format: UniformFormat, n: int, k: int, order: Order, sweeps: int) -> None:
    weight = heavy_tailed(n, k, k)
    encoding = error_feedback(weight, format, moment(k), order=order, sweeps=sweeps)
    assert encoding.shape == (n, k)
    assert encoding.codes.max() < format.levels
    assert np.isfinite(encoding.dequantize()).all()


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("group_size", [32, 128, None])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_feedback_beats_nearest_rounding(bits: int, group_size: int | None, order: Order) -> None:
    weight, second_moment = heavy_tailed(16, 256), moment(256)
    format = UniformFormat(bits, group_size, ZeroPoint.PER_GROUP)
    fed = loss(weight, error_feedback(weight, format, second_moment, order=order), second_moment)
    assert fed < 0.6 * loss(weight, nearest(weight, format, np.diagonal(second_moment)), second_moment)


def test_activation_order_pays_where_inputs_differ_and_keeps_the_layout() -> None:
    weight, second_moment = heavy_tailed(64, 256), moment(256)
    format = UniformFormat(3, 64, ZeroPoint.MIDRISE)
    natural, ordered = (error_feedback(weight, format, second_moment, order=order) for order in Order)
    assert ordered.codes.shape == natural.codes.shape
    assert ordered.scales.shape == natural.scales.shape
    assert loss(weight, ordered, second_moment) < 0.95 * loss(weight, natural, second_moment)


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("zero_point", ZeroPoint)
def test_refit_and_sweeps_lower_the_loss(zero_point: ZeroPoint, order: Order) -> None:
    weight, second_moment = heavy_tailed(32, 192), moment(192)
    format = UniformFormat(3, 32, zero_point)
    losses = [
        loss(weight, error_feedback(weight, format, second_moment, order=order, **options), second_moment)
        for options in ({"refit": False}, {}, {"sweeps": 1}, {"sweeps": 3})
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < 0.995 * losses[0]
    assert losses[3] < 0.99 * losses[1]


@pytest.mark.parametrize("order", Order)
def test_a_weight_on_its_grid_is_left_alone(order: Order) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (6, 96)).astype(np.float32)
    codes[:, ::32], codes[:, 1::32] = 0, 15
    weight = (codes - 7.5) * np.float32(0.125)
    encoding = error_feedback(weight, UniformFormat(4, 32, ZeroPoint.MIDRISE), moment(96), order=order)
    np.testing.assert_array_equal(encoding.dequantize(), weight)


@pytest.mark.parametrize("order", Order)
def test_white_inputs_need_no_feedback(order: Order) -> None:
    weight, format = gaussian(8, 128), UniformFormat(3, 32, ZeroPoint.PER_GROUP)
    fed = error_feedback(weight, format, 5 * np.eye(128, dtype=np.float32), order=order, refit=False)
    np.testing.assert_array_equal(fed.codes, nearest(weight, format).codes)


@pytest.mark.parametrize("order", Order)
def test_inputs_that_are_never_used_are_rounded_to_nearest(order: Order) -> None:
    weight, second_moment = gaussian(8, 96), moment(96)
    dead = np.arange(0, 96, 3)
    second_moment[dead], second_moment[:, dead] = 0, 0
    encoding = error_feedback(weight, UniformFormat(4, 32), second_moment, order=order, damping=0.0)
    step = np.repeat(encoding.effective_scales(), 32, axis=1)
    levels = np.clip(np.rint(weight / step + 7.5), 0, 15)
    near = levels == encoding.codes
    # The refit moves scales a little after rounding, so a weight on the edge between two levels may differ.
    assert near[:, dead].mean() > 0.97 > near.mean()


def test_no_input_at_all_is_nearest_rounding() -> None:
    weight, format = gaussian(4, 64), UniformFormat(4, 32)
    fed = error_feedback(weight, format, np.zeros((64, 64), np.float32), refit=False)
    np.testing.assert_array_equal(fed.codes, nearest(weight, format).codes)


def test_rows_do_not_know_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows are an implementation matter: one row at a time gives the same loss."""
    weight, second_moment, format = heavy_tailed(9, 128), moment(128), UniformFormat(3, 32)
    whole = error_feedback(weight, format, second_moment)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 256)
    parts = error_feedback(weight[::-1], format, second_moment)
    # Products of other shapes sum in another order, which may tip a tie.
    assert (parts.codes[::-1] == whole.codes).mean() > 0.99
    assert loss(weight[::-1], parts, second_moment) == pytest.approx(loss(weight, whole, second_moment), rel=0.01)


def test_the_block_size_changes_nothing_but_the_speed() -> None:
    weight, second_moment, format = heavy_tailed(16, 256), moment(256), UniformFormat(3, 32)
    losses = [
        loss(weight, error_feedback(weight, format, second_moment, block_size=size), second_moment)
        for size in (1, 32, 256)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=0.01)


def test_the_same_call_gives_the_same_bits() -> None:
    weight, second_moment, format = heavy_tailed(16, 128), moment(128), UniformFormat(2, 64)
    first, second = (error_feedback(weight, format, second_moment, sweeps=1) for _ in range(2))
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(first.scales, second.scales)


def test_the_scale_of_the_moment_does_not_matter() -> None:
    weight, second_moment, format = heavy_tailed(16, 128), moment(128), UniformFormat(2, 64)
    first, second = (error_feedback(weight, format, second_moment * np.float32(by)) for by in (1, 2.0**-40))
    np.testing.assert_array_equal(first.codes, second.codes)


def test_few_samples_leave_a_singular_moment_that_damping_mends() -> None:
    inputs, weight = gaussian(10, 64, 3), gaussian(8, 64)
    second_moment = inputs.T @ inputs / 10
    format = UniformFormat(3, 32)
    for damping in (0.0, 0.01):
        fed = error_feedback(weight, format, second_moment, damping=damping)
        assert loss(weight, fed, second_moment) < 0.3 * loss(weight, nearest(weight, format), second_moment)


def test_a_moment_that_is_none_is_refused() -> None:
    weight, format = gaussian(2, 32), UniformFormat(4)
    indefinite = np.full((32, 32), 100, np.float32) - 99 * np.eye(32, dtype=np.float32)
    with pytest.raises(CalibrationError, match=r"not positive definite.*x x\^T"):
        error_feedback(weight, format, indefinite)
    with pytest.raises(ValueError, match=r"\[K, K\] = \[32, 32\], not \[16, 16\]"):
        error_feedback(weight, format, np.eye(16))
    with pytest.raises(ValueError, match="NaN"):
        error_feedback(weight, format, np.full((32, 32), np.nan))


@pytest.mark.parametrize("option", [{"damping": -1.0}, {"sweeps": -1}, {"block_size": 0}])
def test_options_out_of_range_are_refused(option: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        error_feedback(gaussian(2, 32), UniformFormat(4), np.eye(32), **option)
