from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxq.calibration import ModelInput, open_data, text_windows, window_feeds
from onnxq.errors import CalibrationError
from tests.evaluation.models import write_tokenizer

pytest.importorskip("tokenizers")

INT64 = np.dtype(np.int64)
LM = tuple(ModelInput(n, INT64, ("batch", "tokens")) for n in ("input_ids", "attention_mask", "position_ids"))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("a b c\n\nd a\nb b b d d\nc\n", encoding="utf-8")
    return path


def test_windows_run_on_over_lines_without_special_tokens(text: Path, tokenizer: Path) -> None:
    # a b c d a b b b d d c: three windows of three, two tokens left over
    np.testing.assert_array_equal(text_windows(text, tokenizer, context=3), [[1, 2, 3], [4, 1, 2], [2, 2, 4]])


def test_pieces_leave_no_seam(text: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = text_windows(text, tokenizer, context=11)
    monkeypatch.setattr("onnxq.calibration.windows._PIECE_CHARACTERS", 1)
    np.testing.assert_array_equal(text_windows(text, tokenizer, context=11), whole)


def test_the_separator_is_between_lines(tmp_path: Path, text: Path, tokenizer: Path) -> None:
    with_d = text_windows(text, tokenizer, context=14, separator=" d ")
    np.testing.assert_array_equal(with_d, [[1, 2, 3, 4, 4, 1, 4, 2, 2, 2, 4, 4, 4, 3]])


def test_windows_are_drawn_from_a_seed(tmp_path: Path, tokenizer: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "long.txt").write_text(" ".join(rng.choice(list("abcd"), 400)), encoding="utf-8")
    every = text_windows(tmp_path / "long.txt", tokenizer, context=8)
    some = text_windows(tmp_path / "long.txt", tokenizer, context=8, windows=5, seed=1)
    assert (len(every), len(some)) == (50, 5)
    places = [int(np.flatnonzero((every == window).all(1))[0]) for window in some]
    assert places == sorted(set(places))
    np.testing.assert_array_equal(some, text_windows(tmp_path / "long.txt", tokenizer, context=8, windows=5, seed=1))
    other = text_windows(tmp_path / "long.txt", tokenizer, context=8, windows=5, seed=2)
    assert not np.array_equal(some, other)
    assert len(text_windows(tmp_path / "long.txt", tokenizer, context=8, windows=99)) == 50


def test_feeds_are_calibration_data(text: Path, tokenizer: Path) -> None:
    windows = text_windows(text, tokenizer, context=3)
    data = open_data(window_feeds(windows, LM, batch=2), LM)
    assert (data.samples, data.batches) == (3, 2)
    first = next(iter(data))
    np.testing.assert_array_equal(first["input_ids"], windows[:2])
    np.testing.assert_array_equal(first["attention_mask"], np.ones((2, 3)))
    np.testing.assert_array_equal(first["position_ids"], [[0, 1, 2], [0, 1, 2]])


def test_a_decoder_with_a_cache_gets_an_empty_past(text: Path, tokenizer: Path) -> None:
    past = ModelInput("past_key_values.0.key", np.dtype(np.float32), ("batch", 2, "past", 4))
    (feed, _) = window_feeds(text_windows(text, tokenizer, context=3), (*LM, past), batch=2)
    assert feed["past_key_values.0.key"].shape == (2, 2, 0, 4)


def test_fixed_dimensions(text: Path, tokenizer: Path) -> None:
    windows = text_windows(text, tokenizer, context=3)
    one = tuple(ModelInput(i.name, INT64, (1, 3)) for i in LM)
    assert [feed["input_ids"].shape for feed in window_feeds(windows, one, batch=8)] == [(1, 3)] * 3
    longer = tuple(ModelInput(i.name, INT64, ("batch", 5)) for i in LM)
    with pytest.raises(CalibrationError, match="fixes dimension 1 to 5"):
        window_feeds(windows, longer)


def test_refusals(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="11 tokens, less than one window of 12"):
        text_windows(text, tokenizer, context=12)
    with pytest.raises(CalibrationError, match="needs 2 tokens"):
        text_windows(text, tokenizer, context=1)
    with pytest.raises(CalibrationError, match="at least 1"):
        text_windows(text, tokenizer, windows=0)
    with pytest.raises(CalibrationError, match="not a file"):
        text_windows(tmp_path / "none.txt", tokenizer)
    with pytest.raises(CalibrationError, match=r"No tokenizer\.json"):
        text_windows(text, tmp_path)
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(CalibrationError, match="not UTF-8"):
        text_windows(tmp_path / "latin.txt", tokenizer)
    with pytest.raises(CalibrationError, match="can't be made from text"):
        window_feeds(np.ones((1, 3), int), (*LM, ModelInput("pixels", np.dtype(np.float32), ("batch", 3))))
