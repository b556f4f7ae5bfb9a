"""Whisper tiny.en as ONNX graphs, kept in the cache folder, and its word error rate on recorded prompts.

    python -m tools.whisper export [--separate]
    python -m tools.whisper wer FOLDER [--library] [--limit N]

The package holds a CTranslate2 file of float16 weights; it is read exactly, put into transformers' model and exported
by onnxq. The folder then holds the encoder, the merged decoder (with `--separate` decoder_model.onnx and
decoder_with_past_model.onnx in its place), tokenizer, feature extractor and settings for generation, so that optimum's
`ORTModelForSpeechSeq2Seq` opens it. Needs the extras `export` and `eval` of onnxq.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if __package__ in (None, ""):  # run as a script: the folder above holds `onnxq` and `tools`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from onnxq.errors import ExportError, OnnxqError
from tools.artefacts import ASTERISK_SPEECH, WHISPER
from tools.models import cache_folder, fetch
from tools.seq2seq import export_seq2seq
from tools.speech import WANTED, Clip, load_clips

if TYPE_CHECKING:
    from transformers import WhisperConfig

FOLDER = "whisper-tiny-en-onnx"
SEPARATE_FOLDER = "whisper-tiny-en-onnx-separate"

MELS = 80

END, START, NO_TIMESTAMPS = 50256, 50257, 50362
"""Special tokens of the English models."""

_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
_VERSION = 6


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """Variables by name of a CTranslate2 `model.bin`, as they are stored.

    The file is: version, uint32; name of the architecture; its revision, uint32; count, uint32; for each variable its
    name, rank, uint8, sizes, uint32, type, uint8, bytes, uint32, and data. Names have their length before them, uint16,
    and a zero behind.

    Raises:
        ExportError: Not such a file, or of another version.
    """
    content = path.read_bytes()
    position = 0

    def number(form: str) -> int:
        nonlocal position
        (value,) = struct.unpack_from(f"<{form}", content, position)
        position += struct.calcsize(form)
        return int(value)

    def name() -> str:
        nonlocal position
        length = number("H")
        position += length
        return content[position - length : position - 1].decode()

    variables = {}
    try:
        if (version := number("I")) != _VERSION:
            raise ValueError(f"version {version}, where {_VERSION} was expected")
        name(), number("I")
        for _ in range(number("I")):
            key = name()
            shape = [number("I") for _ in range(number("B"))]
            dtype = np.dtype(_DTYPES[number("B")])
            length = number("I")
            variables[key] = np.frombuffer(content, dtype, length // dtype.itemsize, position).reshape(shape)
            position += length
    except (struct.error, ValueError, IndexError, UnicodeDecodeError) as error:
        raise ExportError(f"{path} is not a CTranslate2 model of version {_VERSION}, or is cut off: {error}") from error
    return variables


def hugging_face_names(variables: Mapping[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """Parameters of transformers' WhisperForConditionalGeneration, float32.

    CTranslate2 keeps the projections of queries, keys and values in one matrix (those of keys and values where the
    queries come from the other side), and a zero bias for keys, which transformers has not.

    Args:
        layers: Of each side.
    """
    found: dict[str, np.ndarray] = {}

    def linear(theirs: str, *ours: str) -> None:
        weights = np.split(variables[f"{theirs}/weight"], len(ours))
        biases = np.split(variables[f"{theirs}/bias"], len(ours))
        for one, weight, bias in zip(ours, weights, biases, strict=True):
            found[f"{one}.weight"] = weight
            if not one.endswith("k_proj"):
                found[f"{one}.bias"] = bias

    def norm(theirs: str, ours: str) -> None:
        found[f"{ours}.weight"], found[f"{ours}.bias"] = variables[f"{theirs}/gamma"], variables[f"{theirs}/beta"]

    for side in ("encoder", "decoder"):
        for i in range(layers):
            theirs, ours = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            names = [f"{ours}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
            linear(f"{theirs}/self_attention/linear_0", *names[:3])
            linear(f"{theirs}/self_attention/linear_1", names[3])
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            if side == "decoder":
                names = [f"{ours}.encoder_attn.{part}_proj" for part in ("q", "k", "v", "out")]
                linear(f"{theirs}/attention/linear_0", names[0])
                linear(f"{theirs}/attention/linear_1", *names[1:3])
                linear(f"{theirs}/attention/linear_2", names[3])
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        found[f"model.{side}.embed_positions.weight"] = variables[f"{side}/position_encodings/encodings"]
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            found[f"model.encoder.{conv}.{part}"] = variables[f"encoder/{conv}/{part}"]
    for name in ("model.decoder.embed_tokens.weight", "proj_out.weight"):
        found[name] = variables["decoder/embeddings/weight"]
    return {name: array.astype(np.float32) for name, array in found.items()}


def config_of(variables: Mapping[str, np.ndarray], suppressed: Mapping[str, Sequence[int]]) -> WhisperConfig:
    """The configuration of the model whose variables these are.

    Args:
        suppressed: Token ids that are never said (`suppress_ids`), and those not said first (`suppress_ids_begin`).
    """
    from transformers import WhisperConfig

    vocabulary, hidden = variables["decoder/embeddings/weight"].shape
    layers = len(
        {name.split("/")[1] for name in variables if name.startswith("encoder/layer_") and name.count("/") > 2}
    )
    return WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=MELS,
        d_model=hidden,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        encoder_ffn_dim=variables["encoder/layer_0/ffn/linear_0/weight"].shape[0],
        decoder_ffn_dim=variables["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        max_source_positions=variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        decoder_start_token_id=START,
        suppress_tokens=list(suppressed["suppress_ids"]),
        begin_suppress_tokens=list(suppressed["suppress_ids_begin"]),
    )


def write_folder(source: Path, folder: Path) -> None:
    """Write the artefact's folder `source` as a Hugging Face folder.

    Raises:
        ExportError: The weights are not those of a Whisper model.
    """
    import torch
    from transformers import (
        GenerationConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizerFast,
    )

    variables = read_ctranslate2(source / "model.bin")
    suppressed = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = config_of(variables, suppressed)
    model = WhisperForConditionalGeneration(config)
    state = {n: torch.from_numpy(a) for n, a in hugging_face_names(variables, config.encoder_layers).items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ExportError(f"{source / 'model.bin'} does not hold a Whisper model: {error}") from error
    model.generation_config = GenerationConfig(
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        decoder_start_token_id=START,
        no_timestamps_token_id=NO_TIMESTAMPS,
        is_multilingual=False,
        return_timestamps=False,
        suppress_tokens=config.suppress_tokens,
        begin_suppress_tokens=config.begin_suppress_tokens,
        max_length=config.max_target_positions,
    )
    # Otherwise they are written a second time, and transformers warns of it at every load.
    config.suppress_tokens = config.begin_suppress_tokens = None
    model.save_pretrained(folder)
    WhisperTokenizerFast(tokenizer_file=str(source / "tokenizer.json")).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=MELS, sampling_rate=WANTED).save_pretrained(folder)


def prepare(cache: Path | None = None, merged: bool = True, tell: Callable[[str], None] = lambda _: None) -> Path:
    """Folder of the exported model, made first where the cache does not hold it.

    Args:
        merged: One graph for both kinds of decoder step; else two graphs.
        tell: Called with a line at the start of each step.

    Raises:
        OnnxqError: The weights cannot be had, or a package for the export is missing.
    """
    folder = (cache or cache_folder()) / (FOLDER if merged else SEPARATE_FOLDER)
    if (folder / "encoder_model.onnx").is_file():
        return folder
    from onnxq.export.exporter import require_extra

    require_extra()
    source = fetch(WHISPER, cache)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        tell("reading the weights")
        write_folder(source, Path(temporary) / "model")
        export_seq2seq(Path(temporary) / "model", Path(temporary) / "new", merged, tell)
        (Path(temporary) / "new").rename(folder)
    return folder


@dataclass(frozen=True)
class WordErrors:
    """Word errors over clips.

    Attributes:
        errors: Substitutions, deletions and insertions.
        words: Of the references.
        transcripts: What was heard, by clip.
        seconds: Of wall-clock time.
    """

    errors: int
    words: int
    transcripts: tuple[str, ...]
    seconds: float

    @property
    def rate(self) -> float:
        """Word error rate, 0 for perfect."""
        return self.errors / self.words


def normalised_words(text: str) -> list[str]:
    """Words to compare: lower case, hyphens as blanks, all other punctuation off (apostrophes too)."""
    return re.sub(r"[^\w\s]|_", "", text.lower().replace("-", " ").replace("\u2019", "'")).split()


def edit_distance(one: Sequence[str], other: Sequence[str]) -> int:
    """Fewest substitutions, deletions and insertions that turn `one` into `other` (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row = row, [i]
        for j, b in enumerate(other, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
    return row[-1]


def open_model(folder: Path, library: bool = False, threads: int = 1) -> tuple[Any, Any]:
    """Optimum's model and its processor (features and tokenizer).

    Args:
        library: Register the kernel library.

    Raises:
        OnnxqError: The library cannot be loaded.
    """
    from optimum.onnxruntime import ORTModelForSpeechSeq2Seq
    from transformers import WhisperProcessor

    import onnxq
    from onnxq.export.huggingface import quiet

    options = onnxq.session_options(library=library, threads=threads)
    with quiet():
        model = ORTModelForSpeechSeq2Seq.from_pretrained(
            folder, session_options=options, use_cache=True, local_files_only=True
        )
        return model, WhisperProcessor.from_pretrained(folder)


def measure(model: Any, processor: Any, clips: Sequence[Clip]) -> WordErrors:
    """Transcribe greedily, clip by clip, and count word errors."""
    import torch

    from onnxq.export.huggingface import quiet

    started = time.monotonic()
    errors = words = 0
    transcripts = []
    for clip in clips:
        features = processor(clip.samples, sampling_rate=WANTED, return_tensors="pt").input_features
        with quiet(), torch.inference_mode():
            ids = model.generate(features, num_beams=1, do_sample=False)
        transcripts.append(processor.batch_decode(ids, skip_special_tokens=True)[0].strip())
        reference = normalised_words(clip.text)
        errors += edit_distance(normalised_words(transcripts[-1]), reference)
        words += len(reference)
    return WordErrors(errors, words, tuple(transcripts), time.monotonic() - started)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    exporting = commands.add_parser("export", help="make the graphs and print their folder")
    exporting.add_argument("--separate", action="store_true", help="two graphs for the decoder instead of a merged one")
    measuring = commands.add_parser("wer", help="word error rate on the held-out prompts")
    measuring.add_argument("folder", type=Path)
    measuring.add_argument("--library", action="store_true", help="register the kernel library")
    measuring.add_argument("--threads", type=int, default=1)
    measuring.add_argument("--limit", type=int, help="only the first so many clips")
    options = parser.parse_args(arguments)
    try:
        if options.command == "export":
            print(prepare(merged=not options.separate, tell=lambda line: print(line, file=sys.stderr, flush=True)))
            return 0
        clips = load_clips(fetch(ASTERISK_SPEECH), "heldout", options.limit)
        found = measure(*open_model(options.folder, options.library, options.threads), clips)
    except OnnxqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"WER {found.rate:.2%}: {found.errors} errors, {found.words} words, {len(clips)} clips, {found.seconds:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
