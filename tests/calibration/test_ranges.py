"""What rounding of activations is told of a tensor: extremes, histogram and sampled rows, by hand and in models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onnxq.calibration import (
    RangeStatistics,
    TapRequest,
    collect,
    load_statistics,
    model_inputs,
    open_data,
    save_statistics,
    statistics_bytes,
)
from onnxq.calibration.ranges import BINS, SAMPLED_ROWS, RangeAccumulator, bin_edges
from onnxq.errors import CalibrationError
from tests.calibration.models import HEADER, H, K, Loaded, parse, tap, token_feeds, token_model, token_rows, weight


def gathered(*blocks: np.ndarray, seed: int = 0) -> RangeStatistics:
    total = RangeAccumulator(seed)
    for block in blocks:
        total.add(block)
    return total.finish()


def assert_equal(first: RangeStatistics, second: RangeStatistics) -> None:
    for name in ("count", "minimum", "maximum", "zeros"):
        assert getattr(first, name) == getattr(second, name)
    assert first.mean_square == pytest.approx(second.mean_square)
    for name in ("negative", "positive", "rows", "keys"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_values_fall_in_the_bins_of_their_magnitude() -> None:
    rows = np.array([[1.0, -1.0, 0.0, 1.03125], [-0.0, 1.5, 2.0**-41, -(2.0**25)]], np.float32)
    found = gathered(rows)
    edges = bin_edges()
    (places,) = np.nonzero(found.positive)
    np.testing.assert_array_equal(edges[places], [2.0**-40, 1.0, 1.03125, 1.5])
    (places,) = np.nonzero(found.negative)
    assert places.tolist() == [np.flatnonzero(edges == 1.0)[0], BINS - 1]
    assert (found.count, found.zeros, found.elements) == (2, 2, 8)
    assert (found.minimum, found.maximum, found.largest) == (-(2.0**25), 1.5, 2.0**25)


def test_edges_are_exact_floats_and_rise() -> None:
    edges = bin_edges()
    assert edges.shape == (BINS + 1,)
    assert (np.diff(edges) > 0).all()
    np.testing.assert_array_equal(edges, edges.astype(np.float32))


@settings(deadline=None)
@given(arrays(np.float32, (7, 5), elements=st.floats(-(2.0**23), 2.0**23, width=32)))
def test_every_value_is_counted_where_its_magnitude_lies(rows: np.ndarray) -> None:
    found = gathered(rows)
    edges = bin_edges()
    for counts, values in ((found.positive, rows[rows > 0]), (found.negative, -rows[rows < 0])):
        expected = np.histogram(np.maximum(values.astype(np.float64), edges[0]), edges)[0]
        np.testing.assert_array_equal(counts, expected)
    assert found.zeros == (rows == 0).sum()


def test_the_sample_is_all_rows_while_they_are_few_and_even_when_they_are_many() -> None:
    few = np.arange(30, dtype=np.float32).reshape(10, 3)
    np.testing.assert_array_equal(np.sort(gathered(few).rows, axis=0), few)
    many = np.arange(10_000, dtype=np.float32)[:, None]
    drawn = np.concatenate([gathered(many, seed=seed).rows[:, 0] for seed in range(40)])
    assert drawn.size == 40 * SAMPLED_ROWS
    # Each tenth of the data gets a tenth of the draws: 1024, give or take 4 standard deviations.
    assert np.abs(np.bincount((drawn // 1000).astype(int)) - 1024).max() < 4 * np.sqrt(1024 * 0.9)
    assert np.unique(gathered(many).rows).size == SAMPLED_ROWS


def test_the_sample_does_not_depend_on_how_rows_come_in() -> None:
    rows = np.random.default_rng(0).standard_normal((5000, 4)).astype(np.float32)
    assert_equal(gathered(rows), gathered(rows[:1], rows[1:2100], rows[2100:]))


def test_merge_is_gathering_together() -> None:
    rows = np.random.default_rng(0).standard_normal((3000, 4)).astype(np.float32)
    first, second = gathered(rows[:1000], seed=1), gathered(rows[1000:], seed=2)
    both, whole = first.merge(second), gathered(rows)
    np.testing.assert_array_equal(both.positive, whole.positive)
    assert (both.count, both.minimum, both.maximum) == (3000, whole.minimum, whole.maximum)
    assert both.mean_square == pytest.approx(float(np.mean(rows.astype(np.float64) ** 2)))
    np.testing.assert_array_equal(both.keys, np.sort(np.concatenate([first.keys, second.keys]))[:SAMPLED_ROWS])
    shares = [np.isin(both.rows[:, 0], part[:, 0]).sum() for part in (rows[:1000], rows[1000:])]
    assert sum(shares) == SAMPLED_ROWS
    assert 50 < shares[0] < 120  # a third of the rows, a third of the sample
    assert_equal(first.merge(gathered()), first)


def test_narrow_rows_are_filled_up_with_zeros() -> None:
    found = gathered(np.ones((2, 3), np.float32), 2 * np.ones((2, 5), np.float32), np.ones((1, 1), np.float32))
    assert sorted(found.rows.tolist()) == sorted([[1, 1, 1, 0, 0]] * 2 + [[2] * 5] * 2 + [[1, 0, 0, 0, 0]])
    assert found.zeros == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    total = RangeAccumulator()
    total.add(np.array([[1.0, bad]], np.float32))
    total.add(np.ones((3, 2), np.float32))
    assert not total.finite
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        total.finish()


def test_save_and_load(tmp_path: Path) -> None:
    found = gathered(np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32))
    save_statistics(tmp_path, {"x": found})
    loaded = load_statistics(tmp_path)["x"]
    assert isinstance(loaded, RangeStatistics)
    assert_equal(loaded, found)


def collected(loaded: Loaded, requests: list[TapRequest], feeds: list[dict[str, np.ndarray]], **options: int):
    return collect(loaded, requests, open_data(feeds, model_inputs(loaded.model)), **options)  # type: ignore[arg-type]


def test_collection_leaves_padding_out() -> None:
    loaded, feeds = token_model(), token_feeds()
    x, h = token_rows(feeds)
    found = collected(loaded, [tap(loaded, "x", level="ranges"), tap(loaded, "h", level="ranges")], feeds)
    for name, rows in (("x", x), ("h", h)):
        statistics = found[name]
        assert isinstance(statistics, RangeStatistics)
        assert (statistics.count, statistics.elements) == (rows.shape[0], rows.size)
        assert statistics.maximum == pytest.approx(rows.max(), rel=1e-6)
        assert statistics.minimum == pytest.approx(rows.min(), rel=1e-6)
        assert statistics.zeros == (rows == 0).sum()
        assert statistics.mean_square == pytest.approx(float(np.mean(rows.astype(np.float64) ** 2)), rel=1e-5)
    assert found["h"].zeros > 0  # type: ignore[union-attr]


def test_ranges_stand_beside_moments_of_the_same_tensor() -> None:
    loaded, feeds = token_model(), token_feeds()
    x = tap(loaded, "x").value
    found = collected(loaded, [TapRequest("q", x, "full"), TapRequest("round", x, "ranges")], feeds)
    assert set(found) == {"x|right", "x|right|ranges"}
    assert found.site("q").second_moment is not None  # type: ignore[union-attr]
    assert isinstance(found.site("round"), RangeStatistics)


@pytest.mark.parametrize("tap_bytes", [1, 1 << 20])
def test_collection_inside_branches(tap_bytes: int) -> None:
    loaded = parse(
        HEADER
        + """m (int64[B, S] input_ids, int64[B, S] attention_mask, bool flag) => (float[B, S, 5] y) {
            x = Gather (table, input_ids)
            y = If (flag) <then_branch = t () => (float[B, S, 5] a) { n = Neg (x) a = MatMul (n, wq) },
                           else_branch = e () => (float[B, S, 5] b) { b = MatMul (x, wq) }>
        }""",
        table=weight("table", 11, K),
        wq=weight("wq", K, H),
    )
    feeds = [{**feed, "flag": np.array(i % 2 == 0)} for i, feed in enumerate(token_feeds())]
    requests = [tap(loaded, "n", level="ranges"), tap(loaded, "x", level="ranges")]
    found = collected(loaded, requests, feeds, tap_bytes=tap_bytes)
    inner = found.site("site of n")
    rows = token_rows(feeds[::2])[0]
    assert isinstance(inner, RangeStatistics)
    assert (inner.count, inner.minimum, inner.maximum) == (rows.shape[0], -rows.max(), -rows.min())


def test_memory_is_stated() -> None:
    value = ir.val("x", dtype=ir.DataType.FLOAT)
    assert statistics_bytes([TapRequest("a", value, "ranges", extent=768)]) == 16 * BINS + 4 * SAMPLED_ROWS * 768
