"""Grids of eight bits and where to clip: by hand, against ONNX Runtime, and properties that hold for any data."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx.helper as oh
import onnxruntime as ort
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onnxq.calibration.clipping import (
    FLOAT8,
    INTEGERS,
    KINDS,
    METHODS,
    ActivationScale,
    choose_clip,
    expected_error,
    expected_token_error,
    largest,
    round_tokens,
    round_with,
)
from onnxq.calibration.ranges import RangeAccumulator, RangeStatistics

TYPES = {
    "e4m3fn": onnx.TensorProto.FLOAT8E4M3FN,
    "e5m2": onnx.TensorProto.FLOAT8E5M2,
    "uint8": onnx.TensorProto.UINT8,
    "int8": onnx.TensorProto.INT8,
}
PAIRS = [(kind, method) for kind in KINDS for method in METHODS if method != "entropy" or kind in INTEGERS]


def gathered(values: np.ndarray) -> RangeStatistics:
    total = RangeAccumulator()
    total.add(np.asarray(values, np.float32).reshape(-1, np.shape(values)[-1]))
    return total.finish()


def true_error(values: np.ndarray, scale: ActivationScale) -> float:
    return float(np.mean((round_with(values, scale).astype(np.float64) - values) ** 2))


def on_onnx_runtime(x: np.ndarray, scale: ActivationScale) -> np.ndarray:
    step = onnx.numpy_helper.from_array(np.array(scale.scale, np.float32), "s")
    if scale.zero_point is None:
        initializers = [step]
        quantize = oh.make_node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=TYPES[scale.kind])
    else:
        initializers = [step, onnx.numpy_helper.from_array(np.array(scale.zero_point, scale.kind), "z")]
        quantize = oh.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
    nodes = [quantize, oh.make_node("DequantizeLinear", ["q", *quantize.input[1:]], ["y"])]
    ends = [oh.make_tensor_value_info(name, 1, ["n"]) for name in ("x", "y")]
    graph = oh.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10)
    return ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1.0, 0.0371, 3.3e-5, 2.0**-9])
def test_rounding_is_onnx_runtimes(kind: str, step: float) -> None:
    scale = ActivationScale(kind, float(np.float32(step)), None if kind in FLOAT8 else 11)  # type: ignore[arg-type]
    if kind in FLOAT8:
        grid = np.arange(256, dtype=np.uint8).view(FLOAT8[kind].dtype).astype(np.float32)
        grid = np.unique(grid[np.isfinite(grid)])
    else:
        grid = np.arange(-300, 300, dtype=np.float32)
    middle = (grid[1:] + grid[:-1]) / 2
    points = np.concatenate([grid, middle, grid * 3]) * np.float32(scale.scale)
    x = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))])
    np.testing.assert_array_equal(round_with(x, scale), on_onnx_runtime(x, scale))
    if kind in FLOAT8:
        edge = np.array([np.inf, -np.inf, np.nan, 3e38, -3e38], np.float32)
        np.testing.assert_array_equal(round_with(edge, scale), on_onnx_runtime(edge, scale))


def test_scales_by_hand() -> None:
    statistics = gathered([[-1.0, 3.0, 0.5, 0.0]])
    assert choose_clip(statistics, "e4m3fn") == ActivationScale("e4m3fn", float(np.float32(3 / 448)))
    assert choose_clip(statistics, "e5m2") == ActivationScale("e5m2", float(np.float32(3 / 57344)))
    assert choose_clip(statistics, "int8") == ActivationScale("int8", float(np.float32(3 / 127)), 0)
    # 4 / 255 a step: -1 is 63.75 steps below zero.
    assert choose_clip(statistics, "uint8") == ActivationScale("uint8", float(np.float32(4 / 255)), 64)
    assert choose_clip(statistics, "e4m3fn", powers_of_two=True).scale == 2.0**-7
    assert choose_clip(gathered([[7.0, 448.0]]), "e4m3fn", powers_of_two=True).scale == 1.0


@pytest.mark.parametrize(("values", "zero_point"), [([2.0, 5.1], 0), ([-2.0, -5.1], 255), ([0.0, 5.1], 0)])
def test_the_range_of_uint8_holds_zero(values: list[float], zero_point: int) -> None:
    scale = choose_clip(gathered([values]), "uint8")
    assert scale == ActivationScale("uint8", float(np.float32(np.float32(5.1) / 255)), zero_point)
    assert round_with(np.zeros(1, np.float32), scale) == 0


def test_percentile_by_hand() -> None:
    values = np.concatenate([np.full(90, 1.0), np.full(9, -2.0), [512.0]])[None]
    statistics = gathered(values)
    clip = {p: choose_clip(statistics, "int8", "percentile", percentile=p).scale * 127 for p in (50, 90, 95, 99, 100)}
    for percentile, value in ((50, 1.0), (90, 1.0), (95, 2.0), (99, 2.0), (100, 512.0)):
        assert clip[percentile] == pytest.approx(value, rel=1 / 32)  # the width of a bin
    half = gathered(np.concatenate([np.zeros(99), [4.0]])[None])
    assert choose_clip(half, "int8", "percentile", percentile=50).scale * 127 == pytest.approx(4.0, rel=1 / 32)


def test_mse_gives_up_one_outlier_for_many_values() -> None:
    """One value of 256 costs int8 a step of 2: the rest, up to 1, would all be zero."""
    values = np.append(np.random.default_rng(0).uniform(-1, 1, 1_000_000), 256.0)[None]
    statistics = gathered(values)
    assert choose_clip(statistics, "int8", "mse").scale * 127 < 64
    assert choose_clip(statistics, "e4m3fn", "mse").scale * 448 > 240  # float8 has steps for both


def test_entropy_clips_long_tails_and_keeps_even_data() -> None:
    rng = np.random.default_rng(0)
    even = gathered(rng.uniform(-1, 1, (256, 400)))
    assert choose_clip(even, "int8", "entropy").scale * 127 > 0.9
    tailed = gathered(rng.standard_t(3, (256, 400)))
    assert choose_clip(tailed, "int8", "entropy").scale * 127 < 0.5 * tailed.largest
    with pytest.raises(ValueError, match="float8 steps follow the values"):
        choose_clip(tailed, "e4m3fn", "entropy")


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).standard_normal((400, 64)),
        np.random.default_rng(1).standard_t(4, (400, 64)),
        np.maximum(np.random.default_rng(2).standard_normal((400, 64)), 0),
        np.exp(np.random.default_rng(3).standard_normal((400, 64)) - 8),
    ],
    ids=["normal", "long tails", "relu", "log-normal"],
)
@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_the_histogram_predicts_the_error(values: np.ndarray, kind: str, method: str) -> None:
    values = values.astype(np.float32)
    statistics = gathered(values)
    scale = choose_clip(statistics, kind, method)  # type: ignore[arg-type]
    assert expected_error(statistics, scale) == pytest.approx(true_error(values, scale), rel=0.1)


def test_a_scale_for_each_row() -> None:
    rows = np.array([[1.0, -448.0, 0.3], [0.0, 0.0, 0.0], [1e-3, 2e-3, -5e-4], [1e-45, 0.0, 0.0]], np.float32)
    got = round_tokens(rows, "e4m3fn")
    for row, rounded in zip(rows[:3:2], got[:3:2], strict=True):
        scale = ActivationScale("e4m3fn", float(np.abs(row).max() / np.float32(448)))
        np.testing.assert_array_equal(rounded, round_with(row, scale))
    np.testing.assert_array_equal(got[[1, 3]], np.zeros((2, 3)))
    reference = (rows[0] / np.float32(1)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(got[0], reference)
    with pytest.raises(ValueError, match="rounded to float8, not int8"):
        round_tokens(rows, "int8")


def test_rows_of_different_size_are_rounded_better_each_by_itself() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((200, 64)) * np.exp2(rng.uniform(-12, 12, (200, 1)))).astype(np.float32)
    statistics = gathered(rows)
    by_token = expected_token_error(statistics, "e4m3fn")
    true = float(np.mean((round_tokens(rows, "e4m3fn").astype(np.float64) - rows) ** 2))
    assert by_token == pytest.approx(true, rel=1e-6)
    assert by_token < expected_error(statistics, choose_clip(statistics, "e4m3fn", "mse"))


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_zeros_get_scale_one(kind: str, method: str) -> None:
    for statistics in (gathered(np.zeros((3, 4))), RangeAccumulator().finish()):
        scale = choose_clip(statistics, kind, method)  # type: ignore[arg-type]
        assert (scale.scale, scale.zero_point or 0) == (1.0, 0)
        assert expected_error(statistics, scale) == 0.0


FINITE = st.floats(-float(np.finfo(np.float32).max), float(np.finfo(np.float32).max), width=32)
USUAL = st.floats(-64, 64, width=32)


@settings(deadline=None, max_examples=60)
@given(arrays(np.float32, (6, 4), elements=st.one_of(FINITE, USUAL)), st.sampled_from(PAIRS), st.booleans())
def test_any_data_gets_a_scale(values: np.ndarray, pair: tuple[str, str], powers: bool) -> None:
    scale = choose_clip(gathered(values), *pair, powers_of_two=powers)  # type: ignore[arg-type]
    assert np.isfinite(scale.scale)
    assert np.float32(scale.scale) > 0
    if powers:
        assert np.frexp(scale.scale)[0] == 0.5
    with np.errstate(over="ignore"):
        rounded = round_with(values, scale)
    assert not np.isnan(rounded).any()
    np.testing.assert_array_equal(rounded[values == 0], 0)


@settings(deadline=None, max_examples=60)
@given(arrays(np.float32, (6, 8), elements=USUAL), st.sampled_from(KINDS), st.floats(50, 100))
def test_mse_is_never_worse_and_percentiles_never_wider(values: np.ndarray, kind: str, percentile: float) -> None:
    statistics = gathered(values)
    amax = choose_clip(statistics, kind)  # type: ignore[arg-type]
    mse = choose_clip(statistics, kind, "mse")  # type: ignore[arg-type]
    assert expected_error(statistics, mse) <= expected_error(statistics, amax)
    assert choose_clip(statistics, kind, "percentile", percentile=percentile).scale <= amax.scale  # type: ignore[arg-type]
    assert choose_clip(statistics, kind, "percentile", percentile=100) == amax  # type: ignore[arg-type]


@settings(deadline=None, max_examples=60)
@given(arrays(np.float32, (6, 8), elements=USUAL), st.sampled_from(KINDS))
def test_amax_clips_nothing(values: np.ndarray, kind: str) -> None:
    """No value moves by more than half a step, the zero point's rounding at the ends of uint8 counted."""
    assume(np.abs(values).max() > 1e-30)
    scale = choose_clip(gathered(values), kind)  # type: ignore[arg-type]
    moved = np.abs(round_with(values, scale).astype(np.float64) - values)
    if kind in INTEGERS:
        assert moved.max() <= scale.scale * (1.0 if kind == "uint8" else 0.5) * (1 + 1e-5)
    else:
        half = 2.0 ** -(FLOAT8[kind].mantissa_bits + 1)
        subnormal = scale.scale * 2.0 ** (-FLOAT8[kind].bias - FLOAT8[kind].mantissa_bits)
        assert (moved <= np.maximum(np.abs(values) * half, subnormal) * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("e3m4", 1.0), "none of"),
        (("e4m3fn", 0.0), "above zero"),
        (("e4m3fn", float("nan")), "above zero"),
        (("e4m3fn", 0.1), "normal float32"),
        (("e4m3fn", 1.0, 0), "float8 none"),
        (("uint8", 1.0), "integers have one"),
        (("int8", 1.0, 128), "is no int8"),
    ],
)
def test_scales_that_mean_nothing_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationScale(*arguments)  # type: ignore[arg-type]


def test_what_choose_clip_refuses() -> None:
    statistics = gathered([[1.0, 2.0]])
    with pytest.raises(ValueError, match="none of amax, percentile, mse, entropy"):
        choose_clip(statistics, "int8", "best")  # type: ignore[arg-type]
    for percentile in (0, 101, float("nan")):
        with pytest.raises(ValueError, match="above 0 and at most 100"):
            choose_clip(statistics, "int8", "percentile", percentile=percentile)


def test_largest() -> None:
    assert [largest(kind) for kind in ("e4m3fn", "e5m2", "int8")] == [448.0, 57344.0, 127.0]
