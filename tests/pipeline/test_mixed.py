"""`quantize` with mixed depths, with several plans to choose from, to a largest error, and with curves kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxq.errors import BudgetError, ModelError, RecipeError
from onnxq.formats.mixed import MixedFormat
from onnxq.pipeline import run as pipeline
from onnxq.pipeline import sensitivity as weighing
from onnxq.pipeline import write
from onnxq.recipe import AllocationSpec, DistillationSpec, MixedSpec, Recipe, Rule
from onnxq.report.inspect import inspect_model
from onnxq.report.records import QuantizeReport
from tests.graph import models
from tests.pipeline.test_framequant import DATA, WEIGHTS, block, quantize

GRADIENTS = AllocationSpec("gradient", samples=8)
SAME_PRODUCT = 1e-4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(block(), tmp_path_factory.mktemp("source") / "model.onnx")


def recipe(name: str = "cvxq", **changes: Any) -> Recipe:
    """A preset for small models that weighs errors by layers unless told otherwise, with float32 activations."""
    base = dataclasses.replace(Recipe.load(name), min_elements=64, allocation=AllocationSpec("layer"))
    linear = dataclasses.replace(base.linear, activations="float32")
    others = tuple(dataclasses.replace(plan, activations="float32") for plan in base.alternatives)
    return dataclasses.replace(base, **{"linear": linear, "alternatives": others, **changes})


def bits(report: QuantizeReport) -> dict[str, float]:
    return {record.name.removesuffix(".weight"): record.bits_per_weight for record in report.weights}


def outputs(path: Path) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, feeds)[0] for feeds in DATA])


@pytest.mark.parametrize("mean", [1.0, 2.25, 3.5])
def test_a_budget_holds_and_the_file_says_what_is_in_it(source: Path, tmp_path: Path, mean: float) -> None:
    out = tmp_path / "out.onnx"
    report = quantize(source, out, recipe(), bits=mean)
    (budget,) = report.budget
    assert budget.got == report.linear_bits <= mean
    assert all(record.form == "MixedBitMatMul" for record in report.weights)
    onnx.checker.check_model(str(out), full_check=True)
    inspected = {weight.name: weight for weight in inspect_model(out).weights}
    for record in report.weights:
        assert inspected[record.name].format == record.format
        assert inspected[record.name].bytes >= record.bytes
    assert report.check is not None
    want, got = outputs(source), outputs(out)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) == pytest.approx(
        report.check.relative_errors["y"], rel=1e-3
    )


def test_without_a_budget_the_grid_names_the_mean(source: Path, tmp_path: Path) -> None:
    report = quantize(source, tmp_path / "out.onnx", recipe(), plan_only=True)
    (budget,) = report.budget
    assert (budget.what, budget.asked) == ("bits", 3.0)
    assert 2.9 < budget.got <= 3


def test_more_bits_mean_less_error(source: Path, tmp_path: Path) -> None:
    errors = []
    for mean in (1.5, 2.5, 4.0):
        report = quantize(source, tmp_path / f"{mean}.onnx", recipe(), bits=mean)
        assert report.check is not None
        errors.append(report.check.relative_errors["y"])
    assert errors[2] < 0.6 * errors[1] < 0.6 * 0.7 * errors[0]


def test_weights_that_read_one_tensor_share_its_order(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    quantize(source, out, recipe(), bits=2.5)
    names = [tensor.name for tensor in onnx.load(out, load_external_data=False).graph.initializer]
    assert sum(name.startswith("onnxq.order.") for name in names) == 4  # of q, k and v; of o; of up; of down
    assert sum(name in ("onnxq.mixed.tables", "onnxq.mixed.steps") for name in names) == 2


def test_without_data_inputs_are_alike(source: Path, tmp_path: Path) -> None:
    report = quantize(source, tmp_path / "out.onnx", recipe(), bits=4, calibration=None)
    assert {record.solver for record in report.weights} == {"nearest"}
    assert all(record.relative_error < 0.02 for record in report.weights if record.relative_error is not None)


def test_rules_come_first(source: Path, tmp_path: Path) -> None:
    rules = (Rule("q.weight", keep=True), Rule("k.weight", grid=recipe().linear.grid))
    report = quantize(source, tmp_path / "out.onnx", recipe(rules=rules), bits=2.5)
    formats = {record.name: record.format for record in report.weights}
    assert "q.weight" not in formats
    assert formats["k.weight"].startswith("uniform")
    assert formats["v.weight"].startswith("mixed")


def test_small_weights_keep_one_depth(tmp_path: Path) -> None:
    arrays = {"w": models.weight(64, 64, seed=1)}
    nodes = [models.node("MatMul", "x w", "y", "/w/MatMul")]
    proto = models.model(nodes, [models.floats("x", ["b", 64])], [models.floats("y", ["b", 64])], arrays)
    small = models.save(proto, tmp_path / "small.onnx")
    report = quantize(small, tmp_path / "out.onnx", recipe(), calibration=[{"x": models.weight(8, 64)}], bits=3.5)
    assert report.weights[0].format.startswith("uniform")
    assert "one depth: depths mix in single weights of at least 128 outputs" in report.weights[0].note


class TestSeveralPlans:
    def test_each_weight_takes_the_best_that_fits(self, source: Path, tmp_path: Path) -> None:
        pytest.importorskip("torch")
        chosen = recipe("auto", allocation=GRADIENTS)
        plans = {
            name: quantize(source, tmp_path / "out.onnx", each, bits=2.5, plan_only=True)
            for name, each in (
                ("auto", chosen),
                *(
                    (str(index), dataclasses.replace(chosen, linear=plan, alternatives=()))
                    for index, plan in enumerate((chosen.linear, *chosen.alternatives))
                    if plan.float8 is None  # of one width
                ),
            )
        }
        losses = {name: expected(report) for name, report in plans.items()}
        assert losses["auto"] <= min(losses.values()) * 1.001

    def test_no_frame_is_folded_where_there_is_a_choice(self, source: Path, tmp_path: Path) -> None:
        report = quantize(source, tmp_path / "out.onnx", recipe("auto"), bits=3, plan_only=True)
        assert not any("is folded" in note for note in report.notes)
        assert {record.name for record in report.weights} == {f"{name}.weight" for name in WEIGHTS}


def expected(report: QuantizeReport) -> float:
    (note,) = [note for note in report.notes if note.startswith("expected of the outputs")]
    return float(note.rsplit(" ", 1)[1].rstrip("%"))


class TestLargestError:
    def test_it_decides_the_size(self, source: Path, tmp_path: Path) -> None:
        pytest.importorskip("torch")
        chosen = recipe(allocation=GRADIENTS)
        reports = [quantize(source, tmp_path / f"{error}.onnx", chosen, max_error=error) for error in (0.3, 0.1)]
        for report, error in zip(reports, (0.3, 0.1), strict=True):
            (budget,) = report.budget
            assert (budget.what, budget.asked) == ("max_error", error)
            assert budget.floor < 0.85 * error < budget.got <= error
            assert report.check is not None
            assert 0.4 * error < report.check.relative_errors["y"] < 1.6 * error
        assert reports[0].bytes < reports[1].bytes

    def test_one_that_can_not_be_had_is_refused(self, source: Path, tmp_path: Path) -> None:
        pytest.importorskip("torch")
        with pytest.raises(BudgetError, match=r"An error of 1e-05 is below [0-9.e-]+, what the widest formats"):
            quantize(source, tmp_path / "out.onnx", recipe(allocation=GRADIENTS), max_error=1e-5)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("options", [{}, {"calibration": None}])
    def test_without_gradients_none_can_be_promised(
        self, source: Path, tmp_path: Path, options: dict[str, None]
    ) -> None:
        with pytest.raises(BudgetError, match="no error can be promised"):
            quantize(source, tmp_path / "out.onnx", recipe(), max_error=0.1, **options)

    def test_it_stands_alone(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="a largest error decides the size"):
            quantize(source, tmp_path / "out.onnx", recipe(), max_error=0.1, bits=3)


class TestKeptCurves:
    def plan(self, source: Path, folder: Path, chosen: Recipe, mean: float, **options: Any) -> QuantizeReport:
        return quantize(source, folder / "o.onnx", chosen, bits=mean, plan_only=True, curves=folder / "c", **options)

    def test_another_budget_measures_nothing(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chosen = recipe("auto")
        first = self.plan(source, tmp_path, chosen, 2.5)
        fresh = quantize(source, tmp_path / "o.onnx", chosen, bits=3.25, plan_only=True)

        def measured(*_: object) -> None:
            raise AssertionError("measured again")

        monkeypatch.setattr(pipeline, "measure_curves", measured)
        again = self.plan(source, tmp_path, chosen, 2.5)
        assert again.weights == first.weights
        assert any("measured by an earlier run" in note for note in again.notes)
        other = self.plan(source, tmp_path, chosen, 3.25)
        assert other.weights == fresh.weights
        assert bits(other) != bits(first)

    def test_they_hold_for_one_model_recipe_and_data(self, source: Path, tmp_path: Path) -> None:
        self.plan(source, tmp_path, recipe(), 2.5)
        for chosen, options in (
            (recipe(seed=1), {}),
            (recipe(linear=dataclasses.replace(recipe().linear, mixed=MixedSpec(64))), {}),
            (recipe(), {"calibration": DATA[1:]}),
            (recipe(), {"calibration": None}),
        ):
            report = self.plan(source, tmp_path, chosen, 2.5, **options)
            assert not any("earlier run" in note for note in report.notes)

    def test_what_was_weighed_by_layers_for_want_of_gradients_is_not_kept(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise ModelError("no gradient is known for Mystery")

        monkeypatch.setattr(weighing, "measure", refuse)
        for _ in range(2):
            report = self.plan(source, tmp_path, recipe(allocation=GRADIENTS), 2.5)
            assert any("Mystery" in note for note in report.notes)
            assert not any("earlier run" in note for note in report.notes)

    def test_data_that_changed_behind_its_first_batch_is_other_data(self, source: Path, tmp_path: Path) -> None:
        self.plan(source, tmp_path, recipe(), 2.5)
        changed = [*DATA[:-1], {"x": DATA[-1]["x"] + 1}]
        report = self.plan(source, tmp_path, recipe(), 2.5, calibration=changed)
        assert not any("earlier run" in note for note in report.notes)

    def test_depths_come_back_as_they_were(self, source: Path, tmp_path: Path) -> None:
        found = []
        for _ in range(2):
            report = quantize(source, tmp_path / "o.onnx", recipe(), bits=2, curves=tmp_path / "c", force=True)
            found.append((report.weights, (tmp_path / "o.onnx.data").read_bytes()))
        assert found[0][1] == found[1][1]


def test_distillation_trains_the_scales_of_outputs(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    much = [{"x": models.weight(4, 16, 6, seed=seed) @ models.weight(6, 128, seed=90)} for seed in range(24)]
    before = quantize(source, tmp_path / "before.onnx", recipe(), bits=1.5, calibration=much)
    chosen = recipe(distillation=DistillationSpec(40, 1e-3))
    after = quantize(source, tmp_path / "after.onnx", chosen, bits=1.5, calibration=much)
    assert before.check is not None
    assert after.check is not None
    assert after.check.relative_errors["y"] < before.check.relative_errors["y"]


def test_the_format_is_the_one_that_was_planned(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solve, seen = write.solve_weight, []

    def note(planned: Any, *rest: Any) -> Any:
        seen.append((planned, solve(planned, *rest)))
        return seen[-1][1]

    monkeypatch.setattr(write, "solve_weight", note)
    quantize(source, tmp_path / "out.onnx", recipe(), bits=2.5)
    for planned, solved in seen:
        assert isinstance(planned.formats[0], MixedFormat)
        assert solved.encodings[0].format == planned.formats[0]
        assert planned.alternatives == ()
