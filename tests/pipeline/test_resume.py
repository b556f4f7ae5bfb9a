from __future__ import annotations

from pathlib import Path

import numpy as np

from onnxq.formats.uniform import UniformFormat, ZeroPoint
from onnxq.pipeline.resume import ResumeStore, file_identity
from tests.encodings import random_encoding

ENCODING = random_encoding(UniformFormat(3, None, ZeroPoint.PER_GROUP), 45, 100)


def test_a_solved_weight_comes_back(tmp_path: Path) -> None:
    ResumeStore(tmp_path / "run", {"seed": 1}).save("w", ENCODING)
    store = ResumeStore(tmp_path / "run", {"seed": 1})
    back = store.load("w")
    assert store.found == 1
    assert back is not None
    assert back.format == ENCODING.format
    np.testing.assert_array_equal(back.dequantize(), ENCODING.dequantize())
    assert store.load("another") is None


def test_another_run_starts_afresh(tmp_path: Path) -> None:
    ResumeStore(tmp_path / "run", {"seed": 1}).save("w", ENCODING)
    store = ResumeStore(tmp_path / "run", {"seed": 2})
    assert store.load("w") is None
    assert not (tmp_path / "run").exists()


def test_a_file_cut_off_while_saving_is_not_read(tmp_path: Path) -> None:
    store = ResumeStore(tmp_path / "run", {})
    store.save("w", ENCODING)
    (file,) = (tmp_path / "run").glob("*.npz")
    file.rename(file.with_suffix(".partial"))
    assert ResumeStore(tmp_path / "run", {}).load("w") is None


def test_discard_removes_the_folder(tmp_path: Path) -> None:
    store = ResumeStore(tmp_path / "run", {})
    store.save("w", ENCODING)
    store.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_changed_file_has_another_identity(tmp_path: Path) -> None:
    file = tmp_path / "m"
    file.write_bytes(b"1")
    before = file_identity(file)
    file.write_bytes(b"12")
    assert file_identity(file) != before
