from __future__ import annotations

import gzip
import io
import wave
from pathlib import Path

import numpy as np
import pytest

from tools import models, speech
from tools.packages import FetchError


def wav(samples: np.ndarray, rate: int = 8000) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def tone(number: int, count: int) -> np.ndarray:
    """A tone of 440 Hz, its loudness by `number`."""
    return (100 + number) * 100 * np.sin(2 * np.pi * 440 * np.arange(count) / 8000)


def table(lines: dict[str, str]) -> bytes:
    return gzip.compress("".join(f"{name}: {text}\n" for name, text in lines.items()).encode())


COUNT = speech.HELDOUT + 5
SOUNDS = {f"p/{i}.wav": wav(tone(i, 400 + i)) for i in range(COUNT)}
LINES = {f"p/{i}": "please say  a few words, now." for i in range(COUNT)}


def test_clips_come_back_resampled(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    for name, content in speech.as_files(SOUNDS, table(LINES)).items():
        (tmp_path / name).write_bytes(content)
    heldout = speech.load_clips(tmp_path, "heldout")
    calibration = speech.load_clips(tmp_path, "calibration")
    assert (len(heldout), len(calibration)) == (speech.HELDOUT, 5)
    assert {clip.name for clip in (*heldout, *calibration)} == set(LINES)
    for clip in (*heldout[:3], *calibration):
        number = int(clip.name.removeprefix("p/"))
        assert clip.text == "please say a few words, now."
        assert (clip.samples.dtype, len(clip.samples)) == (np.float32, 2 * (400 + number))
        # Ends of a clip ring; in its middle the tone is the same at twice the rate.
        expected = (100 + number) * 100 / 32768 * np.sin(2 * np.pi * 440 * np.arange(2 * (400 + number)) / 16000)
        np.testing.assert_allclose(clip.samples[100:-100], expected[100:-100], atol=2e-3)
    assert len(speech.load_clips(tmp_path, "heldout", limit=2)) == 2


def test_only_plain_prompts_with_a_recording_are_taken() -> None:
    odd = {
        "short": "only five words are here",
        "digits": "press 1 for more of these words",
        "symbols": "[a tone that is not speech at all]",
        "silent": "this one was never recorded by anyone",
    }
    sounds = SOUNDS | {f"{name}.wav": wav(tone(0, 10)) for name in odd if name != "silent"}
    files = speech.as_files(sounds, table(LINES | odd))
    rows = [line for side in ("heldout", "calibration") for line in files[f"{side}.tsv"].decode().splitlines()]
    names = {row.split("\t")[0] for row in rows}
    assert names == set(LINES)


def test_too_few_and_other_forms_are_refused() -> None:
    with pytest.raises(FetchError, match="only 2 plain prompts"):
        speech.as_files(SOUNDS, table(dict(list(LINES.items())[:2])))
    with pytest.raises(FetchError, match=r"p/0\.wav has .* \(1, 2, 16000\)"):
        speech.as_files(SOUNDS | {"p/0.wav": wav(tone(0, 10), rate=16000)}, table(LINES))
    with pytest.raises(FetchError, match=r"p/0\.wav is not a wav file"):
        speech.as_files(SOUNDS | {"p/0.wav": b"RIFF"}, table(LINES))


@pytest.mark.models
def test_the_packaged_prompts_are_whole() -> None:
    pytest.importorskip("scipy")
    folder = models.cache_folder() / "asterisk-speech"
    if not models.is_whole(models.ARTEFACTS["asterisk-speech"], folder):
        pytest.skip("not fetched: run `python tools/models.py fetch asterisk-speech`")
    clips = speech.load_clips(folder, "heldout")
    assert len(clips) == speech.HELDOUT
    for clip in clips:
        assert np.abs(clip.samples).max() > 0.05
        # English is spoken at some 2 to 4 words a second.
        assert 1 < len(clip.text.split()) / (len(clip.samples) / speech.WANTED) < 6, clip.name
