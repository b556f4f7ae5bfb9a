from __future__ import annotations

import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from onnxq.calibration import (
    InputStatistics,
    Progress,
    TableStatistics,
    TapRequest,
    collect,
    model_inputs,
    open_data,
)
from onnxq.calibration import session as session_module
from onnxq.calibration.data import CalibrationData
from onnxq.errors import CalibrationError
from tests.calibration.models import (
    HEADER,
    H,
    K,
    Loaded,
    V,
    assert_moments,
    parse,
    tap,
    token_feeds,
    token_model,
    token_rows,
    value,
    weight,
)


def data_of(loaded: Loaded, feeds: list[dict[str, np.ndarray]]) -> CalibrationData:
    return open_data(feeds, model_inputs(loaded.model))


def test_moments_equal_numpy_and_padding_is_left_out() -> None:
    loaded, feeds = token_model(), token_feeds()
    assert any((f["attention_mask"] == 0).any() for f in feeds)
    requests = [tap(loaded, "x"), tap(loaded, "h", level="diagonal")]
    found = collect(loaded, requests, data_of(loaded, feeds))
    x, h = token_rows(feeds)
    assert_moments(found["x"], x)
    assert_moments(found["h"], h)
    assert found["h"].second_moment is None  # type: ignore[union-attr]
    assert found.notes == ()


def test_sites_that_share_an_input_are_tapped_once() -> None:
    loaded, feeds = token_model(), token_feeds()
    x = value(loaded, "x")
    requests = [
        TapRequest("q", x, "diagonal"),
        TapRequest("k", x, "full"),
        TapRequest("unused", value(loaded, "h"), "none"),
    ]
    found = collect(loaded, requests, data_of(loaded, feeds))
    assert list(found) == ["x"]
    assert found.site("q") is found.site("k")
    assert found.site("unused") is None
    assert_moments(found.site("q"), token_rows(feeds)[0])
    assert found.runs == len(feeds)


def test_table_rows_are_counted_without_padding() -> None:
    loaded, feeds = token_model(), token_feeds()
    feeds[0]["input_ids"][0, 0] = 3
    feeds[1]["input_ids"][0, 0] = -1
    feeds[1]["attention_mask"][0, 0] = feeds[0]["attention_mask"][0, 0] = 1
    request = tap(loaded, "input_ids", kind="table", extent=V)
    found = collect(loaded, [request], data_of(loaded, feeds))["input_ids"]
    ids = np.concatenate([f["input_ids"][f["attention_mask"] != 0] for f in feeds]) % V
    assert isinstance(found, TableStatistics)
    np.testing.assert_array_equal(found.counts, np.bincount(ids, minlength=V))


def test_chunks_change_nothing_but_the_number_of_runs() -> None:
    loaded, feeds = token_model(), token_feeds()
    requests = [tap(loaded, "x"), tap(loaded, "h"), tap(loaded, "input_ids", kind="table", extent=V)]
    whole = collect(loaded, requests, data_of(loaded, feeds))
    parts = collect(loaded, requests, data_of(loaded, feeds), tap_bytes=1)
    assert whole.chunks == (3,)
    assert parts.chunks == (1, 1, 1)
    for key in ("x", "h"):
        np.testing.assert_array_equal(whole[key].second_moment, parts[key].second_moment)  # type: ignore[union-attr]
    np.testing.assert_array_equal(whole["input_ids"].counts, parts["input_ids"].counts)  # type: ignore[union-attr]


def test_overrides_reach_later_tensors_only() -> None:
    loaded, feeds = token_model(), token_feeds()
    wq = np.round(weight("wq", K, H) * 2) / 2
    requests = [tap(loaded, "x"), tap(loaded, "h")]
    found = collect(loaded, requests, data_of(loaded, feeds), weight_overrides={"wq": wq.astype(np.float64)})
    assert_moments(found["x"], token_rows(feeds)[0])
    assert_moments(found["h"], token_rows(feeds, wq)[1])
    before = collect(loaded, requests, data_of(loaded, feeds))
    assert_moments(before["h"], token_rows(feeds)[1])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({"wz": np.zeros((K, H))}, "no initializer"), ({"wq": np.zeros((H, K))}, "shape")],
)
def test_overrides_that_do_not_fit_are_refused(overrides: dict[str, np.ndarray], message: str) -> None:
    loaded = token_model()
    with pytest.raises(CalibrationError, match=message):
        collect(loaded, [tap(loaded, "h")], data_of(loaded, token_feeds()), weight_overrides=overrides)


