"""The trellis solver: better than what it is to replace, for every shape, and the same however it is cut up."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from onnxq.errors import CalibrationError
from onnxq.formats.codebook import CodebookFormat
from onnxq.formats.framed import FramedFormat, frames_of, into_frames
from onnxq.formats.tables import GAUSSIAN_TABLES
from onnxq.formats.uniform import UniformFormat, ZeroPoint
from onnxq.solvers import trellis as module
from onnxq.solvers.error_feedback import error_feedback
from onnxq.solvers.factor import Order
from onnxq.solvers.loss import relative_error, relative_proxy_loss
from onnxq.solvers.trellis import trellis_feedback, trellis_nearest
from tests.solvers.cases import gaussian, heavy_tailed, moment

FORMATS = sorted(GAUSSIAN_TABLES)
SAME_LOSS = 0.01
"""Sums in another order tip ties, and what follows with them."""


def loss(weight: np.ndarray, encoding, second_moment: np.ndarray) -> float:
    return relative_proxy_loss(weight, encoding.dequantize(), second_moment)


@pytest.mark.parametrize(
    ("bits", "window", "order"),
    [
        (1, 4, Order.NATURAL),
        (2, 2, Order.NATURAL),
        (2, 4, Order.NATURAL),
        (2, 4, Order.ACTIVATION),
        (2, 6, Order.ACTIVATION),
        (3, 4, Order.ACTIVATION),
        (4, 6, Order.NATURAL),
    ],
)
def test_feedback_beats_nearest_and_the_uniform_grid(bits: int, window: int, order: Order) -> None:
    weight, second_moment = gaussian(384, 128), moment(128)
    format = CodebookFormat(bits, window)
    fed = loss(weight, trellis_feedback(weight, format, second_moment, order=order), second_moment)
    assert fed < 0.6 * loss(weight, trellis_nearest(weight, format), second_moment)
    if window > bits:
        uniform = UniformFormat(bits, None, ZeroPoint.MIDRISE)
        assert fed < 0.95 * loss(weight, error_feedback(weight, uniform, second_moment, order=order), second_moment)


def test_in_a_frame_it_beats_the_uniform_grid_on_heavy_tails() -> None:
    weight, second_moment = heavy_tailed(256, 160), moment(160)
    inputs, _ = frames_of(FramedFormat(CodebookFormat(2, 4), Fraction(1)), 256, 160)
    framed, carried = into_frames(weight, inputs, None), inputs.carry(second_moment)
    fed = loss(framed, trellis_feedback(framed, CodebookFormat(2, 4), carried), carried)
    uniform = UniformFormat(2, 64, ZeroPoint.MIDRISE)
    assert fed < 0.85 * loss(weight, error_feedback(weight, uniform, second_moment), second_moment)


@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 100), (20, 33), (32, 64), (33, 96), (100, 70)])
@pytest.mark.parametrize(("bits", "window"), [(2, 4), (1, 6), (3, 3)])
def test_every_shape(bits: int, window: int, n: int, k: int, group_size: int | None) -> None:
    weight, second_moment = heavy_tailed(n, k), moment(k)
    format = CodebookFormat(bits, window, group_size)
    fed = trellis_feedback(weight, format, second_moment)
    for encoding in (fed, trellis_nearest(weight, format)):
        assert encoding.shape == (n, k)
        assert encoding.codes.max() < 1 << bits
        assert np.isfinite(encoding.dequantize()).all()
        assert encoding.format == format
    if n > 96 or window == bits:
        assert (
            loss(weight, trellis_feedback(weight, format, second_moment), second_moment)
            < {1: 1.0, 2: 0.15, 3: 0.06}[bits]
        )


@pytest.mark.parametrize("n", [1, 33, 50])
def test_padding_rows_help_and_are_not_seen(n: int) -> None:
    """Their codes are free: a single row in the last tile is coded as well as in a full one."""
    weight = gaussian(n, 128)
    encoding = trellis_nearest(weight, CodebookFormat(2, 4))
    assert len(encoding.codes) % 32 == 0
    assert encoding.dequantize().shape == (n, 128)
    padded = np.zeros((len(encoding.codes), 128), np.float32)
    padded[:n] = weight
    full = trellis_nearest(padded, CodebookFormat(2, 4))
    np.testing.assert_array_equal(full.dequantize()[:n], encoding.dequantize())


def test_a_row_of_zeros_stays_zero_and_disturbs_nobody() -> None:
    weight, second_moment = gaussian(64, 96), moment(96)
    weight[40] = 0
    encoding = trellis_feedback(weight, CodebookFormat(2, 4), second_moment)
    assert not encoding.dequantize()[40].any()
    assert loss(weight, encoding, second_moment) < 0.1
    nothing = trellis_feedback(np.zeros((5, 40), np.float32), CodebookFormat(2, 4), np.eye(40, dtype=np.float32))
    assert not nothing.dequantize().any()


@pytest.mark.parametrize("n", [32, 70])
def test_lanes_are_an_implementation_matter(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, second_moment, format = heavy_tailed(n, 96), moment(96), CodebookFormat(2, 4)
    whole = trellis_feedback(weight, format, second_moment)
    tiles = -(-n // 32)
    for lanes in (1, 5, 31):
        monkeypatch.setattr(module, "_BLOCK_ELEMENTS", lanes * tiles * 96)
        parts = trellis_feedback(weight, format, second_moment)
        assert (parts.codes[:n] == whole.codes[:n]).mean() > 0.98
        assert loss(weight, parts, second_moment) == pytest.approx(loss(weight, whole, second_moment), rel=SAME_LOSS)


def test_columns_of_nearest_are_an_implementation_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, format = gaussian(70, 100), CodebookFormat(2, 6, 32)
    whole = trellis_nearest(weight, format)
    monkeypatch.setattr(module, "_PATH_ELEMENTS", 7 * (96 << 6))
    np.testing.assert_array_equal(trellis_nearest(weight, format).codes, whole.codes)


@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize(("bits", "window"), FORMATS)
def test_fitting_scales_never_raises_the_loss(bits: int, window: int, group_size: int | None) -> None:
    weight, format = heavy_tailed(48, 96), CodebookFormat(bits, window, group_size)
    second_moment = moment(96)
    plain, fitted = (trellis_feedback(weight, format, second_moment, refit=refit) for refit in (False, True))
    np.testing.assert_array_equal(plain.codes, fitted.codes)
    # The solver minimises the damped loss; so does this.
    damped = second_moment + 0.01 * np.diagonal(second_moment).mean() * np.eye(96, dtype=np.float32)
    for n in range(48):
        rows = (encoding.dequantize()[n : n + 1] for encoding in (plain, fitted))
        before, after = (relative_proxy_loss(weight[n : n + 1], row, damped) for row in rows)
        assert after <= before * (1 + 1e-4)
    assert loss(weight, fitted, damped) < loss(weight, plain, damped)


def test_spread_widens_the_steps() -> None:
    weight, second_moment, format = gaussian(40, 64), moment(64), CodebookFormat(2, 4)
    narrow, wide = (
        trellis_feedback(weight, format, second_moment, spread=spread, refit=False) for spread in (1.0, 1.25)
    )
    ratio = wide.scales.astype(np.float64) * wide.gain / (narrow.scales.astype(np.float64) * narrow.gain)
    np.testing.assert_allclose(ratio, 1.25, rtol=2e-3)
    nearest = trellis_nearest(weight, format, spread=1.25)
    np.testing.assert_array_equal(nearest.scales, wide.scales)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_any_magnitude_of_weights_and_moments(magnitude: float) -> None:
    weight, second_moment, format = gaussian(40, 64), moment(64), CodebookFormat(2, 4)
    reference = trellis_feedback(weight, format, second_moment)
    scaled = trellis_feedback(weight * np.float32(magnitude), format, second_moment)
    error = relative_error(weight.astype(np.float64), scaled.dequantize() / magnitude)
    assert error == pytest.approx(relative_error(weight, reference.dequantize()), rel=0.05)


def test_the_same_call_gives_the_same_bits() -> None:
    weight, second_moment, format = heavy_tailed(40, 64), moment(64), CodebookFormat(2, 6)
    first, second = (trellis_feedback(weight, format, second_moment) for _ in range(2))
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(first.scales, second.scales)


def test_bad_arguments_are_refused() -> None:
    weight, format = gaussian(4, 32), CodebookFormat(2, 4)
    broken = weight.copy()
    broken[0, 0] = np.nan
    with pytest.raises(ValueError, match="infinities or NaNs"):
        trellis_nearest(broken, format)
    with pytest.raises(ValueError, match="infinities or NaNs"):
        trellis_feedback(broken, format, moment(32))
    with pytest.raises(ValueError, match=r"must be \[K, K\] = \[32, 32\]"):
        trellis_feedback(weight, format, moment(33))
    with pytest.raises(ValueError, match="with elements in it"):
        trellis_nearest(np.zeros((0, 32), np.float32), format)
    with pytest.raises(CalibrationError, match="not positive definite"):
        trellis_feedback(weight, format, -1000 * np.ones((32, 32), np.float32) + 1001 * np.eye(32, dtype=np.float32))
