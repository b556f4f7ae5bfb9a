from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import onnxq
from onnxq.errors import ModelError
from onnxq.formats.binary import BinaryFormat
from onnxq.graph.shared import content_of
from onnxq.pipeline.bank import EncodingBank
from onnxq.recipe import Recipe
from onnxq.solvers.binary import binary_codes
from tests.graph import models

SMALL = Recipe("small", min_elements=64)


def test_an_encoding_is_found_by_content(tmp_path: Path) -> None:
    weight = models.weight(8, 64)
    encoding = binary_codes(weight, BinaryFormat.of(8, 2))
    bank = EncodingBank(tmp_path / "bank")
    bank.keep(content_of(weight), encoding)
    found = EncodingBank.existing(tmp_path / "bank").find(content_of(weight))
    assert found is not None
    np.testing.assert_array_equal(found.dequantize(), encoding.dequantize())
    assert bank.find(content_of(weight + 1)) is None
    assert bank.find_all([content_of(weight), content_of(weight + 1)]) is None
    assert len(bank.find_all([content_of(weight)] * 2) or ()) == 2


def test_an_empty_folder_is_no_bank(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no encodings"):
        EncodingBank.existing(tmp_path)


def test_a_trained_weight_takes_its_codes(tmp_path: Path) -> None:
    """Planes of signs that the alternating solver would not find again, under a recipe that says uniform."""
    kept = binary_codes(models.weight(32, 64, seed=3), BinaryFormat.of(32, 3))
    bank = EncodingBank(tmp_path / "bank")
    bank.keep(content_of(kept.dequantize()), kept)
    proto = models.model(
        [models.node("MatMul", "x trained", "h", "/fc1/MatMul"), models.node("MatMul", "h other", "y", "/fc2/MatMul")],
        [models.floats("x", ["b", 64])],
        [models.floats("y", ["b", 16])],
        {"trained": np.ascontiguousarray(kept.dequantize().T), "other": models.weight(32, 16)},
    )
    source = models.save(proto, tmp_path / "m.onnx")
    report = onnxq.quantize(source, tmp_path / "out.onnx", recipe=SMALL, encodings=tmp_path / "bank")
    trained, other = report.weights
    assert (trained.format, trained.solver, trained.relative_error) == ("binary 3-bit", "training", 0.0)
    assert "nothing is rounded again" in trained.note
    assert other.format.startswith("uniform")
    budget = onnxq.quantize(source, tmp_path / "b.onnx", recipe=SMALL, encodings=tmp_path / "bank", bits=9)
    assert budget.weights[0].format == "binary 3-bit"
