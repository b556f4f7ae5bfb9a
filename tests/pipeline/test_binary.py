"""`quantize` with binary codes, end to end on a small block of attention and MLP."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxq.errors import RecipeError
from onnxq.recipe import AllocationSpec, BinarySpec, LinearPlan, Recipe, SolverSpec
from onnxq.report.inspect import inspect_model
from tests.graph import models
from tests.pipeline.test_framequant import DATA, SAME_PRODUCT, WEIGHTS, block, quantize, recipe

THREE_PLANES = 0.05
"""Largest relative squared error of a weight's products with three planes, feedback and all."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(block(), tmp_path_factory.mktemp("source") / "model.onnx")


def outputs(path: Path) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, feeds)[0] for feeds in DATA])


def test_a_written_model_computes_what_the_report_says(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = quantize(source, out, recipe("binary", activations="float32"))
    onnx.checker.check_model(str(out), full_check=True)
    assert {record.name.removesuffix(".weight") for record in report.weights} == set(WEIGHTS)
    for record in report.weights:
        assert (record.format, record.form) == ("binary 3-bit", "BinaryCode")
        assert record.proxy_loss is not None
        assert record.proxy_loss < THREE_PLANES
    inspected = {weight.name: weight for weight in inspect_model(out, reference=source).weights}
    for record in report.weights:
        assert inspected[record.name].relative_error == pytest.approx(record.relative_error, rel=1e-3)
    assert report.check is not None
    want, got = outputs(source), outputs(out)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error == pytest.approx(report.check.relative_errors["y"], rel=0.05)


def test_planes_follow_a_budget(source: Path, tmp_path: Path) -> None:
    chosen = dataclasses.replace(recipe("binary"), allocation=AllocationSpec("layer"))
    report = quantize(source, tmp_path / "out.onnx", chosen, bits=2.5)
    (budget,) = report.budget
    assert budget.got == report.linear_bits <= 2.5
    assert report.linear_bits > 2.2
    assert len({record.format for record in report.weights}) > 1


def test_the_paper_s_levels_are_worse(source: Path, tmp_path: Path) -> None:
    greedy = LinearPlan(solver=SolverSpec(name="nearest", levels="greedy"), binary=BinarySpec(3))
    losses = {}
    for name, plan in (
        ("greedy", greedy),
        ("alternating", dataclasses.replace(greedy, solver=SolverSpec(name="nearest"))),
    ):
        report = quantize(source, tmp_path / f"{name}.onnx", Recipe(name, linear=plan, min_elements=64))
        losses[name] = np.mean([record.relative_error for record in report.weights])
    assert losses["alternating"] < 0.8 * losses["greedy"]


def test_stock_onnx_runtime_runs_it_without_functions(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = quantize(source, out, recipe("binary", target="stock"))
    onnx.checker.check_model(str(out), full_check=True)
    assert not onnx.load(out).functions
    assert {record.form for record in report.weights} == {"MatMulNBits of planes"}
    inspected = inspect_model(out, reference=source)
    assert not inspected.mismatches
    by_name = {weight.name: weight for weight in inspected.weights}
    for record in report.weights:
        weight = by_name[record.name]
        assert (weight.form, weight.kinds, weight.code_bits, weight.measured) == ("MatMulNBits", ("linear",), 3, True)
        assert weight.relative_error == pytest.approx(record.relative_error, rel=1e-3)
        # Three bits, and three scales of 16 bits for each row of 128 inputs or more.
        assert 3 < weight.bits_per_weight <= 3 + 3 * 16 / 128
    assert report.check is not None
    assert report.check.relative_errors["y"] < 0.4
    assert set(by_name) == {record.name for record in report.weights}


def test_a_size_holds_with_stock_forms(source: Path, tmp_path: Path) -> None:
    chosen = dataclasses.replace(recipe("binary", target="stock"), allocation=AllocationSpec("layer"))
    least = quantize(source, tmp_path / "least.onnx", chosen, bits=1.2).bytes
    for size in (least + 20_000, least + 40_000):
        report = quantize(source, tmp_path / f"{size}.onnx", chosen, size=size)
        assert 0.8 * size < report.bytes <= size


def test_greedy_levels_are_of_binary_codes() -> None:
    with pytest.raises(RecipeError, match="rounded to nearest"):
        LinearPlan(solver=SolverSpec(name="nearest", levels="greedy"))


def test_tables_have_planes_too(tmp_path: Path) -> None:
    ids = np.arange(96).reshape(4, 24)
    proto = models.model(
        [models.node("Gather", "table ids", "y", "/embed")],
        [models.integers("ids", ["b", "s"])],
        [models.floats("y", ["b", "s", 64])],
        {"table": models.weight(100, 64)},
    )
    table = models.save(proto, tmp_path / "table.onnx")
    report = quantize(table, tmp_path / "out.onnx", recipe("binary"), calibration=[{"ids": ids}])
    (record,) = report.weights
    assert (record.format, record.kinds) == ("binary 4-bit", ("table",))
    (got,) = ort.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"]).run(None, {"ids": ids})
    want = models.weight(100, 64)[ids]
    assert np.square(got - want).sum() / np.square(want).sum() == pytest.approx(record.relative_error, rel=0.1)
    assert SAME_PRODUCT < record.relative_error < 0.03
