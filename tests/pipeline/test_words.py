"""Bits per word: planes of a table row by row, from token counts, alone and tied to the output projection."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

import onnxq
from onnxq.allocation.budget import Point
from onnxq.errors import RecipeError
from onnxq.formats.binary import BinaryFormat
from onnxq.graph import Weight, find_weights
from onnxq.pipeline import words as words_module
from onnxq.pipeline.curve_cache import CurveCache, Curves
from onnxq.pipeline.curves import measure_curves
from onnxq.pipeline.plan import Plan, Planned, make_plan
from onnxq.pipeline.stages import Stages
from onnxq.pipeline.words import planes_of_rows
from onnxq.progress import NullProgress
from onnxq.recipe import AllocationSpec, BinarySpec, LinearPlan, Recipe, Rule, SolverSpec, TablePlan, WordSpec
from onnxq.report.inspect import inspect_model
from onnxq.report.records import QuantizeReport, WeightRecord
from onnxq.sensitivity import Sensitivities, WeightSensitivity
from onnxq.solvers.planes import row_weights
from tests.encodings import relative_error
from tests.graph import models

V, K = 300, 64
COUNTS = np.random.default_rng(3).permutation(10_000 // np.arange(1, V + 1)) * (np.arange(V) % 5 != 0)
"""Zipf's, and every fifth never."""
NEAREST = SolverSpec(name="nearest")
INT8_ACTIVATIONS = 0.02


def recipe(words: WordSpec | None = None, planes: int = 3, **changes: Any) -> Recipe:
    spec = BinarySpec(planes, words=words or WordSpec())
    plan = LinearPlan(binary=spec, solver=changes.pop("solver", NEAREST))
    layer = AllocationSpec("layer")
    return Recipe("words", linear=plan, tables=TablePlan(binary=spec), min_elements=64, allocation=layer, **changes)


def table_of(rows: int, width: int = K) -> onnx.ModelProto:
    """ids -> rows of a table."""
    return models.model(
        [models.node("Gather", "table ids", "y", "/embed")],
        [models.integers("ids", ["s"])],
        [models.floats("y", ["s", width])],
        {"table": models.weight(rows, width)},
    )


def tied() -> onnx.ModelProto:
    """ids -> embedding + position -> product -> embedding's transpose -> logits."""
    return models.model(
        [
            models.node("Gather", "embed ids", "e", "/embed"),
            models.node("Gather", "places ids_p", "p", "/places"),
            models.node("Add", "e p", "h", "/add"),
            models.node("MatMul", "h inner", "m", "/inner"),
            models.node("Transpose", "embed", "t", "/turn", perm=[1, 0]),
            models.node("MatMul", "m t", "y", "/head"),
        ],
        [models.integers("ids", ["s"]), models.integers("ids_p", ["s"])],
        [models.floats("y", ["s", V])],
        {
            "embed": models.weight(V, K, seed=1) * np.linspace(0.5, 2, V, dtype=np.float32)[:, None],
            "places": models.weight(40, K, seed=2),
            "inner": models.weight(K, K, seed=3) / 8,
        },
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return models.save(tied(), tmp_path / "tied.onnx")


def feeds(seed: int = 0, count: int = 50) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"ids": rng.choice(V, count, p=COUNTS / COUNTS.sum()), "ids_p": rng.integers(0, 40, count)}


def by_name(report: QuantizeReport) -> dict[str, WeightRecord]:
    return {record.name: record for record in report.weights}


def plan(proto: onnx.ModelProto, chosen: Recipe, counts: Callable[[Weight], np.ndarray | None] | None) -> Plan:
    return make_plan(find_weights(ir.from_proto(proto)), chosen, calibrated=False, counts=counts)


def planned(chosen: Recipe, counts: np.ndarray = COUNTS, name: str = "embed") -> Planned:
    found = plan(tied(), chosen, lambda weight: counts if weight.n == len(counts) else None)
    return next(item for item in found.planned if item.weight.name == name)


def planes(item: Planned) -> np.ndarray:
    return planes_of_rows(item.formats, item.rows)


