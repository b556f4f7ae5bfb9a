"""How often each token occurs in a text, and so each row of a token table is looked up: for bits per word.

Special tokens count as the model sees them: what the tokenizer puts around every line, and the token that a decoder
starts from, once a line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.calibration.text import load_tokenizer
from onnxq.errors import CalibrationError
from onnxq.progress import NullProgress, Progress

_LINES = 1024
"""Lines that are tokenised at a time."""
_PIECE_MODELS = ("source.spm", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
_PIECE_SUFFIXES = (".spm", ".model")

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]
"""Tokens of lines."""


def open_counts(
    source: np.ndarray | str | Path, tokenizer: str | Path | None = None, progress: Progress | None = None
) -> np.ndarray:
    """Token counts as users give them.

    Args:
        source: int [V]; a ``.npy`` file of it; or a text, one sample a line, to count in.
        tokenizer: for a text, see `count_tokens`.
        progress: follows the counting.

    Returns:
        int64 [V].

    Raises:
        CalibrationError: no such file, no counts, or a text without a tokenizer.
    """
    if isinstance(source, np.ndarray):
        return _checked(source, "the token counts")
    path = Path(source)
    if not path.is_file():
        raise CalibrationError(f"{path} does not exist. Token counts are a text to count in, or a .npy of counts.")
    if path.suffix == ".npy":
        try:
            return _checked(np.load(path, allow_pickle=False), str(path))
        except ValueError as error:
            raise CalibrationError(f"{path} can't be read as an array: {error}.") from error
    if tokenizer is None:
        raise CalibrationError(f"{path} is text and needs a tokenizer: name the folder that holds it, or give a .npy.")
    return count_tokens(path, Path(tokenizer), progress=progress)


def count_tokens(
    text: Path, tokenizer: Path, rows: int | None = None, *, progress: Progress | None = None
) -> np.ndarray:
    """Counts the tokens of a whole text, read piece by piece; blank lines are left out.

    Args:
        text: UTF-8, one sample a line.
        tokenizer: a ``tokenizer.json``, a SentencePiece model, or a folder with one (of Marian's two, the source
            language's is taken: name the other's file to count in the target language). Where a ``vocab.json`` stands
            beside a SentencePiece model, it numbers the pieces.
        rows: of the table; None takes the ``vocab_size`` of the ``config.json`` beside the tokenizer, or the
            tokenizer's own number of tokens.
        progress: follows the bytes.

    Returns:
        int64 [rows].

    Raises:
        CalibrationError: no tokenizer, no text, or a token that the table has no row for.
    """
    progress = progress or NullProgress()
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    config = _read_json(folder / "config.json") or {}
    encode, size = _open_tokenizer(tokenizer, config)
    wanted = config.get("vocab_size")
    if rows is None:
        rows = max(size, wanted) if isinstance(wanted, int) else size
    counts, lines = np.zeros(rows, np.int64), 0
    progress.start("counting tokens", text.stat().st_size)
    for batch, length in _batches(text):
        lines += len(batch)
        ids = np.fromiter(chain.from_iterable(encode(batch)), np.int64)
        if ids.size and int(ids.max()) >= rows:
            raise CalibrationError(
                f"The tokenizer in {tokenizer} gives token {int(ids.max())}, and the table has {rows} rows. "
                "Is it this model's tokenizer?"
            )
        counts += np.bincount(ids, minlength=rows)
        progress.advance(length)
    if not lines:
        raise CalibrationError(f"{text} holds no text to count tokens in.")
    start = config.get("decoder_start_token_id")
    if isinstance(start, int) and 0 <= start < rows and counts[start] == 0:
        counts[start] = lines
    return counts


def _batches(text: Path) -> Iterator[tuple[list[str], int]]:
    """Lines that hold something, some at a time, and how many bytes were read for them."""
    batch: list[str] = []
    read = 0
    with text.open("rb") as file:
        for number, raw in enumerate(file):
            try:
                line = raw.decode("utf-8-sig" if number == 0 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise CalibrationError(f"{text}, line {number + 1}, is not UTF-8 text: {error}. Convert it.") from error
            read += len(raw)
            if line:
                batch.append(line)
            if len(batch) == _LINES:
                yield batch, read
                batch, read = [], 0
    if batch:
        yield batch, read


def _open_tokenizer(where: Path, config: Mapping[str, Any]) -> tuple[Encode, int]:
    """What makes tokens of lines, and how many tokens there are."""
    if not where.exists():
        raise CalibrationError(f"{where} does not exist. Name the folder of the exported model, or its tokenizer.json.")
    pieces = _piece_model(where)
    if pieces is not None:
        return _open_pieces(pieces, config)
    encoder, _ = load_tokenizer(where)
    encoder.no_padding()
    encoder.no_truncation()
    return lambda lines: [each.ids for each in encoder.encode_batch(lines)], encoder.get_vocab_size()


def _piece_model(where: Path) -> Path | None:
    """The SentencePiece model that is meant; None where there is a tokenizer.json, or neither."""
    if where.is_file():
        return where if where.suffix in _PIECE_SUFFIXES else None
    if (where / "tokenizer.json").is_file():
        return None
    return next((where / name for name in _PIECE_MODELS if (where / name).is_file()), None)


def _open_pieces(model: Path, config: Mapping[str, Any]) -> tuple[Encode, int]:
    """See `_open_tokenizer`; a line ends with the end token, as models have it."""
    try:
        import sentencepiece
    except ImportError as error:
        raise CalibrationError(f"{model} needs the sentencepiece library: pip install sentencepiece.") from error
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError) as error:
        raise CalibrationError(f"{model} can't be read as a SentencePiece model: {error}.") from error
    numbers = _read_json(model.parent / "vocab.json")
    end = config.get("eos_token_id")
    if numbers is None:
        last = [processor.eos_id() if not isinstance(end, int) else end]
        last = [token for token in last if token >= 0]
        return lambda lines: [ids + last for ids in processor.encode(list(lines))], processor.vocab_size()
    if "<unk>" not in numbers:
        raise CalibrationError(f"{model.parent / 'vocab.json'} numbers no <unk>, for pieces that it does not know.")
    unknown = numbers["<unk>"]
    close = [end] if isinstance(end, int) else [numbers["</s>"]] if "</s>" in numbers else []

    def encode(lines: Sequence[str]) -> list[list[int]]:
        split = processor.encode(list(lines), out_type=str)
        return [[*(numbers.get(piece, unknown) for piece in pieces), *close] for pieces in split]

    return encode, max(numbers.values()) + 1


def _read_json(file: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file."""
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{file} can't be read: {error}.") from error
    if not isinstance(found, dict):
        raise CalibrationError(f"{file} holds no JSON object.")
    return found


def _checked(counts: np.ndarray, what: str) -> np.ndarray:
    """Counts as int64 [V].

    Raises:
        CalibrationError: another shape, another type than whole numbers, or a negative one.
    """
    if counts.ndim != 1 or not np.issubdtype(counts.dtype, np.integer) or counts.min(initial=0) < 0:
        raise CalibrationError(
            f"{what} are {counts.dtype} {list(counts.shape)}: they must be whole numbers [V], none negative."
        )
    return counts.astype(np.int64)
