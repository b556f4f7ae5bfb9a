from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from onnxq.errors import CalibrationError, ModelError
from onnxq.evaluation import top1
from onnxq.evaluation.accuracy import compare_predictions, score
from tests.evaluation.models import write_bigram_model, write_classifier

X = np.array([[3, 1, 0], [0, 2, 1], [0, 1, 2], [5, 1, 2], [1, 0, 4]], np.float32)
LABELS = np.array([0, 1, 2, 0, 1])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.savez(tmp_path / "data.npz", x=X, labels=LABELS)
    return tmp_path / "data.npz"


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_by_hand(tmp_path: Path, data: Path, batch: int) -> None:
    found = top1(write_classifier(tmp_path / "m.onnx"), data, batch_size=batch)
    assert (found.samples, found.correct, found.top1) == (5, 4, 0.8)
    assert found.standard_error == pytest.approx(math.sqrt(0.8 * 0.2 / 5))


def test_the_smallest_score_is_not_the_class(tmp_path: Path, data: Path) -> None:
    assert top1(write_classifier(tmp_path / "m.onnx", flip=-1), data).correct == 1  # sample 4: class 1 is its smallest


def test_a_fixed_batch_is_kept_to(tmp_path: Path, data: Path) -> None:
    assert top1(write_classifier(tmp_path / "m.onnx", batch=1), data).correct == 4
    with pytest.raises(CalibrationError, match="fixes dimension 0 to 2"):
        top1(write_classifier(tmp_path / "two.onnx", batch=2), data)


def test_samples_are_drawn_with_their_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    np.savez(tmp_path / "d.npz", x=np.eye(3, dtype=np.float32)[labels], labels=labels.astype(np.uint8))
    found = top1(write_classifier(tmp_path / "m.onnx"), tmp_path / "d.npz", max_samples=50)
    assert (found.samples, found.correct) == (50, 50)


def test_a_change_by_hand() -> None:
    truth = np.array([0, 0, 0, 0, 1])
    found = compare_predictions(np.array([0, 0, 1, 2, 1]), np.array([0, 1, 0, 1, 0]), truth)
    # Right before: 0, 1, 4. Right after: 0, 2. Lost 1 and 4, won 2. Same class for 0 only: 3 is wrong in two ways.
    assert (found.lost, found.won) == (2, 1)
    assert found.top1 == pytest.approx(-0.2)
    assert found.agreement == pytest.approx(0.2)
    assert score(truth, truth).standard_error == 0


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": X}, "no array 'labels' but x"),
        ({"x": X, "labels": LABELS.astype(np.float32)}, "one integer a sample"),
        ({"x": X, "labels": LABELS[:4]}, "there are 4 labels"),
        ({"y": X, "labels": LABELS}, "'y' is not an input"),
        ({"x": X[:0], "labels": LABELS[:0]}, "no sample"),
    ],
)
def test_data_that_does_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(CalibrationError, match=said):
        top1(write_classifier(tmp_path / "m.onnx"), tmp_path / "d.npz")


def test_refusals(tmp_path: Path, data: Path) -> None:
    with pytest.raises(CalibrationError, match=r"not an \.npz file"):
        top1(write_classifier(tmp_path / "m.onnx"), tmp_path / "none.npz")
    ids = np.ones((2, 3), np.int64)
    np.savez(tmp_path / "ids.npz", input_ids=ids, attention_mask=ids, labels=[0, 1])
    with pytest.raises(ModelError, match="task perplexity"):
        top1(write_bigram_model(tmp_path / "lm.onnx", np.zeros((4, 4))), tmp_path / "ids.npz")
    with pytest.raises(ModelError, match="holds NaN for samples 0 to 4"):
        top1(write_classifier(tmp_path / "nan.onnx", flip=np.nan), data)
