from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("optimum.exporters.onnx")
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from onnxq.errors import ExportError
from tools import models, whisper
from tools.speech import load_clips

LAYERS, HIDDEN = 2, 12

WORST = 0.06
"""Word error rate that 10 clips stay below; all 60 have some 3 %."""


@pytest.fixture(scope="module")
def reference() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=50,
            num_mel_bins=whisper.MELS,
            d_model=HIDDEN,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=3,
            decoder_attention_heads=3,
            encoder_ffn_dim=20,
            decoder_ffn_dim=24,
            max_source_positions=10,
            max_target_positions=7,
            pad_token_id=1,
            bos_token_id=1,
            eos_token_id=1,
            decoder_start_token_id=2,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).half().float())
    return model.eval()


def variables(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """The model as CTranslate2 keeps it."""
    state = {name: tensor.numpy().astype(np.float16) for name, tensor in model.state_dict().items()}
    found: dict[str, np.ndarray] = {}

    def linear(name: str, *theirs: str) -> None:
        found[f"{name}/weight"] = np.concatenate([state[f"{one}.weight"] for one in theirs])
        zero = np.zeros(HIDDEN, np.float16)
        found[f"{name}/bias"] = np.concatenate([state.get(f"{one}.bias", zero) for one in theirs])

    def norm(name: str, theirs: str) -> None:
        found[f"{name}/gamma"], found[f"{name}/beta"] = state[f"{theirs}.weight"], state[f"{theirs}.bias"]

    for side in ("encoder", "decoder"):
        found[f"{side}/num_heads"] = np.array(3, np.int16)
        found[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for i in range(LAYERS):
            ours, theirs = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            linear(f"{ours}/self_attention/linear_0", *(f"{theirs}.self_attn.{c}_proj" for c in "qkv"))
            linear(f"{ours}/self_attention/linear_1", f"{theirs}.self_attn.out_proj")
            norm(f"{ours}/self_attention/layer_norm", f"{theirs}.self_attn_layer_norm")
            linear(f"{ours}/ffn/linear_0", f"{theirs}.fc1")
            linear(f"{ours}/ffn/linear_1", f"{theirs}.fc2")
            norm(f"{ours}/ffn/layer_norm", f"{theirs}.final_layer_norm")
    for i in range(LAYERS):
        ours, theirs = f"decoder/layer_{i}/attention", f"model.decoder.layers.{i}"
        linear(f"{ours}/linear_0", f"{theirs}.encoder_attn.q_proj")
        linear(f"{ours}/linear_1", f"{theirs}.encoder_attn.k_proj", f"{theirs}.encoder_attn.v_proj")
        linear(f"{ours}/linear_2", f"{theirs}.encoder_attn.out_proj")
        norm(f"{ours}/layer_norm", f"{theirs}.encoder_attn_layer_norm")
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            found[f"encoder/{conv}/{part}"] = state[f"model.encoder.{conv}.{part}"]
    found["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    return found


def file_of(held: dict[str, np.ndarray], version: int = 6) -> bytes:
    def name(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    content = struct.pack("<I", version) + name("WhisperSpec") + struct.pack("<II", 3, len(held))
    for key, array in held.items():
        kind = [np.dtype(t) for t in (np.float32, np.int8, np.int16, np.int32, np.float16)].index(array.dtype)
        content += name(key) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        content += struct.pack("<BI", kind, array.nbytes) + array.tobytes()
    return content


def test_a_file_becomes_the_model_again(reference: WhisperForConditionalGeneration, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(file_of(variables(reference)))
    read = whisper.read_ctranslate2(path)
    config = whisper.config_of(read, {"suppress_ids": [3], "suppress_ids_begin": [4]})
    wanted = reference.config
    for field in (
        "vocab_size",
        "d_model",
        "encoder_layers",
        "decoder_attention_heads",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "max_source_positions",
        "max_target_positions",
    ):
        assert getattr(config, field) == getattr(wanted, field), field
    found = whisper.hugging_face_names(read, config.encoder_layers)
    expected = reference.state_dict()
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)
        assert found[name].dtype == np.float32


def test_other_files_are_refused(reference: WhisperForConditionalGeneration, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    held = variables(reference)
    for content in (file_of(held)[:-5], file_of(held, version=3), b"", b"no model at all"):
        path.write_bytes(content)
        with pytest.raises(ExportError, match="not a CTranslate2 model of version 6, or is cut off"):
            whisper.read_ctranslate2(path)


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [
        ("", "", 0),
        ("a b c", "a b c", 0),
        ("a b c", "a x c", 1),
        ("a c", "a b c", 1),
        ("a b c d", "b c", 2),
        ("", "a b", 2),
        ("b a", "a b", 2),
        ("x y z", "a", 3),
    ],
)
def test_edit_distance(one: str, other: str, distance: int) -> None:
    assert whisper.edit_distance(one.split(), other.split()) == distance
    assert whisper.edit_distance(other.split(), one.split()) == distance


def test_words_are_compared_without_case_and_punctuation() -> None:
    assert whisper.normalised_words("Call-forward  on busy, don\u2019t PRESS; wait...") == [
        "call",
        "forward",
        "on",
        "busy",
        "dont",
        "press",
        "wait",
    ]


@pytest.mark.models
def test_the_real_model_hears_english() -> None:
    pytest.importorskip("scipy")
    pytest.importorskip("optimum.onnxruntime")
    folder, speech = models.cache_folder() / whisper.FOLDER, models.cache_folder() / "asterisk-speech"
    if not (folder / "encoder_model.onnx").is_file():
        pytest.skip("not made: run `python -m tools.whisper export`")
    if not models.is_whole(models.ARTEFACTS["asterisk-speech"], speech):
        pytest.skip("not fetched: run `python tools/models.py fetch asterisk-speech`")
    found = whisper.measure(*whisper.open_model(folder), load_clips(speech, "heldout", 10))
    assert found.words > 100
    assert found.rate < WORST
