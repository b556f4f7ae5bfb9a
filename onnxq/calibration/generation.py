"""Record what a translation or speech model's graphs are fed while it generates, through optimum.

Greedy search, a sample at a time: a batch has padding. Needs transformers and optimum, from the extra
``onnxq[export]``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.calibration.data import draw
from onnxq.calibration.trace import Recorder, Trace
from onnxq.errors import CalibrationError
from onnxq.progress import NullProgress, Progress

_ENCODER = "encoder_model.onnx"


def generates(folder: Path) -> bool:
    """Whether a folder holds an encoder-decoder model as optimum exports it."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(config.get("is_encoder_decoder")) and (folder / _ENCODER).is_file()


def record_generation(
    folder: Path,
    source: Path,
    out: Path,
    *,
    max_samples: int = 64,
    max_new_tokens: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> Trace:
    """Lets a model generate, and records it.

    Args:
        folder: of the exported float model, with its tokenizer.
        source: a text file, a sentence a line; or an ``.npz`` with ``input_features`` float32 [clips, mels, frames].
        out: an empty or new folder for the trace.
        max_samples: at most so many, drawn with `seed`.
        max_new_tokens: of one sample.
        seed: of the draw.
        progress: follows the samples.

    Raises:
        CalibrationError: optimum is missing, the folder is no such model, or the source can't be read.
    """
    progress = progress or NullProgress()
    samples = _Features(source, max_samples, seed) if source.suffix == ".npz" else _Texts(source, max_samples, seed)
    model, prepare = _open(folder, speech=isinstance(samples, _Features))
    progress.start("generating", len(samples))
    with Recorder(out) as recorder:
        parts = (model.encoder, model.decoder, model.decoder_with_past)
        for part in {id(part): part for part in parts if part is not None}.values():
            part.session = recorder.wrap(part.session, Path(part.path).name)
        for sample in samples:
            recorder.next_sequence()
            model.generate(**prepare(sample), num_beams=1, do_sample=False, max_new_tokens=max_new_tokens)
            progress.advance(1, "")
    return Trace(out)


class _Texts:
    """Sentences of a file, those that are not empty."""

    def __init__(self, path: Path, most: int, seed: int) -> None:
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"{path} can't be read as text, one sentence a line: {error}.") from error
        lines = [line for line in lines if line]
        self._lines = [lines[i] for i in draw(len(lines), most, seed)]
        if not self._lines:
            raise CalibrationError(f"{path} holds no sentence.")

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)


class _Features:
    """Clips of a file."""

    def __init__(self, path: Path, most: int, seed: int) -> None:
        try:
            with np.load(path, allow_pickle=False) as stored:
                features = stored["input_features"]
        except (OSError, ValueError, KeyError) as error:
            raise CalibrationError(f"{path} holds no array 'input_features': {error}.") from error
        self._features = features[draw(len(features), most, seed)]

    def __len__(self) -> int:
        return len(self._features)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self._features)


def _open(folder: Path, *, speech: bool) -> tuple[Any, Any]:
    """The model, and what makes a sample its keyword arguments."""
    if not generates(folder):
        raise CalibrationError(
            f"{folder} is no encoder-decoder model as optimum exports it (config.json and {_ENCODER}): record a trace "
            "with onnxq.calibration.Recorder around your own loop."
        )
    try:
        import torch
        from optimum.onnxruntime import ORTModelForSeq2SeqLM, ORTModelForSpeechSeq2Seq
        from transformers import AutoTokenizer
    except ImportError as error:
        raise CalibrationError(f"Generating needs optimum: pip install 'onnxq[export]' ({error}).") from error
    model = (ORTModelForSpeechSeq2Seq if speech else ORTModelForSeq2SeqLM).from_pretrained(folder, use_io_binding=False)
    if speech:
        return model, lambda clip: {"input_features": torch.from_numpy(np.ascontiguousarray(clip[None]))}
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)  # type: ignore[no-untyped-call]
    return model, lambda text: dict(tokenizer(text, return_tensors="pt", truncation=True))
