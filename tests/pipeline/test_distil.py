"""Distillation inside `quantize`: scales, biases and norms of the written model, and what is refused beforehand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxq
from onnxq.errors import CalibrationError
from onnxq.pipeline import write as pipeline
from onnxq.recipe import DistillationSpec, FrameSpec, GridSpec, Recipe
from onnxq.report.records import QuantizeReport
from tests.graph import models
from tests.pipeline.test_framequant import WIDTH, block, quantize, recipe

pytest.importorskip("torch")

STEPS, RATE = 40, 1e-3
MUCH = [{"x": models.weight(4, 16, 6, seed=seed) @ models.weight(6, WIDTH, seed=90)} for seed in range(24)]
"""With little data the held-out loss does not fall, and nothing is kept."""
WAYS = {
    "uniform": recipe("uniform", grid=GridSpec(2, 32)),
    "trellis in a frame": recipe(),
    "redundant": recipe(grid=GridSpec(2, "column"), frame=FrameSpec(1.25)),
    "two sides": recipe(grid=GridSpec(2, "column"), frame=FrameSpec(1.25, 1.0)),
    "stock": recipe(grid=GridSpec(2, "column"), target="stock"),
}


def distilled(base: Recipe) -> Recipe:
    return dataclasses.replace(base, distillation=DistillationSpec(STEPS, RATE))


def error(report: QuantizeReport) -> float:
    assert report.check is not None
    return report.check.relative_errors["y"]


def stored(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(block(), tmp_path_factory.mktemp("source") / "model.onnx")


@pytest.mark.parametrize("way", WAYS)
def test_outputs_come_back_and_codes_stay(way: str, source: Path, tmp_path: Path) -> None:
    before = quantize(source, tmp_path / "before.onnx", WAYS[way], calibration=MUCH)
    after = quantize(source, tmp_path / "after.onnx", distilled(WAYS[way]), calibration=MUCH)
    (note,) = [note for note in after.notes if note.startswith("distilled")]
    assert "not kept" not in note
    # The check runs the written file: scales have to be the trained ones, in the frame or out of it.
    assert error(after) < error(before)
    old, new = stored(tmp_path / "before.onnx"), stored(tmp_path / "after.onnx")
    assert old.keys() == new.keys()
    for name, array in old.items():
        same = np.array_equal(array, new[name])
        if name.endswith((".packed", ".codes", ".zero_points")) or name.startswith("onnxq."):
            assert same, name
        elif name.endswith(".scales"):
            assert not same, name


def test_one_batch_is_refused_before_anything_is_solved(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def solved(*_: object) -> None:
        raise AssertionError("a weight was solved")

    monkeypatch.setattr(pipeline, "solve_weight", solved)
    with pytest.raises(CalibrationError, match="has 1 batch: distillation needs at least two"):
        quantize(source, tmp_path / "out.onnx", distilled(recipe()), calibration=MUCH[:1])
    assert list(tmp_path.iterdir()) == []


def test_without_data_the_report_says_that_nothing_was_distilled(source: Path, tmp_path: Path) -> None:
    report = onnxq.quantize(source, tmp_path / "out.onnx", recipe=distilled(recipe()))
    assert "no calibration data: nothing was distilled" in report.notes
