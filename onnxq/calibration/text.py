"""Text as calibration data: one sample a line, tokenised by a ``tokenizer.json``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.calibration.data import FeedSource, draw
from onnxq.calibration.inputs import Feed, InputChecker, ModelInput
from onnxq.errors import CalibrationError

DEFAULT_MAX_LENGTH = 512
_PAD_TOKENS = ("[PAD]", "<pad>", "<|endoftext|>", "</s>")
_PAST_PREFIX = "past_key_values"
_KNOWN = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "use_cache_branch")


@dataclasses.dataclass
class TextSource(FeedSource):
    """Lines, tokenised once when opened, padded at the right to the longest of each batch.

    Builds input_ids, attention_mask, token_type_ids and position_ids as the model asks; a decoder's
    ``past_key_values.*`` are given with zero past length and ``use_cache_branch`` as False. A model without
    attention_mask gets one line per feed (unless its length is fixed), so that no padding is counted as data.
    """

    name: str
    inputs: tuple[ModelInput, ...]
    encodings: tuple[tuple[np.ndarray, np.ndarray], ...]
    pad_id: int
    batch_size: int
    fixed_length: int | None
    notes: tuple[str, ...]

    @staticmethod
    def open(
        path: Path,
        tokenizer: Path,
        inputs: Sequence[ModelInput],
        batch_size: int,
        max_samples: int | None,
        max_length: int | None,
        seed: int,
    ) -> TextSource:
        """Read and tokenise; blank lines are left out.

        Raises:
            CalibrationError: no tokenizer.json, no text, or the model asks for inputs that text can't give.
        """
        by_name = {i.name: i for i in inputs}
        _check_buildable(path, inputs)
        encoder, pad_id = load_tokenizer(tokenizer)
        batch, fixed = _fixed_dims(by_name["input_ids"])
        if fixed is not None and max_length is not None and max_length > fixed:
            raise CalibrationError(
                f"max_length {max_length} is above the length {fixed} that the model fixes "
                f"({by_name['input_ids'].describe()}). Leave max_length out, or give at most {fixed}."
            )
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{path} is not UTF-8 text: {error}. Convert it, or give an .npz.") from error
        lines = [line for line in lines if line]
        lines = [lines[i] for i in draw(len(lines), max_samples, seed)]
        encoder.no_padding()
        encoder.enable_truncation(max_length or fixed or DEFAULT_MAX_LENGTH)
        encodings = tuple(
            (np.array(e.ids, np.int64), np.array(e.type_ids, np.int64)) for e in encoder.encode_batch(lines) if e.ids
        )
        notes = []
        if "attention_mask" not in by_name:
            notes.append("the model takes no attention_mask: one line per feed, no padding")
            if fixed is not None:
                notes[-1] = "the model takes no attention_mask and fixes the length: padding is counted as data"
            batch = batch or 1
        if batch is not None and len(encodings) % batch:
            # A fixed batch can't take a shorter last one; a repeated line would count twice.
            notes.append(f"the last {len(encodings) % batch} lines do not fill the fixed batch of {batch}: left out")
            encodings = encodings[: len(encodings) // batch * batch]
        return TextSource(str(path), tuple(inputs), encodings, pad_id, batch or batch_size, fixed, tuple(notes))

    @staticmethod
    def of_windows(windows: np.ndarray, name: str, inputs: Sequence[ModelInput], batch_size: int) -> TextSource:
        """Token windows [windows, tokens] as a source; nothing is padded.

        Raises:
            CalibrationError: the model asks for inputs that tokens can't give.
        """
        _check_buildable(name, inputs)
        batch, _ = _fixed_dims(next(i for i in inputs if i.name == "input_ids"))
        encodings = tuple((row.astype(np.int64), np.zeros(row.shape, np.int64)) for row in windows)
        return TextSource(name, tuple(inputs), encodings, 0, batch or batch_size, None, ())

    def feeds(self, checker: InputChecker) -> Iterator[tuple[Feed, int]]:
        """As `FeedSource.feeds`; a batch is padded to its longest line."""
        for start in range(0, len(self.encodings), self.batch_size):
            part = self.encodings[start : start + self.batch_size]
            where = f"{self.name} (lines {start} to {start + len(part) - 1} of those used)"
            yield checker.check(self._feed(part), where), len(part)

    def _feed(self, part: Sequence[tuple[np.ndarray, np.ndarray]]) -> Feed:
        rows, length = len(part), self.fixed_length or max(ids.size for ids, _ in part)
        ids = np.full((rows, length), self.pad_id, np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for row, (tokens, kinds) in enumerate(part):
            ids[row, : tokens.size], types[row, : tokens.size], mask[row, : tokens.size] = tokens, kinds, 1
        built: dict[str, np.ndarray] = {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": types,
            "position_ids": np.maximum(np.cumsum(mask, axis=1) - 1, 0),
            "use_cache_branch": np.zeros(1, bool),
        }
        feed: Feed = {}
        for wanted in self.inputs:
            if wanted.name in built:
                array = built[wanted.name]
                # Built here, so bringing it to the model's integer width is no cast of the user's data.
                feed[wanted.name] = array if wanted.dtype is None else array.astype(wanted.dtype)
            elif wanted.name.startswith(_PAST_PREFIX):
                assert wanted.shape is not None
                assert wanted.dtype is not None
                dims = [rows if i == 0 else (d if isinstance(d, int) else 0) for i, d in enumerate(wanted.shape)]
                feed[wanted.name] = np.zeros(dims, wanted.dtype)
        return feed


def _check_buildable(path: Path | str, inputs: Sequence[ModelInput]) -> None:
    if not any(i.name == "input_ids" for i in inputs):
        raise CalibrationError(
            f"{path} is text, but the model has no input named input_ids; it takes "
            f"{'; '.join(i.describe() for i in inputs)}. Give its inputs as an .npz or as feeds."
        )
    for wanted in inputs:
        past = wanted.name.startswith(_PAST_PREFIX) and wanted.shape is not None and wanted.dtype is not None
        if not (wanted.name in _KNOWN or past or wanted.optional):
            raise CalibrationError(
                f"{path}: the model's input {wanted.describe()} can't be made from text (only "
                f"{', '.join(_KNOWN)} and {_PAST_PREFIX}.* can). Give all inputs as an .npz or as feeds."
            )


def _fixed_dims(input_ids: ModelInput) -> tuple[int | None, int | None]:
    shape = input_ids.shape
    if shape is None or len(shape) != 2:
        return None, None
    batch, length = shape
    return (batch if isinstance(batch, int) else None), (length if isinstance(length, int) else None)


def load_tokenizer(where: Path) -> tuple[Any, int]:
    """A tokenizer from a folder with ``tokenizer.json`` or that file, and the token to pad with.

    Raises:
        CalibrationError: no such file, it can't be read, or the tokenizers library is missing.
    """
    file = where / "tokenizer.json" if where.is_dir() else where
    if not file.is_file():
        raise CalibrationError(
            f"No tokenizer.json in {where}. Name the folder of the exported model that has one; a slow tokenizer is "
            "converted by loading it with transformers' AutoTokenizer and calling save_pretrained."
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise CalibrationError("Text data needs the tokenizers library: pip install tokenizers.") from error
    try:
        encoder = Tokenizer.from_file(str(file))
    # The library raises bare Exception for every malformed file.
    except Exception as error:
        raise CalibrationError(f"{file} can't be read as a tokenizer: {error}.") from error
    if encoder.padding is not None:
        return encoder, int(encoder.padding["pad_id"])
    for token in (_configured_pad(file.parent), *_PAD_TOKENS):
        if token is not None and (found := encoder.token_to_id(token)) is not None:
            return encoder, int(found)
    return encoder, 0  # padding is masked out, so any valid id serves


def _configured_pad(folder: Path) -> str | None:
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return None
    try:
        token = json.loads(config.read_text(encoding="utf-8")).get("pad_token")
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{config} can't be read: {error}.") from error
    return token.get("content") if isinstance(token, dict) else token
