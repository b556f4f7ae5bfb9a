"""Running text as windows of tokens, which is what a causal language model is calibrated and measured on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onnxq.calibration.data import draw
from onnxq.calibration.inputs import Feed, InputChecker, ModelInput
from onnxq.calibration.text import TextSource, load_tokenizer
from onnxq.errors import CalibrationError

_PIECE_CHARACTERS = 1 << 20
"""Text tokenised at a time; encodings take some hundred bytes a token."""


def text_windows(
    text: str | Path,
    tokenizer: str | Path,
    *,
    context: int = 512,
    windows: int | None = None,
    separator: str = "\n",
    seed: int = 0,
) -> np.ndarray:
    """Token windows [windows, context], int64, of a text file.

    The file is taken as one running text, tokenised without special tokens (none at the start of a window,
    as is usual for perplexities) and cut into windows end to end; what is left at the end is dropped.

    Args:
        text: UTF-8 file; blank lines are left out.
        tokenizer: Folder with `tokenizer.json`, or that file.
        windows: At most this many, drawn without replacement from `seed`, in their order in the text; all where None.
        separator: Put between lines; a blank where a file holds one sentence a line.

    Raises:
        CalibrationError: No such file, no tokenizer, no UTF-8, or less text than one window.
    """
    path = Path(text)
    if context < 2:
        raise CalibrationError(f"context is {context}; a window needs 2 tokens, one to see and one to tell.")
    if windows is not None and windows < 1:
        raise CalibrationError(f"windows is {windows}; it must be at least 1.")
    if not path.is_file():
        raise CalibrationError(f"{path} is not a file: give a text file to cut windows from.")
    encoder, _ = load_tokenizer(Path(tokenizer))
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text: {error}. Convert it.") from error
    encoder.no_padding()
    encoder.no_truncation()
    ids: list[int] = []
    for piece in _pieces([line for line in lines if line], separator):
        ids.extend(encoder.encode(piece, add_special_tokens=False).ids)
    count = len(ids) // context
    if not count:
        raise CalibrationError(
            f"{path} holds {len(ids)} tokens, less than one window of {context}. Give more text, or a shorter context."
        )
    every = np.array(ids[: count * context], np.int64).reshape(count, context)
    chosen: np.ndarray = every[draw(count, windows, seed)]
    return chosen


def _pieces(lines: Sequence[str], separator: str) -> list[str]:
    """The lines joined, in a few long pieces; every piece but the first begins with the separator."""
    pieces: list[str] = []
    part: list[str] = []
    size = 0
    for line in lines:
        part.append(line)
        size += len(line)
        if size > _PIECE_CHARACTERS:
            pieces.append(separator.join(part))
            part, size = [""], 0
    return [*pieces, separator.join(part)]


def window_feeds(windows: np.ndarray, inputs: Sequence[ModelInput], *, batch: int = 1) -> list[Feed]:
    """Feeds of token windows, for calibration (`open_data` and `quantize` take them) and evaluation.

    Attention masks are ones, positions count from 0, the past of a decoder with a cache is empty.

    Args:
        windows: [windows, context] integers.
        inputs: What the model takes (`model_inputs`, `session_inputs`); other inputs than those of a language model
            are refused.
        batch: Windows in one feed; a model's fixed batch size has precedence.

    Raises:
        CalibrationError: The model takes something that tokens do not tell, or fixes another length.
    """
    source = TextSource.of_windows(windows, "the token windows", inputs, batch)
    checker = InputChecker(inputs)
    return [feed for feed, _ in source.feeds(checker)]
