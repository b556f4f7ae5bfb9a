from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from rich.console import Console

from onnxq.errors import OnnxqError
from onnxq.evaluation import top1
from tools import fashion, vit
from tools.fashion import Pictures
from tools.models import cache_folder
from tools.packages import FetchError
from tools.vit import Settings

TINY = Settings(hidden=16, layers=1, heads=2, ffn=32, patch=14, epochs=2, batch=16)

GOOD = 0.87
"""Top-1 accuracy that the training reaches with some room."""


def pictures(count: int, seed: int = 0) -> Pictures:
    rng = np.random.default_rng(seed)
    return Pictures(rng.integers(0, 256, (count, 28, 28), np.uint8), rng.integers(0, 10, count))


class StoppedError(Exception):
    pass


class Stopping(Console):
    """Stops the training when it says that its first epoch is done."""

    def print(self, *said: object, **options: object) -> None:
        if said and str(said[0]).startswith("epoch 1"):
            raise StoppedError


def quiet() -> Console:
    return Console(quiet=True)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def test_idx_files_are_read() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    np.testing.assert_array_equal(fashion.read_idx(idx(array), "m"), array)
    with pytest.raises(FetchError, match=r"shape \(2, 3, 4\) but holds 23"):
        fashion.read_idx(idx(array)[:-1], "m")
    for broken in (b"", b"\0\0\x0d\x01", b"\0\0\x08\x03\0"):
        with pytest.raises(FetchError, match="not an IDX file"):
            fashion.read_idx(broken, "m")


def test_both_sides_are_loaded_and_normalised(tmp_path: Path) -> None:
    for side, number in (("train", 5), ("t10k", 2)):
        made = pictures(number)
        (tmp_path / f"{side}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(made.pixels)))
        labels = made.labels.astype(np.uint8)
        (tmp_path / f"{side}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    train, test = fashion.load(tmp_path)
    assert (train.pixels.shape, test.pixels.shape, test.labels.dtype) == ((5, 28, 28), (2, 28, 28), np.int64)
    values = test.normalised()
    assert (values.shape, values.dtype) == ((2, 1, 28, 28), np.float32)
    np.testing.assert_allclose(
        values[1, 0] * fashion.DEVIATION + fashion.MEAN, test.pixels[1] / 255, rtol=1e-5, atol=1e-6
    )


def test_the_rate_rises_and_falls_once() -> None:
    rates = np.array([vit.learning_rate(step, 100, 2.0) for step in range(101)])
    assert rates[0] == pytest.approx(2 / 25)
    assert rates[30] == rates.max() == 2
    assert rates[100] == pytest.approx(2 / 1e5)
    assert (np.diff(rates[:31]) > 0).all()
    assert (np.diff(rates[30:]) < 0).all()


@pytest.fixture
def torch():
    pytest.importorskip("transformers")
    return pytest.importorskip("torch")


def test_a_stopped_training_goes_on_as_if_it_had_not_been(torch, tmp_path: Path) -> None:
    whole = vit.train(vit.build(TINY), pictures(64), TINY, tmp_path / "whole.safetensors", quiet())
    with pytest.raises(StoppedError):
        vit.train(vit.build(TINY), pictures(64), TINY, tmp_path / "cut.safetensors", Stopping(quiet=True))
    resumed = vit.train(vit.build(TINY), pictures(64), TINY, tmp_path / "cut.safetensors", quiet())
    start = dict(vit.build(TINY).named_parameters())
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(start["model.classifier.weight"], whole.model.classifier.weight)


def test_a_checkpoint_of_another_training_is_refused(torch, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    vit.train(vit.build(TINY), pictures(32), TINY, path, quiet())
    other = Settings(**{**vars(TINY), "seed": 1})
    with pytest.raises(OnnxqError, match="other settings"):
        vit.train(vit.build(other), pictures(32), other, path, quiet())


def test_the_finished_folder(torch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optimum.exporters.onnx")
    monkeypatch.setattr(vit, "fetch", lambda name, cache: tmp_path)
    monkeypatch.setattr(vit, "load", lambda folder: (pictures(64), pictures(40, seed=1)))
    monkeypatch.setattr(vit, "CALIBRATION_PICTURES", 8)
    folder = vit.prepare(tmp_path, TINY, console=quiet())
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    record = json.loads((folder / "training.json").read_text())
    assert (record["pictures"], record["settings"]["epochs"]) == (40, 2)
    held_out = np.load(folder / "heldout.npz")
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 40):
        (logits,) = session.run(["logits"], {"pixel_values": held_out["pixel_values"][:count]})
        assert logits.shape == (count, 10)
    assert record["top1"] == (logits.argmax(1) == held_out["labels"]).mean()
    assert np.load(folder / "calibration.npz")["pixel_values"].shape == (8, 1, 28, 28)
    monkeypatch.setattr(vit, "train", None)
    assert vit.prepare(tmp_path, TINY, console=quiet()) == folder  # found, not trained again


@pytest.mark.models
def test_the_real_model_knows_clothes() -> None:
    """The model from the cache: made by `python -m tools.vit`, which takes some twenty minutes."""
    folder = cache_folder() / vit.FOLDER
    if not (folder / "model.onnx").is_file():
        pytest.skip("not trained: run `python -m tools.vit`")
    record = json.loads((folder / "training.json").read_text())
    assert record["top1"] > GOOD
    found = top1(folder / "model.onnx", folder / "heldout.npz", max_samples=1000)
    # Five standard errors: the draw is fixed, but not the training.
    assert found.top1 == pytest.approx(record["top1"], abs=5 * found.standard_error)
