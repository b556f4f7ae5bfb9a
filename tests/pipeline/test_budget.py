"""What a budget weighs errors with, and what the report says of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import onnxq
from onnxq.errors import BudgetError, ModelError
from onnxq.pipeline import run
from onnxq.pipeline import sensitivity as weighing
from onnxq.recipe import AllocationSpec, LinearPlan, Recipe, SolverSpec
from onnxq.report.records import QuantizeReport
from tests.graph import models
from tests.graph.models import floats, node, weight
from tests.pipeline.test_quantize import stack

LAYER = Recipe("small", min_elements=64, allocation=AllocationSpec("layer"))
GRADIENT = dataclasses.replace(LAYER, allocation=AllocationSpec("gradient", samples=8))
NEAREST = LinearPlan(solver=SolverSpec(name="nearest"))
INSTEAD = "the budget was spent by the relative errors of single layers"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two equal products side by side, one of them ten times as loud in the output."""
    nodes = [
        node("MatMul", "x loud", "a", "loud"),
        node("MatMul", "x quiet", "b", "quiet"),
        node("Mul", "a ten", "c"),
        node("Add", "b c", "y"),
    ]
    initializers = {"loud": weight(128, 128, seed=1), "quiet": weight(128, 128, seed=2), "ten": np.float32([10])}
    proto = models.model(nodes, [floats("x", ["b", 128])], [floats("y", ["b", 128])], initializers)
    return models.save(proto, tmp_path / "model.onnx")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, x=weight(32, 128, seed=9))
    return path


def written(source: Path, out: Path, recipe: Recipe, data: Path | None, bits: float = 4.6) -> QuantizeReport:
    return onnxq.quantize(source, out, recipe=recipe, calibration=data, bits=bits)


def test_bits_go_where_the_output_needs_them(source: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    reports = {
        recipe.allocation.sensitivity: written(source, tmp_path / f"{recipe.allocation.sensitivity}.onnx", recipe, data)
        for recipe in (dataclasses.replace(LAYER, linear=NEAREST), dataclasses.replace(GRADIENT, linear=NEAREST))
    }
    bits = {record.name: record.bits_per_weight for record in reports["gradient"].weights}
    assert bits["loud"] >= bits["quiet"] + 2  # a factor of ten in the output is 3.3 bits
    checks = {mode: report.check.relative_errors["y"] for mode, report in reports.items() if report.check}
    assert checks["gradient"] < 0.7 * checks["layer"]
    assert any("gradients of 8 rows of 8 samples" in note for note in reports["gradient"].notes)
    assert not any("the budget was" in note for note in reports["layer"].notes)


def test_without_data_the_report_says_so(source: Path, tmp_path: Path) -> None:
    report = written(source, tmp_path / "s.onnx", GRADIENT, None)
    assert any(note.startswith(f"no calibration data: {INSTEAD}") for note in report.notes)


def test_without_gradients_the_report_says_why(
    source: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ModelError("no gradient is known for Mystery")

    monkeypatch.setattr(weighing, "measure", refuse)
    report = written(source, tmp_path / "s.onnx", GRADIENT, data)
    (note,) = (note for note in report.notes if INSTEAD in note)
    assert note.endswith("no gradient is known for Mystery")


@pytest.mark.parametrize("plan_only", [False, True])
def test_the_report_keeps_what_was_asked_and_got(source: Path, tmp_path: Path, plan_only: bool) -> None:
    out = tmp_path / "s.onnx"
    report = onnxq.quantize(source, out, recipe=LAYER, bits=4.6, plan_only=plan_only)
    (bits,) = report.budget
    assert (bits.what, bits.asked) == ("bits", 4.6)
    assert 1 < bits.floor < bits.got <= 4.6
    assert bits.got == pytest.approx(report.linear_bits)
    assert QuantizeReport.from_json(report.to_json()).budget == report.budget
    floor = 40_000
    sized = onnxq.quantize(source, out, recipe=LAYER, size=80_000, plan_only=plan_only, force=True)
    (size,) = sized.budget
    assert (size.what, size.asked) == ("size", 80_000)
    assert size.floor < floor < size.got <= 80_000
    if not plan_only:
        assert size.got == sized.bytes
    with pytest.raises(BudgetError, match=f"below the floor of {int(size.floor):,} bytes"):
        onnxq.quantize(source, tmp_path / "t.onnx", recipe=LAYER, size=int(size.floor) - 1)
    onnxq.quantize(source, tmp_path / "t.onnx", recipe=LAYER, size=int(size.floor))


def test_an_interrupted_run_keeps_its_sensitivities(
    source: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from onnxq.pipeline import write
    from onnxq.sensitivity import gradients

    backward, seen = gradients._Measurement._backward, []
    monkeypatch.setattr(gradients._Measurement, "_backward", lambda *a: (seen.append(1), backward(*a)))
    solve = write.solve_weight

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "solve_weight", interrupt)
    with pytest.raises(KeyboardInterrupt):
        written(source, tmp_path / "s.onnx", GRADIENT, data)
    assert len(seen) == 1
    monkeypatch.setattr(write, "solve_weight", solve)
    report = written(source, tmp_path / "s.onnx", GRADIENT, data)
    assert len(seen) == 1
    assert report.budget
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", "model.onnx", "s.onnx", "s.onnx.data"]


def test_what_the_bound_leaves_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of the graph are bounded before it is written; a second allocation knows them."""
    source = models.save(stack(6, 128), tmp_path / "m.onnx")
    size = 56_000
    near = onnxq.quantize(source, tmp_path / "near.onnx", recipe=LAYER, size=size)
    monkeypatch.setattr(run, "_NEAR", 0.0)
    once = onnxq.quantize(source, tmp_path / "once.onnx", recipe=LAYER, size=size)
    assert once.bytes < near.bytes <= size
    assert near.bytes > 0.95 * size
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "m.onnx", "near.onnx", "near.onnx.data", "once.onnx", "once.onnx.data",
    ]  # fmt: skip