def test_the_model_is_left_as_it_was() -> None:
    loaded = token_model()
    before = ir.to_proto(loaded.model).SerializeToString(deterministic=True)
    overrides = {"wq": weight("other", K, H)}
    collect(
        loaded,
        [tap(loaded, "x"), tap(loaded, "h")],
        data_of(loaded, token_feeds()),
        weight_overrides=overrides,
    )
    assert ir.to_proto(loaded.model).SerializeToString(deterministic=True) == before


def test_left_side_sums_over_columns() -> None:
    loaded = parse(
        HEADER
        + """m (float[B, 6, M] x) => (float[B, 5, M] y) {
            t = Neg (x)
            y = MatMul (w, t)
        }""",
        w=weight("w", H, K),
    )
    x = np.random.default_rng(1).standard_normal((2, K, 7)).astype(np.float32)
    found = collect(loaded, [tap(loaded, "t", side="left", extent=K)], data_of(loaded, [{"x": x}]))
    assert_moments(found["t"], -x.swapaxes(1, 2).reshape(-1, K))
    with pytest.raises(CalibrationError, match="side"):
        collect(loaded, [tap(loaded, "t", side="right", extent=K)], data_of(loaded, [{"x": x}]))


IF_MODEL = (
    HEADER
    + """m (bool[1] flag, float[B, S, 6] x, int64[B, S] attention_mask) => (float[B, S, 5] y) {
        z = Neg (x)
        unused, y = If (flag) <
            then_branch = then_graph () => (float[B, S, 6] u1, float[B, S, 5] y1) {
                u1 = Neg (z)
                a = Abs (z)
                y1 = MatMul (a, w)
            },
            else_branch = else_graph () => (float[B, S, 6] u2, float[B, S, 5] y2) {
                u2 = Identity (z)
                e = Exp (z)
                f = MatMul (e, w)
                g = Relu (f)
                y2 = MatMul (g, v)
            }
        >
    }"""
)


def if_model() -> Loaded:
    loaded = parse(IF_MODEL, w=weight("w", K, H), v=weight("v", H, H))
    owner = next(n for n in loaded.model.graph if n.op_type == "If")
    owner.name = "choose"
    return loaded


def test_taps_in_both_branches_of_an_if() -> None:
    loaded = if_model()
    rng = np.random.default_rng(2)
    feeds = []
    for flag in (True, False, False):
        x = rng.standard_normal((2, 3, K)).astype(np.float32)
        feeds.append({"flag": np.array([flag]), "x": x, "attention_mask": rng.integers(0, 2, (2, 3))})
    requests = [tap(loaded, n) for n in ("z", "a", "e", "g")]
    for budget in (1, 1 << 20):
        found = collect(loaded, requests, data_of(loaded, feeds), tap_bytes=budget)
        rows = [-f["x"][f["attention_mask"] != 0] for f in feeds]
        assert_moments(found["z"], np.concatenate(rows))
        assert_moments(found["choose.then_branch/a"], np.abs(rows[0]))
        e = np.exp(np.concatenate(rows[1:]))
        assert_moments(found["choose.else_branch/e"], e)
        assert_moments(found["choose.else_branch/g"], np.maximum(e @ weight("w", K, H), 0))


def test_a_branch_that_never_runs_is_reported_and_has_no_statistics() -> None:
    loaded = if_model()
    x = np.ones((1, 2, K), np.float32)
    feed = {"flag": np.array([True]), "x": x, "attention_mask": np.ones((1, 2), np.int64)}
    found = collect(loaded, [tap(loaded, "a"), tap(loaded, "e")], data_of(loaded, [feed]))
    assert list(found) == ["choose.then_branch/a"]
    assert found.site("site of e") is None
    assert any("choose.else_branch/e" in n and "not reached" in n for n in found.notes)


def test_an_override_reaches_into_branches() -> None:
    loaded = if_model()
    x = np.random.default_rng(3).standard_normal((1, 4, K)).astype(np.float32)
    feed = {"flag": np.array([False]), "x": x, "attention_mask": np.ones((1, 4), np.int64)}
    w = weight("replaced", K, H)
    found = collect(loaded, [tap(loaded, "g")], data_of(loaded, [feed]), weight_overrides={"w": w})
    assert_moments(found["choose.else_branch/g"], np.maximum(np.exp(-x[0]) @ w, 0))


def test_a_tap_in_a_loop_body_sees_every_iteration() -> None:
    loaded = parse(
        HEADER
        + """m (float[2, 6] x, int64 trips, bool go) => (float[2, 6] y) {
            y = Loop (trips, go, x) <
                body = b (int64 i, bool c, float[2, 6] s) => (bool c2, float[2, 6] s2) {
                    c2 = Identity (c)
                    t = Tanh (s)
                    s2 = MatMul (t, w)
                }
            >
        }""",
        w=weight("w", K, K),
    )
    next(n for n in loaded.model.graph if n.op_type == "Loop").name = "loop"
    x = np.random.default_rng(4).standard_normal((2, K)).astype(np.float32)
    feed = {"x": x, "trips": np.array(3), "go": np.array(True)}
    for requests in ([tap(loaded, "t")], [tap(loaded, "x"), tap(loaded, "t")]):
        found = collect(loaded, requests, data_of(loaded, [feed]))
        rows, state = [], x
        for _ in range(3):
            rows.append(np.tanh(state))
            state = rows[-1] @ weight("w", K, K)
        assert_moments(found["loop.body/t"], np.concatenate(rows))