def test_algorithm_1_by_hand(tmp_path: Path) -> None:
    """Thirds of 10 rows have 3, 2 and 1 planes: so many bits, so many values in a row of one group."""
    counts = np.array([5, 9, 5, 0, 1, 7, 5, 3, 0, 2])
    want = [3, 3, 2, 1, 1, 3, 2, 2, 1, 1]
    source, out = models.save(table_of(10), tmp_path / "table.onnx"), tmp_path / "out.onnx"
    chosen = recipe(WordSpec("frequency", clusters=3))
    report = onnxq.quantize(source, out, recipe=chosen, token_counts=counts)
    (record,) = report.weights
    assert record.format == "binary 1.9-bit by row"
    format, rows = BinaryFormat.by_row(np.array(want))
    assert format.planes == (10, 6, 3)
    assert rows is not None
    # Three planes of a tile: 16 chunks of 32 bytes, 64 scales each; 10 ranks; no offset, the place of one stays.
    assert record.bytes == 3 * (16 * 32 + 64 * 2) + 10 * 4 + 2
    (got,) = ort.InferenceSession(out, providers=["CPUExecutionProvider"]).run(None, {"ids": np.arange(10)})
    assert [len(np.unique(row)) for row in got] == [2**each for each in want]
    error = np.square(got - models.weight(10, K)).mean(axis=1)
    assert error[[0, 1, 5]].max() < error[[2, 6, 7]].min() < error[[2, 6, 7]].max() < error[[3, 4, 8, 9]].min()


