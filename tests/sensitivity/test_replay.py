from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxq.calibration.trace import Recorder, Trace
from onnxq.errors import CalibrationError
from onnxq.sensitivity.replay import Replay
from tests.graph import models
from tests.graph.models import weight
from tests.pair import DECODER, ENCODER, STEPS, WIDTH, generate, make_folder, open_pair, record, sentences


@pytest.fixture
def replay(tmp_path: Path) -> Replay:
    folder = make_folder(tmp_path / "pair")
    trace = record(folder, tmp_path / "trace", 3)
    return Replay(trace, {name: folder / name for name in (ENCODER, DECODER)}, threads=1)


def test_the_float_models_diverge_by_nothing(replay: Replay) -> None:
    assert replay.kind == "kl"
    assert replay.divergence({}) == pytest.approx(0, abs=1e-6)
    same = weight(WIDTH, WIDTH, seed=2) / 8
    assert replay.divergence({ENCODER: {"onnx::MatMul_1": same}}) == pytest.approx(0, abs=1e-6)


def test_the_encoders_error_is_seen_in_the_decoder(replay: Replay) -> None:
    damaged = weight(WIDTH, WIDTH, seed=2) / 8 + 0.2 * weight(WIDTH, WIDTH, seed=20) / 8
    little = replay.divergence({ENCODER: {"onnx::MatMul_1": damaged}})
    dropped = replay.divergence({ENCODER: {"onnx::MatMul_1": np.zeros((WIDTH, WIDTH), np.float32)}})
    assert 1e-4 < little < dropped


def test_the_divergence_by_hand(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pair")
    trace = record(folder, tmp_path / "trace", 1)
    changed = {"onnx::MatMul_5": np.zeros((WIDTH, WIDTH), np.float32)}
    encoder, decoder = open_pair(folder)
    ids = sentences(1)[0]
    tokens = generate(ids, encoder, decoder)
    (memory,) = encoder.run(None, {"ids": ids[None]})
    cross = weight(WIDTH, WIDTH, seed=5) / 8
    state, total = np.zeros((1, WIDTH), np.float32), 0.0
    reference = np.zeros((1, WIDTH), np.float32)
    for token in [0, *tokens[:-1]]:
        expected, reference = decoder.run(None, {"token": np.array([token]), "memory": memory, "state": reference})
        state = np.tanh(memory @ cross + state)
        logits = state @ weight(96, WIDTH, seed=1).T
        p, q = (np.exp(z) / np.exp(z).sum() for z in (expected.astype(np.float64), logits.astype(np.float64)))
        total += float((p * np.log(p / q)).sum())
    found = Replay(trace, {name: folder / name for name in (ENCODER, DECODER)}).divergence({DECODER: changed})
    assert found == pytest.approx(total / STEPS, rel=1e-3)


def test_graphs_without_logits_are_compared_by_outputs(tmp_path: Path) -> None:
    path = models.save(models.mlp(), tmp_path / "mlp.onnx")
    session = models.ort.InferenceSession(str(path))
    with Recorder(tmp_path / "trace") as recorder:
        recorder.next_sequence()
        recorder.wrap(session, "mlp.onnx").run(None, {"x": weight(4, 8)})
    replay = Replay(Trace(tmp_path / "trace"), {"mlp.onnx": path})
    assert replay.kind == "relative"
    assert replay.divergence({}) == 0
    doubled = {"layers.0.fc2.weight": 2 * weight(4, 16, seed=3), "layers.0.fc2.bias": 2 * weight(4, seed=4)}
    assert replay.divergence({"mlp.onnx": doubled}) == pytest.approx(1, rel=1e-5)


def test_a_graph_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pair")
    trace = record(folder, tmp_path / "trace", 1)
    with pytest.raises(CalibrationError, match=r"ran decoder_model\.onnx, and there is only encoder_model\.onnx"):
        Replay(trace, {ENCODER: folder / ENCODER})