def test_a_tap_in_a_scan_body_with_listed_axes() -> None:
    loaded = parse(
        HEADER
        + """m (float[6] s0, float[4, 6] xs) => (float[6] s, float[6, 4] ys) {
            s, ys = Scan <num_scan_inputs = 1, scan_output_axes = [1],
                body = b (float[6] p, float[6] e) => (float[6] n, float[6] o) {
                    n = Add (p, e)
                    r = Tanh (n)
                    o = MatMul (r, w)
                }
            > (s0, xs)
        }""",
        w=weight("w", K, K),
    )
    next(n for n in loaded.model.graph if n.op_type == "Scan").name = "scan"
    xs = np.random.default_rng(5).standard_normal((4, K)).astype(np.float32)
    found = collect(loaded, [tap(loaded, "r")], data_of(loaded, [{"s0": np.zeros(K, np.float32), "xs": xs}]))
    assert_moments(found["scan.body/r"], np.tanh(np.cumsum(xs, axis=0)))


def test_a_tap_in_a_function_body_is_refused() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21, "d" : 1]>\n'
        "m (float[2, 6] x) => (float[2, 6] y) { y = d.f (x) }\n"
        '<domain: "d", opset_import: ["" : 21]> f (a) => (b) { t = Neg (a) \n b = Neg (t) }'
    )
    loaded = Loaded(model)
    inner = next(iter(next(iter(model.functions.values())))).outputs[0]
    data = data_of(loaded, [{"x": np.zeros((2, K), np.float32)}])
    with pytest.raises(CalibrationError, match="Inline the model's functions"):
        collect(loaded, [TapRequest("site", inner)], data)


def test_what_no_tap_needs_does_not_run() -> None:
    loaded = parse(
        HEADER
        + """m (float[B, 6] x) => (float[B, 5] y) {
            t = Neg (x)
            s = MatMul (t, w)
            y = Relu (s)
        }""",
        w=weight("w", K, H),
    )
    # An operator that nobody knows: a session that still held it would not load.
    next(n for n in loaded.model.graph if n.op_type == "Relu").domain = "nobody"
    loaded.model.graph.opset_imports["nobody"] = 1
    data = data_of(loaded, [{"x": np.ones((2, K), np.float32)}])
    assert_moments(collect(loaded, [tap(loaded, "t")], data)["t"], -np.ones((2, K)))
    with pytest.raises(CalibrationError, match="session_options"):
        collect(loaded, [tap(loaded, "y")], data)


def test_float16_models_are_measured_in_float32() -> None:
    loaded = parse(
        HEADER + "m (float16[B, 6] x) => (float16[B, 5] y) { t = Neg (x) \n y = MatMul (t, w) }",
        w=weight("w", K, H).astype(np.float16),
    )
    x = np.full((50, K), 200, np.float16)  # squares leave the range of float16
    found = collect(loaded, [tap(loaded, "t")], data_of(loaded, [{"x": x}]))
    assert_moments(found["t"], -x.astype(np.float32))


def test_infinite_activations_are_named() -> None:
    loaded = parse(
        HEADER + "m (float[B, 6] x) => (float[B, 5] y) { t = Exp (x) \n y = MatMul (t, w) }",
        w=weight("w", K, H),
    )
    feeds = [{"x": np.full((2, K), v, np.float32)} for v in (1, 1000)]
    with pytest.raises(CalibrationError, match=r"feed 1.*'t'.*infinity"):
        collect(loaded, [tap(loaded, "t")], data_of(loaded, feeds))


def test_an_index_outside_the_table_is_named() -> None:
    loaded, feeds = token_model(), token_feeds()
    with pytest.raises(CalibrationError, match=r"input_ids.*table of 4 rows"):
        collect(loaded, [tap(loaded, "input_ids", kind="table", extent=4)], data_of(loaded, feeds))


def test_one_tensor_for_two_tables_is_counted_for_each() -> None:
    loaded, feeds = token_model(), token_feeds()
    ids = value(loaded, "input_ids")
    requests = [
        TapRequest("a", ids, kind="table", extent=V),
        TapRequest("b", ids, kind="table", extent=V + 2),
    ]
    found = collect(loaded, requests, data_of(loaded, feeds))
    assert sorted(found) == [f"input_ids|{V}", f"input_ids|{V + 2}"]
    a, b = found.site("a"), found.site("b")
    assert isinstance(a, TableStatistics)
    assert isinstance(b, TableStatistics)
    np.testing.assert_array_equal(np.append(a.counts, [0, 0]), b.counts)


