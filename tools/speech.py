"""Recorded telephone prompts with their transcripts, split into calibration and heldout.

Pure functions from file contents to file contents, and a reader of what they wrote. A side is one file of sound, its
clips one after the other, and a table that says where each lies and what is said in it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.packages import FetchError, Files

SPLIT_SEED = "onnxq-speech-1"

HELDOUT = 60
"""Clips held out; the others are for calibration."""

MIN_WORDS = 6
"""Shorter prompts ("Goodbye.") are counted wrong or right as a whole."""

RECORDED = 8000
"""Samples a second of the recordings."""

WANTED = 16000
"""Samples a second that speech models take."""

_PLAIN = re.compile(r"[A-Za-z' ,.!?;-]+")


@dataclass(frozen=True)
class Clip:
    """A recording and what is said in it.

    Attributes:
        samples: float32 in -1 to 1, `WANTED` a second.
    """

    name: str
    text: str
    samples: np.ndarray


def as_files(sounds: Files, transcripts: bytes) -> dict[str, bytes]:
    """Both sides as `SIDE.wav` and `SIDE.tsv` (name, first sample, samples, transcript).

    Prompts with digits or symbols are left out: "1" can be written "one" as well.

    Args:
        sounds: Recordings by path below the voice's folder, `.wav`, 8 kHz, one channel of int16.
        transcripts: The gzipped table, lines of `path without ending: text`; lines with `;` are comments.

    Raises:
        FetchError: A recording has another form, or too few are left.
    """
    chosen: dict[str, str] = {}
    for line in gzip.decompress(transcripts).decode("utf-8").splitlines():
        name, _, text = line.partition(": ")
        text = " ".join(text.split())
        if f"{name}.wav" in sounds and len(text.split()) >= MIN_WORDS and _PLAIN.fullmatch(text):
            chosen[name] = text
    ordered = sorted(chosen, key=lambda name: hashlib.sha256(f"{SPLIT_SEED}\x1f{name}".encode()).digest())
    if len(ordered) <= HELDOUT:
        raise FetchError(f"only {len(ordered)} plain prompts with a recording: the package is not laid out as it was")
    files = {}
    for side, names in (("heldout", ordered[:HELDOUT]), ("calibration", ordered[HELDOUT:])):
        rows, parts, start = [], [], 0
        for name in names:
            part = _frames(sounds[f"{name}.wav"], name)
            rows.append(f"{name}\t{start}\t{len(part) // 2}\t{chosen[name]}\n")
            parts.append(part)
            start += len(part) // 2
        files[f"{side}.tsv"] = "".join(rows).encode()
        files[f"{side}.wav"] = _wav(b"".join(parts))
    return files


def _frames(content: bytes, name: str) -> bytes:
    try:
        with wave.open(io.BytesIO(content)) as sound:
            form = sound.getnchannels(), sound.getsampwidth(), sound.getframerate()
            if form != (1, 2, RECORDED):
                raise FetchError(f"{name}.wav has (channels, bytes, rate) {form}, not (1, 2, {RECORDED})")
            return bytes(sound.readframes(sound.getnframes()))
    except (wave.Error, EOFError) as error:
        raise FetchError(f"{name}.wav is not a wav file: {error}") from error


def _wav(frames: bytes) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(RECORDED)
        sound.writeframes(frames)
    return buffer.getvalue()


def load_clips(folder: Path, side: str, limit: int | None = None) -> list[Clip]:
    """Clips of a side ("heldout", "calibration") as written by `as_files`, resampled to 16 kHz.

    Needs scipy, which the extra `eval` of onnxq brings.
    """
    from scipy.signal import resample_poly

    with wave.open(str(folder / f"{side}.wav")) as sound:
        whole = np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(np.float32) / 32768
    clips = []
    for line in (folder / f"{side}.tsv").read_text(encoding="utf-8").splitlines()[:limit]:
        name, start, count, text = line.split("\t")
        samples = resample_poly(whole[int(start) : int(start) + int(count)], WANTED // RECORDED, 1)
        clips.append(Clip(name, text, samples.astype(np.float32)))
    return clips
