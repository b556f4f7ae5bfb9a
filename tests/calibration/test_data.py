from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from onnxq.calibration import ModelInput, open_data
from onnxq.calibration import data as data_module
from onnxq.errors import CalibrationError

IDS = ModelInput("input_ids", np.dtype(np.int64), ("batch", "sequence"))
PIXELS = ModelInput("pixels", np.dtype(np.float32), ("batch", 3))
SCALE = ModelInput("scale", np.dtype(np.float32), ("batch",), optional=True)
INPUTS = (IDS, PIXELS, SCALE)


def good(samples: int = 5) -> dict[str, np.ndarray]:
    return {
        "input_ids": np.arange(samples * 4).reshape(samples, 4),
        "pixels": np.ones((samples, 3), np.float32),
    }


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def ids(data: object) -> np.ndarray:
    return np.concatenate([f["input_ids"] for f in data])  # type: ignore[attr-defined]


def test_npz_is_batched_and_can_be_read_again(tmp_path: Path) -> None:
    data = open_data(save(tmp_path / "a.npz", **good()), INPUTS, batch_size=2)
    assert (data.samples, len(data), data.casts) == (5, 3, ())
    assert [f["input_ids"].shape[0] for f in data] == [2, 2, 1]
    np.testing.assert_array_equal(ids(data), good()["input_ids"])
    np.testing.assert_array_equal(ids(data), good()["input_ids"])


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    first, second = good(3), good(2)
    second["input_ids"] = second["input_ids"] + 100
    save(tmp_path / "b.npz", **second)
    save(tmp_path / "a.npz", **first)
    data = open_data(tmp_path, INPUTS, batch_size=2)
    np.testing.assert_array_equal(ids(data), np.concatenate([first["input_ids"], second["input_ids"]]))
    assert [f["pixels"].shape[0] for f in data] == [2, 1, 2]


def test_the_draw_of_samples_follows_the_seed_and_keeps_rows_together(tmp_path: Path) -> None:
    arrays = good(50)
    arrays["pixels"][:, 0] = arrays["input_ids"][:, 0]
    path = save(tmp_path / "a.npz", **arrays)
    one, same, other = (open_data(path, INPUTS, max_samples=7, seed=s) for s in (1, 1, 2))
    assert one.samples == 7
    np.testing.assert_array_equal(ids(one), ids(same))
    assert not np.array_equal(ids(one), ids(other))
    assert (np.diff(ids(one)[:, 0]) > 0).all()
    for feed in one:
        np.testing.assert_array_equal(feed["pixels"][:, 0], feed["input_ids"][:, 0])


def test_widening_casts_are_made_and_recorded(tmp_path: Path) -> None:
    arrays = good()
    arrays["input_ids"] = arrays["input_ids"].astype(np.int32)
    data = open_data(save(tmp_path / "a.npz", **arrays), INPUTS)
    assert data.casts == ("input_ids: int32 -> int64",)
    assert next(iter(data))["input_ids"].dtype == np.int64


def test_an_optional_input_may_be_there(tmp_path: Path) -> None:
    data = open_data(save(tmp_path / "a.npz", **good(), scale=np.ones(5, np.float32)), INPUTS)
    assert set(next(iter(data))) == {"input_ids", "pixels", "scale"}


def with_(**changes: np.ndarray) -> dict[str, np.ndarray]:
    return {**good(), **changes}


NAN = np.ones((5, 3), np.float32)
NAN[3, 1] = np.nan
REFUSED = {
    "unknown name, the nearest offered": (
        with_(input_idx=good()["input_ids"]),
        r"'input_idx'.*mean 'input_ids'",
    ),
    "missing name": ({"input_ids": good()["input_ids"]}, r"pixels: float32 \[batch, 3\] is missing"),
    "dtype, both named": (with_(pixels=np.ones((5, 3))), r"'pixels' is float64, the model wants float32"),
    "kind of dtype": (with_(pixels=np.ones((5, 3), np.int8)), r"'pixels' is int8, the model wants float32"),
    "rank": (with_(pixels=np.ones((5, 3, 1), np.float32)), r"3 dimensions \[5, 3, 1\], the model wants 2"),
    "fixed dimension": (with_(pixels=np.ones((5, 4), np.float32)), r"fixes dimension 1 to 3"),
    "no samples": ({k: v[:0] for k, v in good().items()}, r"no sample"),
    "NaN": (with_(pixels=NAN), r"'pixels' holds 1 NaN, the first at index \[3, 1\]"),
    "ragged": (
        with_(pixels=np.ones((4, 3), np.float32)),
        r"different numbers of samples.*input_ids: 5, pixels: 4",
    ),
    "scalar": (with_(pixels=np.array(1, np.float32)), r"'pixels' is a single number"),
}


