"""Token counts by hand: a word-level tokenizer.json, a SentencePiece model with and without its own numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from onnxq.calibration.tokens import count_tokens, open_counts
from onnxq.errors import CalibrationError

VOCABULARY = {"[UNK]": 0, "a": 1, "b": 2, "c": 3, "[PAD]": 4, "[END]": 5}
SENTENCES = ["the cat sat on the mat", "the dog sat", "a cat and a dog"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_text("\ufeffa b c a\n\n  \na\nb d\n", encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    built.post_processor = tokenizers.processors.TemplateProcessing(single="$A:0 [END]", special_tokens=[("[END]", 5)])
    built.enable_truncation(2)
    found = tmp_path / "model"
    found.mkdir()
    built.save(str(found / "tokenizer.json"))
    return found


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(SENTENCES * 20))
    found = tmp_path / "pieces"
    found.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(found / "m"), vocab_size=30, hard_vocab_limit=False, minloglevel=2
    )
    (found / "m.model").rename(found / "source.spm")
    return found


def test_every_token_is_counted_with_what_the_tokenizer_adds(text: Path, folder: Path) -> None:
    """Three lines: 'a b c a', 'a', 'b [UNK]', each with its [END]; a setting of the file cuts none."""
    want = [1, 3, 2, 1, 0, 3]
    np.testing.assert_array_equal(count_tokens(text, folder), want)
    np.testing.assert_array_equal(count_tokens(text, folder / "tokenizer.json"), want)
    np.testing.assert_array_equal(count_tokens(text, folder, rows=8), [*want, 0, 0])
    np.testing.assert_array_equal(open_counts(text, folder), want)


def test_long_texts_are_counted_in_parts(folder: Path, tmp_path: Path) -> None:
    path, steps = tmp_path / "long.txt", []
    path.write_text("a b\n" * 2500)

    class Follow:
        def start(self, stage: str, total: int | None) -> None:
            steps.append((stage, total))

        def advance(self, count: int = 1, detail: str = "") -> None:
            steps.append(count)

        def finish(self) -> None: ...

    np.testing.assert_array_equal(count_tokens(path, folder, progress=Follow()), [0, 2500, 2500, 0, 0, 2500])
    assert steps == [("counting tokens", 10000), 4096, 4096, 1808]


def test_the_config_says_how_many_rows_there_are_and_where_decoders_start(text: Path, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"vocab_size": 7, "decoder_start_token_id": 4}))
    np.testing.assert_array_equal(count_tokens(text, folder), [1, 3, 2, 1, 3, 3, 0])
    # What stands in the text already is not counted once more.
    (folder / "config.json").write_text(json.dumps({"decoder_start_token_id": 5}))
    np.testing.assert_array_equal(count_tokens(text, folder), [1, 3, 2, 1, 0, 3])


def test_pieces_with_the_models_own_numbers(pieces: Path, tmp_path: Path) -> None:
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "source.spm"))
    want = np.bincount(np.concatenate(processor.encode(SENTENCES)), minlength=processor.vocab_size())
    want[processor.eos_id()] += 3
    np.testing.assert_array_equal(count_tokens(text, pieces), want)
    np.testing.assert_array_equal(count_tokens(text, pieces / "source.spm"), want)


def test_pieces_that_a_vocabulary_numbers(pieces: Path, tmp_path: Path) -> None:
    """As Marian has it: the end token is 0, the decoder starts from the padding, pieces come in another order."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "source.spm"))
    split = [piece for line in SENTENCES for piece in processor.encode(line, out_type=str)]
    first, second = sorted(set(split))[-2:]
    (pieces / "vocab.json").write_text(json.dumps({"</s>": 0, "<unk>": 1, second: 2, first: 3, "<pad>": 4}))
    (pieces / "config.json").write_text(json.dumps({"eos_token_id": 0, "decoder_start_token_id": 4}))
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES))
    known = [split.count(second), split.count(first)]
    np.testing.assert_array_equal(count_tokens(text, pieces), [3, len(split) - sum(known), *known, 3])


def test_counts_come_as_arrays_too(tmp_path: Path) -> None:
    counts = np.array([3, 0, 1], np.int32)
    np.save(tmp_path / "counts.npy", counts)
    for source in (counts, tmp_path / "counts.npy", str(tmp_path / "counts.npy")):
        found = open_counts(source)
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, counts)


@pytest.mark.parametrize("wrong", [np.zeros(3), np.array([1, -1]), np.zeros((2, 2), np.int64)])
def test_what_is_no_counts_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(CalibrationError, match=r"must be whole numbers \[V\], none negative"):
        open_counts(wrong)


def test_slips_are_told(text: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="needs a tokenizer"):
        open_counts(text)
    with pytest.raises(CalibrationError, match=r"none\.txt does not exist"):
        open_counts(tmp_path / "none.txt")
    with pytest.raises(CalibrationError, match="gives token 5, and the table has 5 rows"):
        count_tokens(text, folder, rows=5)
    with pytest.raises(CalibrationError, match=r"No tokenizer\.json"):
        count_tokens(text, tmp_path)
    with pytest.raises(CalibrationError, match="does not exist"):
        count_tokens(text, tmp_path / "none")
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(CalibrationError, match="holds no text"):
        count_tokens(tmp_path / "blank.txt", folder)
    (tmp_path / "latin.txt").write_bytes("a\n\xe4\n".encode("latin-1"))
    with pytest.raises(CalibrationError, match="line 2, is not UTF-8"):
        count_tokens(tmp_path / "latin.txt", folder)
    (tmp_path / "wrong.model").write_bytes(b"none")
    with pytest.raises(CalibrationError, match="as a SentencePiece model"):
        count_tokens(text, tmp_path / "wrong.model")
