"""`quantize` end to end on small models: what is written, what is refused, what is left behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxq
from onnxq import recipe as recipes
from onnxq.errors import BudgetError, CalibrationError, ModelError, OnnxqError, OutputExistsError, RecipeError
from onnxq.pipeline import write as pipeline
from onnxq.report.records import REPORT_PROPERTY, QuantizeReport
from tests.encodings import relative_error
from tests.graph import models

EIGHT_BITS = 0.02
"""What 8-bit weights and 8-bit activations change at most."""
SMALL = recipes.Recipe("small", min_elements=64)


def stack(layers: int = 3, width: int = 64) -> onnx.ModelProto:
    """x -> (MatMul, Add, Relu) per layer."""
    nodes, initializers, value = [], {}, "x"
    for layer in range(layers):
        nodes += [
            models.node("MatMul", f"{value} fc{layer}.weight", f"h{layer}", f"/layers.{layer}/fc/MatMul"),
            models.node("Add", f"h{layer} b{layer}", f"a{layer}", f"/layers.{layer}/fc/Add"),
            models.node("Relu", f"a{layer}", f"r{layer}" if layer + 1 < layers else "y", f"/layers.{layer}/act/Relu"),
        ]
        initializers |= {
            f"fc{layer}.weight": models.weight(width, width, seed=layer) / 8,
            f"b{layer}": models.weight(width, seed=layer),
        }
        value = f"r{layer}"
    return models.model(nodes, [models.floats("x", ["b", width])], [models.floats("y", ["b", width])], initializers)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return models.save(stack(), tmp_path / "model.onnx")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, x=models.weight(96, 64, seed=9))
    return path


def with_bits(bits: int, **changes: Any) -> recipes.Recipe:
    recipe = recipes.uniform_recipe(bits, **changes)
    return dataclasses.replace(recipe, min_elements=64)


def run_both(source: Path, written: Path) -> float:
    x = models.weight(5, 64, seed=7)
    expected = models.run(source, {"x": x})[0]
    got = onnxq.session(written, library=False).run(None, {"x": x})[0]
    return relative_error(got, expected)


def only(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_every_constant_is_in_the_report(source: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"
    report = onnxq.quantize(source, out, recipe=SMALL, calibration=data)
    proto = onnx.load(source, load_external_data=False)
    named = {record.name for record in (*report.weights, *report.kept)}
    assert named == {initializer.name for initializer in proto.graph.initializer}
    assert all(record.reason for record in report.kept)
    assert report.bytes == out.stat().st_size + (tmp_path / "small.onnx.data").stat().st_size
    onnx.checker.check_model(str(out), full_check=True)
    carried = onnx.load(out, load_external_data=False).metadata_props
    back = QuantizeReport.from_json(next(item.value for item in carried if item.key == REPORT_PROPERTY))
    assert back.weights == report.weights
    assert back.kept == report.kept


@pytest.mark.parametrize("target", ["kernel", "stock"])
def test_eight_bits_change_little(source: Path, data: Path, tmp_path: Path, target: str) -> None:
    onnxq.quantize(source, tmp_path / "small.onnx", recipe=with_bits(8, target=target), calibration=data)
    assert run_both(source, tmp_path / "small.onnx") <= EIGHT_BITS


def test_error_feedback_beats_nearest_where_inputs_are_correlated(source: Path, tmp_path: Path) -> None:
    mixing = models.weight(4, 64, seed=3)
    feeds = [{"x": (models.weight(64, 4, seed=s) @ mixing + 0.1 * models.weight(64, 64, seed=s))} for s in range(8)]
    losses = {}
    for name in ("error-feedback", "nearest"):
        recipe = with_bits(3)
        solver = dataclasses.replace(recipe.linear.solver, name=name)
        recipe = dataclasses.replace(recipe, linear=dataclasses.replace(recipe.linear, solver=solver))
        onnxq.quantize(source, tmp_path / f"{name}.onnx", recipe=recipe, calibration=feeds)
        x = feeds[0]["x"]
        expected = models.run(source, {"x": x})[0]
        got = onnxq.session(tmp_path / f"{name}.onnx", library=False).run(None, {"x": x})[0]
        losses[name] = float(np.square(got - expected).sum())
    assert losses["error-feedback"] < 0.7 * losses["nearest"]


def test_sequential_statistics_come_from_quantised_predecessors(source: Path, data: Path, tmp_path: Path) -> None:
    recipe = with_bits(2)
    calibration = dataclasses.replace(recipe.calibration, sequential=True)
    onnxq.quantize(source, tmp_path / "plain.onnx", recipe=recipe, calibration=data)
    sequential = dataclasses.replace(recipe, calibration=calibration)
    onnxq.quantize(source, tmp_path / "sequential.onnx", recipe=sequential, calibration=data)

    def packed(path: Path) -> dict[str, bytes]:
        return {item.name: item.raw_data for item in onnx.load(path).graph.initializer if "packed" in item.name}

    plain, sequence = packed(tmp_path / "plain.onnx"), packed(tmp_path / "sequential.onnx")
    assert plain["fc0.weight.packed"] == sequence["fc0.weight.packed"]
    assert plain["fc2.weight.packed"] != sequence["fc2.weight.packed"]


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    ("levels", "chosen"), [((-1.5, -0.5, 0.5, 1.5), "midrise"), ((-2.0, -1.0, 0.0, 1.0), "integer")]
)
def test_two_bits_take_the_grid_that_fits(
    levels: tuple[float, ...], chosen: str, calibrated: bool, data: Path, tmp_path: Path
) -> None:
    proto = stack(1)
    on_levels = np.random.default_rng(0).choice(levels, (64, 64)).astype(np.float32) / 8
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(on_levels, "fc0.weight"))
    source = models.save(proto, tmp_path / "levels.onnx")
    (record,) = onnxq.quantize(
        source, tmp_path / "s.onnx", recipe=with_bits(2), calibration=data if calibrated else None
    ).weights
    assert record.format == f"uniform 2-bit g64 {chosen}"
    assert record.relative_error == pytest.approx(0, abs=1e-6)


def test_without_data_the_report_says_what_is_lost(source: Path, tmp_path: Path) -> None:
    report = onnxq.quantize(source, tmp_path / "small.onnx", recipe=SMALL)
    assert any("no calibration data" in note for note in report.notes)
    assert {record.solver for record in report.weights} == {"nearest"}
    assert report.check is None


def test_rules_decide_by_name(source: Path, tmp_path: Path) -> None:
    rules = (recipes.Rule("*layers.0*", keep=True), recipes.Rule("fc1.weight", grid=recipes.GridSpec(8, 32)))
    report = onnxq.quantize(source, tmp_path / "s.onnx", recipe=dataclasses.replace(SMALL, rules=rules))
    formats = {record.name: record.format for record in report.weights}
    assert {record.name: record.reason for record in report.kept}["fc0.weight"] == "kept by the rule '*layers.0*'"
    assert formats == {"fc1.weight": "uniform 8-bit g32 per-group", "fc2.weight": "uniform 4-bit g64 per-group"}


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    for stored_twice in (False, True):
        proto = models.tied_embedding(stored_twice, rows=96, width=64)
        source = models.save(proto, tmp_path / f"tied{stored_twice}.onnx")
        out = tmp_path / f"small{stored_twice}.onnx"
        report = onnxq.quantize(source, out, recipe=SMALL)
        (record,) = report.weights
        assert record.kinds == ("table", "linear")
        stored = [item.name for item in onnx.load(out).graph.initializer]
        assert sum(name.endswith(".packed") for name in stored) == 1
        assert not any(
            item.data_type == onnx.TensorProto.FLOAT and len(item.dims) == 2
            for item in onnx.load(out).graph.initializer
        )


def test_sites_in_functions_are_inlined_first(tmp_path: Path) -> None:
    source = models.save(models.function_body(64), tmp_path / "f.onnx")
    report = onnxq.quantize(source, tmp_path / "out.onnx", recipe=with_bits(8))
    assert len(report.weights) == 2  # the one inside, and the one handed in
    assert any("inlined the functions local::Block" in note for note in report.notes)
    assert run_both(source, tmp_path / "out.onnx") <= EIGHT_BITS


@pytest.mark.parametrize("target", ["kernel", "stock"])
@pytest.mark.parametrize("share", [0.15, 0.2, 0.25])
def test_a_size_is_a_ceiling(tmp_path: Path, data: Path, share: float, target: str) -> None:
    source = models.save(stack(4, 256), tmp_path / "big.onnx")
    np.savez(data, x=models.weight(64, 256, seed=9))
    size = int(share * source.stat().st_size)
    recipe = dataclasses.replace(SMALL, target=target)
    report = onnxq.quantize(source, tmp_path / "s.onnx", recipe=recipe, calibration=data, size=size)
    assert 0.7 * size <= report.bytes <= size


def test_bits_are_a_ceiling(tmp_path: Path) -> None:
    source = models.save(stack(4, 256), tmp_path / "big.onnx")
    reports = [onnxq.quantize(source, tmp_path / f"{b}.onnx", recipe=SMALL, bits=b) for b in (2.5, 3.3)]
    for bits, report in zip((2.5, 3.3), reports, strict=True):
        assert report.linear_bits is not None
        assert 0.8 * bits <= report.linear_bits <= bits
    errors = [sum(record.relative_error or 0 for record in report.weights) for report in reports]
    assert errors[1] < errors[0]


def test_a_size_below_the_floor_says_the_floor(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"1,000 bytes is below the floor of [0-9,]+ bytes for this model"):
        onnxq.quantize(source, tmp_path / "s.onnx", recipe=SMALL, size=1000)
    assert only(tmp_path, "model.onnx")


def test_a_plan_writes_nothing(source: Path, tmp_path: Path) -> None:
    report = onnxq.quantize(source, tmp_path / "s.onnx", recipe=SMALL, bits=3.5, plan_only=True)
    assert len(report.weights) == 3
    assert only(tmp_path, "model.onnx")


def test_an_interrupted_run_goes_on_where_it_stopped(source: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "s.onnx"
    solve = pipeline.solve_weight
    solved = []

    def interrupted(planned, *rest):
        if len(solved) == 2:
            raise KeyboardInterrupt
        solved.append(planned.weight.name)
        return solve(planned, *rest)

    monkeypatch.setattr(pipeline, "solve_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        onnxq.quantize(source, out, recipe=SMALL)
    assert only(tmp_path, "model.onnx", "s.onnx.resume")
    monkeypatch.undo()
    report = onnxq.quantize(source, out, recipe=SMALL)
    assert "went on from an interrupted run: 2 weights were solved already" in report.notes
    assert only(tmp_path, "model.onnx", "s.onnx", "s.onnx.data")
    onnxq.quantize(source, tmp_path / "fresh.onnx", recipe=SMALL)
    assert (tmp_path / "fresh.onnx.data").read_bytes() == (tmp_path / "s.onnx.data").read_bytes()


def _nan_weight(folder: Path) -> Path:
    proto = stack()
    broken = onnx.numpy_helper.to_array(proto.graph.initializer[4]).copy()
    broken[3, 5] = np.nan
    proto.graph.initializer[4].CopyFrom(onnx.numpy_helper.from_array(broken, proto.graph.initializer[4].name))
    return models.save(proto, folder / "nan.onnx")


def test_a_weight_that_is_not_finite_leaves_nothing(tmp_path: Path) -> None:
    source = _nan_weight(tmp_path)
    with pytest.raises(ModelError, match=r"'fc2.weight' \[64, 64\] holds 1 elements that are not finite"):
        onnxq.quantize(source, tmp_path / "s.onnx", recipe=SMALL)
    assert only(tmp_path, "nan.onnx")


def test_an_existing_output_needs_force(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.onnx"
    out.write_text("mine")
    with pytest.raises(OutputExistsError, match="--force"):
        onnxq.quantize(source, out, recipe=SMALL)
    assert out.read_text() == "mine"
    onnxq.quantize(source, out, recipe=SMALL, force=True)
    assert onnx.load(out, load_external_data=False).graph.node


def test_the_source_is_never_overwritten(source: Path) -> None:
    before = source.read_bytes()
    with pytest.raises(OutputExistsError, match="belongs to the model being read"):
        onnxq.quantize(source, source, recipe=SMALL, force=True)
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({"wrong": np.zeros((2, 64), np.float32)}, "wrong"),
        ({"x": np.zeros((2, 64), np.int64)}, "int64"),
        ({"x": np.zeros((2, 63), np.float32)}, "63"),
        ({"x": np.zeros((0, 64), np.float32)}, "no sample"),
    ],
)
def test_data_that_does_not_fit_is_refused_before_anything_runs(
    source: Path, tmp_path: Path, calibration: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "bad.npz", **calibration)
    with pytest.raises(CalibrationError, match=message):
        onnxq.quantize(source, tmp_path / "s.onnx", recipe=SMALL, calibration=tmp_path / "bad.npz")
    assert only(tmp_path, "model.onnx", "bad.npz")


def test_nothing_to_do_is_said(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OnnxqError, match=r"no weight that the recipe quantises.*min_elements"):
        onnxq.quantize(source, tmp_path / "s.onnx", recipe=dataclasses.replace(SMALL, min_elements=10**9))


def test_a_size_and_bits_exclude_each_other(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="either a size, or bits"):
        onnxq.quantize(source, tmp_path / "s.onnx", recipe=SMALL, size=10**6, bits=3.0)