def test_big_embedded_and_linked_weights_are_fed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "EMBED_BYTES", 0)
    monkeypatch.setattr(session_module, "SMALL_TENSOR", 0)
    monkeypatch.setattr(session_module, "FRUGAL_BYTES", 0)
    loaded, feeds = token_model(), token_feeds()
    _, h = token_rows(feeds)
    assert_moments(collect(loaded, [tap(loaded, "h")], data_of(loaded, feeds))["h"], h)

    ir.save(loaded.model, tmp_path / "m.onnx", external_data="m.onnx.data", size_threshold_bytes=0)
    plain = Loaded(ir.load(tmp_path / "m.onnx"))
    assert_moments(collect(plain, [tap(plain, "h")], data_of(plain, feeds))["h"], h)

    # As a hub's cache lays it out: the data file is a link that leads out of the model's folder.
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "m.onnx").write_bytes((tmp_path / "m.onnx").read_bytes())
    (tmp_path / "linked" / "m.onnx.data").symlink_to(tmp_path / "m.onnx.data")
    linked = Loaded(ir.load(tmp_path / "linked" / "m.onnx"))
    assert_moments(collect(linked, [tap(linked, "h")], data_of(linked, feeds))["h"], h)


def test_python_memory_stays_below_the_budget() -> None:
    width, layers = 64, 12
    text = "\n".join(f"t{i + 1} = Tanh (t{i})" for i in range(layers))
    loaded = parse(HEADER + f"m (float[B, {width}] t0) => (float[B, {width}] t{layers}) {{ {text} }}")
    feeds = [np.random.default_rng(i).standard_normal((4096, width)).astype(np.float32) for i in range(4)]
    one = feeds[0].nbytes
    data = data_of(loaded, [{"t0": f} for f in feeds])
    requests = [tap(loaded, f"t{i + 1}", level="diagonal") for i in range(layers)]
    tracemalloc.start()
    try:
        found = collect(loaded, requests, data, tap_bytes=3 * one)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.chunks == (3, 3, 3, 3)
    # The budget, and one tap again for its float32 block, magnitudes and slack; all taps of one feed would be 12.
    assert peak < 5 * one
    assert isinstance(found["t12"], InputStatistics)
    assert found["t12"].count == 4 * 4096


def test_progress_counts_runs_and_an_interrupt_comes_through() -> None:
    loaded, feeds = token_model(), token_feeds()
    seen: list[Progress] = []
    requests = [tap(loaded, "x"), tap(loaded, "h")]
    found = collect(loaded, requests, data_of(loaded, feeds), tap_bytes=1, progress=seen.append)
    assert [p.done for p in seen] == list(range(1, 1 + 1 + 2 * len(feeds)))
    assert {p.total for p in seen[1:]} == {found.runs} == {1 + 2 * len(feeds)}

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(loaded, requests, data_of(loaded, feeds), progress=interrupt)


def test_the_session_hook_sees_the_options() -> None:
    loaded, levels = token_model(), []
    collect(
        loaded,
        [tap(loaded, "x")],
        data_of(loaded, token_feeds()),
        threads=1,
        session_options=lambda options: levels.append(options.intra_op_num_threads),
    )
    assert levels == [1]


def test_a_branch_the_first_feed_did_not_take_still_counts_in_the_plan() -> None:
    loaded = if_model()
    x = np.ones((2, 3, K), np.float32)
    feed = {"flag": np.array([True]), "x": x, "attention_mask": np.ones((2, 3), np.int64)}
    requests = [tap(loaded, n) for n in ("a", "e", "f")]
    found = collect(loaded, requests, data_of(loaded, [feed]), tap_bytes=x.nbytes)
    assert found.chunks == (1, 1, 1)


def test_bfloat16_weights_are_fed_by_their_onnx_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "EMBED_BYTES", 0)
    monkeypatch.setattr(session_module, "SMALL_TENSOR", 0)
    loaded = parse(
        HEADER + "m (float[B, 6] x) => (float[B, 5] y) { w = Cast <to = 1> (b) \n y = MatMul (x, w) }",
        b=weight("b", K, H).astype(ml_dtypes.bfloat16),
    )
    x = np.eye(K, dtype=np.float32)
    found = collect(loaded, [tap(loaded, "y")], data_of(loaded, [{"x": x}]))
    assert_moments(found["y"], weight("b", K, H).astype(ml_dtypes.bfloat16).astype(np.float32))
