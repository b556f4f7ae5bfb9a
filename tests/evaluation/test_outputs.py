from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from onnxq.errors import ModelError
from onnxq.evaluation import compare_layers, compare_outputs
from onnxq.evaluation.outputs import ErrorSums, add_errors
from tests.evaluation.models import feeds, write_encoder


def test_numbers_by_hand() -> None:
    sums = ErrorSums()
    sums.add(np.array([[3.0, 0.0]]), np.array([[3.0, 1.0]]))
    sums.add(np.array([[0.0, 4.0]]), np.array([[1.0, 0.0]]))
    error = sums.error("y")
    # noise: (0, 1) and (1, -4): 18; reference: 9 + 16; candidate: 10 + 1; product: 9
    assert error.values == 4
    assert error.relative == pytest.approx(math.sqrt(18 / 25))
    assert error.snr_db == pytest.approx(10 * math.log10(25 / 18))
    assert error.cosine == pytest.approx(9 / math.sqrt(25 * 11))
    assert error.max_abs == 4
    assert error.agreement == 0.5


def test_equal_and_zero_references() -> None:
    sums = ErrorSums()
    sums.add(np.zeros((2, 1)), np.zeros((2, 1)))
    error = sums.error("y")
    assert (error.relative, error.snr_db, error.cosine, error.agreement) == (0.0, math.inf, 1.0, None)
    sums.add(np.zeros((2, 1)), np.ones((2, 1)))
    error = sums.error("y")
    assert (error.relative, error.snr_db, error.cosine) == (math.inf, -math.inf, 0.0)


def test_padding_does_not_count() -> None:
    mask = np.array([[1, 0], [1, 1]])
    reference = np.ones((2, 2, 3))
    candidate = reference.copy()
    candidate[0, 1] = 100
    sums: dict[str, ErrorSums] = {}
    add_errors(sums, {"y": reference}, {"y": candidate}, mask)
    assert sums["y"].error("y").relative == 0
    assert sums["y"].values == 9
    add_errors(sums, {"y": reference}, {"y": candidate}, None)
    assert sums["y"].error("y").relative > 1


def test_integer_outputs_and_names_of_one_side_are_left_out() -> None:
    sums: dict[str, ErrorSums] = {}
    add_errors(sums, {"ids": np.ones(2, np.int64), "mine": np.ones(2)}, {"ids": np.zeros(2, np.int64)}, None)
    assert sums == {}


def test_compare_outputs_of_sessions(tmp_path: Path) -> None:
    reference = write_encoder(tmp_path / "reference.onnx")
    small, large = (write_encoder(tmp_path / f"{n}.onnx", noise=n) for n in (0.01, 0.1))
    same = compare_outputs(reference, reference, feeds())
    assert (same.batches, same.samples) == (3, 12)
    assert same.outputs[0].snr_db == math.inf
    # 12 sentences of 6 tokens; in half of them two tokens are padding
    assert same.outputs[0].values == (12 * 6 - 6 * 2) * 8
    near, far = (compare_outputs(reference, m, feeds()).outputs[0] for m in (small, large))
    # The noise enters linearly: ten times the noise is 20 dB.
    assert near.snr_db - far.snr_db == pytest.approx(20, abs=0.1)
    assert near.agreement is not None
    assert far.agreement is not None
    assert near.agreement >= far.agreement


def test_compare_outputs_refusals(tmp_path: Path) -> None:
    path = write_encoder(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="no data"):
        compare_outputs(path, path, [])
    with pytest.raises(ModelError, match="lacks the model's inputs attention_mask"):
        compare_outputs(path, path, [{"input_ids": np.ones((1, 2), np.int64)}])
    with pytest.raises(ModelError, match="not a file"):
        compare_outputs(tmp_path / "none.onnx", path, feeds())


@pytest.mark.parametrize("external", [False, True])
def test_layers_show_where_the_error_begins(tmp_path: Path, external: bool) -> None:
    reference = write_encoder(tmp_path / "reference.onnx", external=external)
    candidate = write_encoder(tmp_path / "candidate.onnx", noise=0.05, external=external)
    found = compare_layers(reference, candidate, feeds())
    assert [(layer.error.name, layer.operator) for layer in found] == [
        ("embedded", "Gather"),
        ("first", "MatMul"),
        ("second", "MatMul"),
        ("hidden", "Add"),
    ]
    assert [layer.position for layer in found] == [0, 1, 3, 4]
    assert [layer.error.snr_db == math.inf for layer in found] == [True, True, False, False]
    # The residual adds signal and no noise.
    assert found[3].error.snr_db > found[2].error.snr_db
    assert found[3].error == compare_outputs(reference, candidate, feeds()).outputs[0]


def test_layers_by_name(tmp_path: Path) -> None:
    path = write_encoder(tmp_path / "m.onnx")
    found = compare_layers(path, path, feeds(), names=["second", "act"])
    assert [layer.node for layer in found] == ["tanh", "dense_2"]
    with pytest.raises(ModelError, match="not a tensor of both models: nothing"):
        compare_layers(path, path, feeds(), names=["nothing"])
    with pytest.raises(ModelError, match="no data"):
        compare_layers(path, path, [])
