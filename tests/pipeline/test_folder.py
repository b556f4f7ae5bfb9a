from __future__ import annotations

from pathlib import Path

import pytest

import onnxq
from onnxq.errors import CalibrationError, ModelError, OutputExistsError
from onnxq.recipe import Recipe
from tests.graph import models
from tests.pipeline.test_quantize import run_both, stack

SMALL = Recipe("small", min_elements=64)


def make_folder(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        models.save(stack(), path / name, external=True)
    (path / "config.json").write_text("{}")
    (path / "sub").mkdir()
    (path / "sub" / "vocab.txt").write_text("a")
    return path


def test_graphs_are_quantised_and_the_rest_is_carried(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", "encoder.onnx", "decoder.onnx")
    reports = onnxq.quantize_folder(source, tmp_path / "out", recipe=SMALL)
    assert sorted(reports) == ["decoder.onnx", "encoder.onnx"]
    written = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert written == [
        "config.json", "decoder.onnx", "decoder.onnx.data", "encoder.onnx", "sub/vocab.txt",
    ]  # fmt: skip  # both graphs hold the same weights, which are stored once
    assert run_both(source / "encoder.onnx", tmp_path / "out" / "encoder.onnx") < 0.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_a_failure_leaves_no_folder(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", "a.onnx", "b.onnx")
    (source / "b.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError):
        onnxq.quantize_folder(source, tmp_path / "out", recipe=SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_an_existing_folder_needs_force(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", "a.onnx")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError):
        onnxq.quantize_folder(source, tmp_path / "out", recipe=SMALL)
    onnxq.quantize_folder(source, tmp_path / "out", recipe=SMALL, force=True)
    with pytest.raises(OutputExistsError):
        onnxq.quantize_folder(source, source, recipe=SMALL, force=True)


def test_data_for_several_graphs_is_refused(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", "a.onnx", "b.onnx")
    with pytest.raises(CalibrationError, match="2 graphs"):
        onnxq.quantize_folder(source, tmp_path / "out", recipe=SMALL, calibration=[{}])