def test_every_runtime_finds_rows_by_their_rank(source: Path, library: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = onnxq.quantize(source, out, recipe=recipe(), token_counts=COUNTS)
    assert by_name(report)["embed"].format.endswith("bit by row")
    onnx.checker.check_model(str(out), full_check=True)
    stored = onnx.load(out)
    rank = next(array for array in stored.graph.initializer if array.name == "embed.rank")
    assert list(rank.dims) == [V]
    fed = feeds()
    (body,) = ort.InferenceSession(out, providers=["CPUExecutionProvider"]).run(None, fed)
    (plain,) = ReferenceEvaluator(stored).run(None, fed)
    assert relative_error(plain, body) < 1e-5
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    (kernel,) = ort.InferenceSession(out, options, providers=["CPUExecutionProvider"]).run(None, fed)
    assert relative_error(kernel, body) < INT8_ACTIVATIONS
    error = np.square(body - models.run(source, fed)[0]).sum() / np.square(models.run(source, fed)[0]).sum()
    assert 0.001 < error < 0.3


def test_stock_forms_share_the_bytes_of_a_tied_table(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = onnxq.quantize(source, out, recipe=recipe(target="stock"), token_counts=COUNTS)
    written = onnx.load(out)
    assert not written.functions
    assert {node.domain for node in written.graph.node} == {"", "com.microsoft"}
    fed = feeds()
    (stock,) = models.run(out, fed)
    onnxq.quantize(source, tmp_path / "kernel.onnx", recipe=recipe(), token_counts=COUNTS)
    (body,) = models.run(tmp_path / "kernel.onnx", fed)
    assert relative_error(stock, body) < INT8_ACTIVATIONS
    inspected = inspect_model(out, reference=source)
    assert not inspected.mismatches
    (embed,) = (weight for weight in inspected.weights if weight.name == "embed")
    record = by_name(report)["embed"]
    assert (embed.kinds, embed.bytes) == (("table", "linear"), record.bytes)
    assert embed.relative_error == pytest.approx(record.relative_error, rel=1e-3)
    assert embed.code_bits == pytest.approx(planes(planned(recipe())).mean())
    assert {weight.name for weight in inspected.weights} == {"embed", "places", "inner"}
    assert not inspected.kept
    budgeted = onnxq.quantize(
        source, tmp_path / "bits.onnx", recipe=recipe(target="stock"), token_counts=COUNTS, bits=2.5
    )
    assert budgeted.linear_bits == budgeted.budget[0].got <= 2.5


def test_a_calibrated_tied_table_is_fed_back_in_its_order(source: Path, tmp_path: Path) -> None:
    data = [feeds(seed) for seed in range(4)]
    results = {}
    for name, solver in (("fed back", SolverSpec()), ("nearest", NEAREST)):
        report = onnxq.quantize(
            source, tmp_path / f"{name}.onnx", recipe=recipe(solver=solver), token_counts=COUNTS, calibration=data
        )
        results[name] = by_name(report)["embed"]
        assert results[name].format.endswith("by row")
    assert results["fed back"].solver == "error-feedback"
    assert results["fed back"].bytes == results["nearest"].bytes
    fed_back = results["fed back"]
    assert fed_back.proxy_loss is not None
    # Errors cancel on the inputs, and are larger for it by themselves.
    assert fed_back.proxy_loss < 0.5 * results["nearest"].relative_error < fed_back.relative_error  # type: ignore[operator]


@pytest.mark.parametrize("mean", [1.0, 1.7, 2.5, 6.0])
def test_mean_planes_are_a_ceiling_that_is_reached(mean: float) -> None:
    found = planes(planned(recipe(WordSpec(mean_planes=mean))))
    assert mean - 0.05 < found.mean() <= mean


def test_frequent_rows_get_planes_and_an_output_projection_counts_every_row() -> None:
    alone = planes(planned(recipe(WordSpec(every_row=0.0))))
    order = np.argsort(-COUNTS)
    assert alone[order[:30]].mean() > alone[order[-150:]].mean() + 2
    assert (alone[COUNTS == 0] == 1).all()
    shared = planes(planned(recipe(WordSpec(every_row=1.0))))
    assert (shared[COUNTS == 0] > 1).any()
    assert alone[COUNTS == 0].mean() < shared[COUNTS == 0].mean() < 2.5


def test_a_table_of_another_graphs_projection_counts_as_one() -> None:
    """A folder's encoder looks rows up, and its decoder multiplies with them too: both must store them alike."""
    found = find_weights(ir.from_proto(table_of(V)))
    results = {}
    for elsewhere in ((), ("linear",)):
        weights = [dataclasses.replace(weight, elsewhere=elsewhere) for weight in found.weights]
        report = dataclasses.replace(found, weights=weights)
        (item,) = make_plan(report, recipe(), calibrated=False, counts=lambda _: COUNTS).planned
        assert item.words is not None
        np.testing.assert_allclose(item.words.weights, row_weights(COUNTS, 1.0 if elsewhere else 0.0))
        results[elsewhere] = planes(item)
    assert results[("linear",)][COUNTS == 0].mean() > results[()][COUNTS == 0].mean()


def test_weights_without_words_say_why() -> None:
    places, inner = (planned(recipe(), name=name) for name in ("places", "inner"))
    assert places.note == "planes are alike in all rows: its look-ups were not counted"
    assert not inner.note
    for item in (places, inner):
        assert item.formats == (BinaryFormat.of(item.weight.n, 3),)
        assert item.rows is None


def test_a_rule_has_words_too() -> None:
    ruled = dataclasses.replace(
        recipe(),
        tables=TablePlan(),
        linear=LinearPlan(solver=NEAREST),
        rules=(Rule("embed", binary=BinarySpec(words=WordSpec("frequency", clusters=2))),),
    )
    assert np.bincount(planes(planned(ruled))).tolist() == [0, 150, 150]


def test_counts_are_asked_for(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="embed: bits per word need token counts: give --token-counts TEXT"):
        onnxq.quantize(source, tmp_path / "out.onnx", recipe=recipe())
    assert [path.name for path in tmp_path.iterdir()] == ["tied.onnx"]


@pytest.mark.parametrize("counts", [np.ones(V - 1, np.int64), -np.ones(V, np.int64)])
def test_counts_must_fit_the_table(counts: np.ndarray) -> None:
    with pytest.raises(RecipeError, match="embed has 300 rows, and their token counts are"):
        plan(tied(), recipe(), lambda weight: counts if weight.name == "embed" else None)


def test_by_loss_loses_less_than_clusters_at_their_price() -> None:
    clusters = planned(recipe(WordSpec("frequency")))
    # Its planes may be six, each with tiles that are not full.
    ours = planned(recipe(WordSpec(mean_planes=planes(clusters).mean() - 0.2)))
    assert ours.cost_bits <= clusters.cost_bits
    assert ours.words is not None
    assert ours.words.loss(planes(ours), None) < 0.95 * ours.words.loss(planes(clusters), None)


def curve(item: Planned, sensitivities: Sensitivities | None = None) -> list[Point[Planned]]:
    stages: Any = Stages(None, None, None, NullProgress())  # type: ignore[arg-type]  # without data nothing is loaded
    return measure_curves([item], stages, sensitivities, NullProgress())[item.weight.name]


@pytest.mark.parametrize("words", [WordSpec(), WordSpec("frequency")])
def test_a_curve_prices_and_loses_what_its_planes_say(words: WordSpec) -> None:
    item = planned(recipe(words))
    matrix = models.weight(V, K, seed=1).astype(np.float64) * np.linspace(0.5, 2, V)[:, None]
    assert item.words is not None
    weights = item.words.weights
    points = curve(item)
    assert len(points) >= 12
    for point in points:
        found = planes(point.choice)
        assert point.bits == point.choice.cost_bits == BinaryFormat.by_row(found)[0].cost_bits(V, K)
        lost = item.words.errors[np.arange(V), found - 1]
        assert point.loss == pytest.approx(weights @ lost / (weights @ np.square(matrix).sum(1)))
    if words.by == "loss":
        losses = [point.loss for point in points]
        assert losses == sorted(losses, reverse=True)


def test_sensitivities_of_rows_make_a_curve_comparable() -> None:
    item = planned(recipe())
    rows = np.random.default_rng(0).uniform(1, 2, V).astype(np.float32)
    group = np.zeros(V, np.int64)
    sensitivity = WeightSensitivity(np.full((1, K), rows.mean(), np.float32), rows, group, 1)
    known = Sensitivities({"embed": sensitivity}, "output", ("y",), 1, 1, 1, (), 0.0)
    assert item.words is not None
    for point in curve(item, known):
        lost = item.words.errors[np.arange(V), planes(point.choice) - 1]
        assert point.loss == pytest.approx(rows.astype(np.float64) @ lost)


@pytest.mark.parametrize("words", [WordSpec(), WordSpec("frequency")])
def test_kept_curves_come_back_row_by_row(words: WordSpec, tmp_path: Path) -> None:
    item = planned(recipe(words))
    points, cache = curve(item), CurveCache(tmp_path, {})
    cache.save([item], Curves({"embed": points}, "layer", ()))
    found = cache.load([item])
    assert found is not None
    for before, after in zip(points, found.points["embed"], strict=True):
        assert (before.bits, before.loss, before.choice.formats) == (after.bits, after.loss, after.choice.formats)
        np.testing.assert_array_equal(planes(before.choice), planes(after.choice))


@pytest.mark.parametrize("words", [WordSpec(), WordSpec("frequency")])
def test_planes_follow_a_budget(words: WordSpec, source: Path, tmp_path: Path) -> None:
    reports = {}
    for bits in (2.5, 4.0):
        report = onnxq.quantize(
            source,
            tmp_path / f"{bits}.onnx",
            recipe=recipe(words),
            token_counts=COUNTS,
            bits=bits,
            curves=tmp_path / "curves",
        )
        budget = report.budget[0]
        assert budget.floor < budget.got == report.linear_bits <= bits
        assert budget.got > 0.85 * bits
        reports[bits] = by_name(report)["embed"]
    assert reports[2.5].bytes < reports[4.0].bytes
    assert reports[2.5].relative_error > reports[4.0].relative_error  # type: ignore[operator]
    again = onnxq.quantize(
        source, tmp_path / "again.onnx", recipe=recipe(words), token_counts=COUNTS, bits=2.5,
        curves=tmp_path / "curves",
    )  # fmt: skip
    assert any("measured by an earlier run" in note for note in again.notes)
    first = onnx.load(tmp_path / "2.5.onnx").graph.initializer
    for before, after in zip(first, onnx.load(tmp_path / "again.onnx").graph.initializer, strict=True):
        assert before.SerializeToString() == after.SerializeToString()
    # Other counts are another measurement.
    other = onnxq.quantize(
        source, tmp_path / "other.onnx", recipe=recipe(words), token_counts=COUNTS[::-1].copy(), bits=2.5,
        curves=tmp_path / "curves",
    )  # fmt: skip
    assert not any("measured by an earlier run" in note for note in other.notes)


def test_the_tables_of_a_folders_graphs_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    measure = words_module.row_errors
    monkeypatch.setattr(words_module, "row_errors", lambda *a, **k: (calls.append(1), measure(*a, **k))[1])
    monkeypatch.setattr(words_module, "_KNOWN", {})
    np.testing.assert_array_equal(planes(planned(recipe())), planes(planned(recipe())))
    assert len(calls) == 1
    planned(recipe(WordSpec("frequency")))
    assert len(calls) == 1