@pytest.mark.parametrize(("arrays", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_data_that_does_not_fit_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        open_data(save(tmp_path / "bad.npz", **arrays), INPUTS)
    assert "bad.npz" in str(caught.value)


def test_paths_that_hold_no_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="does not exist"):
        open_data(tmp_path / "nothing.npz", INPUTS)
    with pytest.raises(CalibrationError, match=r"no \.npz"):
        open_data(tmp_path, INPUTS)
    (tmp_path / "broken.npz").write_bytes(b"PK nonsense")
    with pytest.raises(CalibrationError, match="can't be read"):
        open_data(tmp_path / "broken.npz", INPUTS)
    (tmp_path / "text.txt").write_text("a\n")
    with pytest.raises(CalibrationError, match="needs a tokenizer"):
        open_data(tmp_path / "text.txt", INPUTS)
    with pytest.raises(CalibrationError, match="batch_size is 0"):
        open_data([good()], INPUTS, batch_size=0)


def test_feeds_from_a_list_keep_their_batches_and_are_cut_by_max_samples() -> None:
    data = open_data([good(2), good(3), good(4)], INPUTS, max_samples=4)
    assert [f["pixels"].shape[0] for f in data] == [2, 3]
    assert (data.samples, data.largest) == (5, 1)


def test_a_generator_is_kept_and_a_large_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def stream() -> Iterator[dict[str, np.ndarray]]:
        buffer = good(2)
        for number in range(3):
            buffer["input_ids"][:] = number  # refilled in place, as loaders do
            yield buffer

    data = open_data(stream(), INPUTS)
    assert ids(data)[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert ids(data)[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert "kept in memory" in data.notes[0]
    monkeypatch.setattr(data_module, "CACHE_BYTES", 100)
    with pytest.raises(CalibrationError, match="returns a fresh iterable"):
        open_data(stream(), INPUTS)
    again = open_data(stream, INPUTS)  # the callable itself
    assert ids(again).shape == ids(again).shape == (6, 4)


def test_feeds_that_change_between_passes_are_refused() -> None:
    passes = iter([[good(2), good(2)], [good(2)]])
    data = open_data(lambda: next(passes), INPUTS)
    with pytest.raises(CalibrationError, match="first pass gave 4 samples, this one 2"):
        list(data)


class Reader:
    """As onnxruntime.quantization.CalibrationDataReader."""

    def __init__(self, feeds: list[dict[str, np.ndarray]]) -> None:
        self.feeds, self.left = feeds, iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.left, None)


class RewindingReader(Reader):
    def rewind(self) -> None:
        self.left = iter(self.feeds)


@pytest.mark.parametrize("kind", [Reader, RewindingReader])
def test_a_calibration_data_reader_can_be_read_again(kind: type[Reader]) -> None:
    data = open_data(kind([good(2), good(3)]), INPUTS)
    for _ in range(2):
        assert [f["pixels"].shape[0] for f in data] == [2, 3]
    assert bool(data.notes) is (kind is Reader)


@pytest.mark.parametrize(
    ("source", "message"),
    [(good(), "into a list"), (7, "int is no calibration data"), ([[1, 2]], "must be a dict")],
)
def test_things_that_are_no_feeds_are_refused(source: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        open_data(source, INPUTS)


def text_inputs(*names: str, length: int | str = "sequence", batch: int | str = "batch") -> list[ModelInput]:
    return [ModelInput(n, np.dtype(np.int64), (batch, length)) for n in names]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2, "c": 3, "[PAD]": 4, "[CLS]": 5}
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    built.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A:1", special_tokens=[("[CLS]", 5)])
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "[PAD]"}}))
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_text("a b c\n\na\nb c\n", encoding="utf-8")
    return path


