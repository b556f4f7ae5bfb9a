"""A folder of two graphs that work together: an encoder, and one step of a recurrent decoder. They share a table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]

from onnxq.calibration.trace import Recorder, Trace
from tests.graph.models import floats, integers, model, node, save, weight

TOKENS, WIDTH, STEPS = 96, 64, 5
ENCODER, DECODER = "encoder_model.onnx", "decoder_model.onnx"
TABLE = weight(TOKENS, WIDTH, seed=1)
Session = ort.InferenceSession


def make_folder(path: Path) -> Path:
    """The folder, with a config beside the graphs."""
    path.mkdir()
    encoder = model(
        [
            node("Gather", "table ids", "x", "/encoder/embed_tokens/Gather", axis=0),
            node("MatMul", "x onnx::MatMul_1", "q", "/encoder/layers.0/self_attn/q_proj/MatMul"),
            node("Tanh", "q", "a", "/encoder/Tanh"),
            node("MatMul", "a onnx::MatMul_2", "f", "/encoder/layers.0/fc1/MatMul"),
            node("ReduceMean", "f axes", "memory", "/encoder/Mean", keepdims=0),
        ],
        [integers("ids", ["b", "s"])],
        [floats("memory", ["b", WIDTH])],
        {
            "table": TABLE,
            "onnx::MatMul_1": weight(WIDTH, WIDTH, seed=2) / 8,
            "onnx::MatMul_2": weight(WIDTH, WIDTH, seed=3) / 8,
            "axes": np.array([1]),
        },
    )
    decoder = model(
        [
            node("Gather", "shared token", "x", "/decoder/embed_tokens/Gather", axis=0),
            node("MatMul", "x onnx::MatMul_5", "r", "/decoder/layers.0/rnn/W/MatMul"),
            node("MatMul", "memory onnx::MatMul_6", "c", "/decoder/layers.0/encoder_attn/v_proj/MatMul"),
            node("Add", "r c", "rc", "/decoder/Add"),
            node("Add", "rc state", "sum", "/decoder/Add_1"),
            node("Tanh", "sum", "new_state", "/decoder/Tanh"),
            node("Transpose", "shared", "head", "/lm_head/Transpose", perm=[1, 0]),
            node("MatMul", "new_state head", "logits", "/lm_head/MatMul"),
        ],
        [integers("token", ["b"]), floats("memory", ["b", WIDTH]), floats("state", ["b", WIDTH])],
        [floats("logits", ["b", TOKENS]), floats("new_state", ["b", WIDTH])],
        {
            "shared": TABLE,
            "onnx::MatMul_5": weight(WIDTH, WIDTH, seed=4) / 8,
            "onnx::MatMul_6": weight(WIDTH, WIDTH, seed=5) / 8,
        },
    )
    save(encoder, path / ENCODER)
    save(decoder, path / DECODER)
    (path / "config.json").write_text("{}")
    return path


def generate(ids: np.ndarray, encoder: Session, decoder: Session) -> list[int]:
    """Greedy tokens for a sentence int64 [s]."""
    (memory,) = encoder.run(None, {"ids": ids[None]})
    token, state, tokens = np.zeros(1, np.int64), np.zeros((1, WIDTH), np.float32), []
    for _ in range(STEPS):
        logits, state = decoder.run(None, {"token": token, "memory": memory, "state": state})
        token = logits.argmax(-1)
        tokens.append(int(token[0]))
    return tokens


def open_pair(folder: Path) -> tuple[Session, Session]:
    """Sessions of both graphs, without the kernel library."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return tuple(Session(str(folder / name), options) for name in (ENCODER, DECODER))  # type: ignore[return-value]


def sentences(count: int, seed: int = 0) -> list[np.ndarray]:
    """Random token ids."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, TOKENS, rng.integers(4, 9)) for _ in range(count)]


def record(folder: Path, out: Path, count: int = 12) -> Trace:
    """The trace of some sentences."""
    encoder, decoder = open_pair(folder)
    with Recorder(out) as recorder:
        wrapped = recorder.wrap(encoder, ENCODER), recorder.wrap(decoder, DECODER)
        for ids in sentences(count):
            recorder.next_sequence()
            generate(ids, *wrapped)
    return Trace(out)
