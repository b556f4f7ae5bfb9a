"""The published CVXQ on a model of two layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

pytest.importorskip("torch")

from onnxq.calibration import model_inputs, open_data
from onnxq.graph import load
from tests.graph import models
from tests.graph.models import floats, node, weight
from tools.tables.paper_cvxq import ABLATION, CVXQ, FULL, paper_cvxq, with_corrections
from tools.tables.subjects import Subject, measure_with

FIRST, SECOND, WIDTH = 24, 5, 16


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    """A layer with a bias and one without; the metric is the mean squared error."""
    nodes = [
        node("MatMul", "x first", "product", "up"),
        node("Add", "product bias", "sum"),
        node("Relu", "sum", "hidden"),
        node("MatMul", "hidden second", "y", "down"),
    ]
    initializers = {
        "first": weight(WIDTH, FIRST, seed=1) * np.exp(weight(WIDTH, 1, seed=2)),
        "bias": weight(FIRST, seed=3),
        "second": weight(FIRST, SECOND, seed=4),
    }
    proto = models.model(nodes, [floats("x", ["b", WIDTH])], [floats("y", ["b", SECOND])], initializers)
    path = models.save(proto, tmp_path / "model.onnx")
    x = weight(48, WIDTH, seed=5) + 1
    wanted = ort.InferenceSession(path).run(None, {"x": x})[0]

    def measure(session: ort.InferenceSession) -> float:
        return float(np.mean((session.run(["y"], {"x": x})[0] - wanted) ** 2) / np.mean(wanted**2))

    return Subject(path, lambda: open_data([{"x": x}], model_inputs(load(path).model)), "error", measure)


def test_corrections_of_zero_change_nothing(subject: Subject, tmp_path: Path) -> None:
    corrected = with_corrections(subject, tmp_path / "corrected" / "model.onnx")
    assert measure_with(corrected, {}) < 1e-12
    ones = {"up.correction": np.ones(FIRST, np.float32), "down.correction": np.ones(SECOND, np.float32)}
    assert measure_with(corrected, ones) > 1e-3


def test_each_part_has_its_price(subject: Subject, tmp_path: Path) -> None:
    corrected = with_corrections(subject, tmp_path / "corrected.onnx")
    found = {
        line: paper_cvxq(corrected, 4, group_size=8, iterations=3, samples=8, switches=switches, report=str)
        for line, switches in ABLATION.items()
    }
    elements = WIDTH * FIRST + FIRST * SECOND
    groups = WIDTH * 3 + FIRST  # 24 rows are three groups of 8, and 5 are one
    for line, item in found.items():
        side = item.bits * elements - item.depth * elements
        price = 35 * groups + 2 * FIRST if ABLATION[line].mixed else 32 * groups
        assert side == pytest.approx(price + 16 * SECOND * ABLATION[line].corrected)
        assert item.depth == pytest.approx(4, abs=0.2)
        assert {name for name in item.replaced if not name.endswith("correction")} == {"first", "second"}
        assert measure_with(corrected, item.replaced) < 0.05
    nearest = measure_with(corrected, found["nearest, min-max steps"].replaced)
    assert measure_with(corrected, found["+ mixed depths"].replaced) < nearest
    assert len(found[CVXQ].seconds) == 3


def test_corrections_take_the_mean_error_away(subject: Subject, tmp_path: Path) -> None:
    """One layer's error is zero on average over the data that its input means are from."""
    corrected = with_corrections(subject, tmp_path / "corrected.onnx")
    plain = dataclasses.replace(FULL, mixed=False, steps="best")
    found = paper_cvxq(corrected, 2, iterations=3, samples=16, switches=plain)
    (feed,) = subject.calibration()
    error = feed["x"] @ (found.replaced["first"] - weight(WIDTH, FIRST, seed=1) * np.exp(weight(WIDTH, 1, seed=2)))
    np.testing.assert_allclose(error.mean(axis=0), -found.replaced["up.correction"], atol=1e-5)
    assert np.abs(error.mean(axis=0)).max() > 1e-3
    with pytest.raises(ValueError, match="a whole number"):
        paper_cvxq(corrected, 2.5, switches=plain)