def test_text_is_tokenised_padded_and_cut(text: Path, tokenizer: Path) -> None:
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    data = open_data(text, text_inputs(*names), tokenizer=tokenizer, batch_size=2, max_length=3)
    first, second = data
    assert first["input_ids"].tolist() == [[5, 1, 2], [5, 1, 4]]
    assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert first["token_type_ids"].tolist() == [[0, 1, 1], [0, 1, 0]]
    assert first["position_ids"].tolist() == [[0, 1, 2], [0, 1, 1]]
    assert second["input_ids"].tolist() == [[5, 2, 3]]
    assert data.samples == 3


def test_text_without_a_mask_input_is_never_padded(text: Path, tokenizer: Path) -> None:
    data = open_data(text, text_inputs("input_ids"), tokenizer=tokenizer)
    assert [f["input_ids"].tolist() for f in data] == [[[5, 1, 2, 3]], [[5, 1]], [[5, 2, 3]]]
    assert "attention_mask" in data.notes[0]


def test_text_fills_fixed_shapes_and_int32(text: Path, tokenizer: Path) -> None:
    inputs = [ModelInput(n, np.dtype(np.int32), (2, 6)) for n in ("input_ids", "attention_mask")]
    data = open_data(text, inputs, tokenizer=tokenizer / "tokenizer.json")
    feeds = list(data)
    assert [f["input_ids"].shape for f in feeds] == [(2, 6)]
    assert feeds[0]["input_ids"].dtype == np.int32
    assert feeds[0]["attention_mask"].sum(1).tolist() == [4, 2]
    assert "left out" in data.notes[0]
    with pytest.raises(CalibrationError, match="above the length 6"):
        open_data(text, inputs, tokenizer=tokenizer, max_length=7)


def test_text_for_a_decoder_gives_an_empty_past(text: Path, tokenizer: Path) -> None:
    inputs = [
        *text_inputs("input_ids", "attention_mask"),
        ModelInput("past_key_values.0.key", np.dtype(np.float32), ("batch", 2, "past", 4)),
        ModelInput("use_cache_branch", np.dtype(bool), (1,)),
    ]
    feed = next(iter(open_data(text, inputs, tokenizer=tokenizer)))
    assert feed["past_key_values.0.key"].shape == (3, 2, 0, 4)
    assert feed["use_cache_branch"].tolist() == [False]


def test_text_errors(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"No tokenizer\.json"):
        open_data(text, text_inputs("input_ids"), tokenizer=tmp_path)
    with pytest.raises(CalibrationError, match="no input named input_ids"):
        open_data(text, [PIXELS], tokenizer=tokenizer)
    with pytest.raises(CalibrationError, match=r"decoder_input_ids.* can't be made from text"):
        open_data(text, text_inputs("input_ids", "decoder_input_ids"), tokenizer=tokenizer)
    text.write_text("\n \n")
    with pytest.raises(CalibrationError, match="no sample"):
        open_data(text, text_inputs("input_ids"), tokenizer=tokenizer)
    text.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(CalibrationError, match="UTF-8"):
        open_data(text, text_inputs("input_ids"), tokenizer=tokenizer)
    (tokenizer / "tokenizer.json").write_text("{}")
    with pytest.raises(CalibrationError, match="can't be read as a tokenizer"):
        open_data(text, text_inputs("input_ids"), tokenizer=tokenizer)


def test_halves_take_turns() -> None:
    feeds = [{"x": np.full((2, 3), value, np.float32)} for value in range(5)]
    inputs = (ModelInput("x", np.dtype(np.float32), ("batch", 3)),)
    halves = open_data(feeds, inputs).halves()
    assert halves is not None
    assert [[float(feed["x"][0, 0]) for feed in half] for half in halves] == [[0, 2, 4], [1, 3]]
    assert [half.samples for half in halves] == [6, 4]
    assert open_data(feeds[:1], inputs).halves() is None
