from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")
pytest.importorskip("optimum.exporters.onnx")
import torch

from onnxq.errors import ExportError
from onnxq.graph import find_weights, load
from tools import marian
from tools.marian_model import START, Student, StudentShape, load_student, shift_right, sinusoids
from tools.models import cache_folder

SHAPE = StudentShape(vocabulary=80, hidden=16, heads=4, ffn=24, encoder_layers=2, decoder_layers=2)

SETTINGS = """type: transformer
dec-cell: ssru
transformer-decoder-autoreg: rnn
transformer-preprocess: ""
transformer-postprocess: dan
transformer-ffn-activation: relu
tied-embeddings-all: true
transformer-train-position-embeddings: false
transformer-heads: 4
transformer-dim-ffn: 24
enc-depth: 2
dec-depth: 2
"""


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """All parameters of a Marian file of `SHAPE`; float32, with Marian's shapes."""
    rng = np.random.default_rng(seed)
    hidden, ffn = SHAPE.hidden, SHAPE.ffn

    def drawn(*size: int) -> np.ndarray:
        return (rng.standard_normal(size) / np.sqrt(size[0])).astype(np.float32)

    found = {"Wemb": drawn(SHAPE.vocabulary, hidden), "decoder_ff_logit_out_b": drawn(1, SHAPE.vocabulary)}
    for side, layers in (("encoder", 2), ("decoder", 2)):
        for i in range(1, layers + 1):
            p = f"{side}_l{i}"
            attention = "self" if side == "encoder" else "context"
            for letter in "qkvo":
                found[f"{p}_{attention}_W{letter}"] = drawn(hidden, hidden)
                found[f"{p}_{attention}_b{letter}"] = drawn(1, hidden)
            found |= {f"{p}_ffn_W1": drawn(hidden, ffn), f"{p}_ffn_b1": drawn(1, ffn)}
            found |= {f"{p}_ffn_W2": drawn(ffn, hidden), f"{p}_ffn_b2": drawn(1, hidden)}
            norms = [f"{p}_{attention}_Wo", f"{p}_ffn_ffn"]
            if side == "decoder":
                found |= {f"{p}_rnn_W": drawn(hidden, hidden), f"{p}_rnn_Wf": drawn(hidden, hidden)}
                found[f"{p}_rnn_bf"] = drawn(1, hidden)
                norms.append(f"{p}_rnn_ffn")
            for norm in norms:
                found |= {f"{norm}_ln_scale": 1 + drawn(1, hidden), f"{norm}_ln_bias": drawn(1, hidden)}
    return found


def write_binary(path: Path, parameters: dict[str, np.ndarray], settings: str = SETTINGS) -> dict[str, np.ndarray]:
    """Write a Marian file with 8-bit matrices; returns the parameters that it then holds."""
    entries: list[tuple[str, int, tuple[int, ...], bytes]] = []
    held = {}
    for name, array in parameters.items():
        if min(array.shape) == 1:
            entries.append((name, 0x404, array.shape, array.tobytes()))
            held[name] = array
            continue
        factor = np.float32(127 / np.abs(array).max())
        codes = np.rint(array * factor).astype(np.int8)
        stored = codes if name == "Wemb" else codes.T
        entries.append((name, 0x4101, array.shape, stored.tobytes() + factor.tobytes() + bytes(252)))
        entries.append((f"{name}_QuantMultA", 0x404, (1, 1), bytes(256)))
        held[name] = codes.astype(np.float32) / factor
    entries.append(("special:model.yml", 0x101, (len(settings) + 1,), settings.encode() + b"\0"))
    content = struct.pack("<QQ", 1, len(entries))
    for name, kind, shape, data in entries:
        content += struct.pack("<4Q", len(name) + 1, kind, len(shape), len(data))
    content += b"".join(name.encode() + b"\0" for name, *_ in entries)
    content += b"".join(struct.pack(f"<{len(shape)}i", *shape) for _, _, shape, _ in entries)
    content += struct.pack("<Q", 24) + bytes(24)
    path.write_bytes(content + b"".join(data for *_, data in entries))
    return held


def test_a_file_is_read_exactly(tmp_path: Path) -> None:
    held = write_binary(tmp_path / "model.x.bin", tensors())
    parameters, settings = marian.read_marian(tmp_path / "model.x.bin")
    assert sorted(parameters) == sorted(held)
    for name, array in held.items():
        np.testing.assert_array_equal(parameters[name], array, err_msg=name)
    assert marian.shape_of(parameters, settings) == SHAPE


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.x.bin"
    write_binary(path, tensors())
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"not a model", b"\7" * 100):
        path.write_bytes(content)
        with pytest.raises(ExportError, match="not a Marian model file, or is cut off"):
            marian.read_marian(path)
    write_binary(path, tensors(), SETTINGS.replace("dec-cell: ssru", "dec-cell: gru"))
    with pytest.raises(ExportError, match="dec-cell: 'gru'; only 'ssru'"):
        marian.shape_of(*marian.read_marian(path))


def reference(p: dict[str, np.ndarray], source: list[int], target: list[int]) -> np.ndarray:
    """Logits [target, vocabulary] in float64, one sentence, by the formulas and with Marian's names."""
    width, heads = SHAPE.hidden, SHAPE.heads
    p = {name: array.astype(np.float64) for name, array in p.items()}

    def embed(ids: list[int]) -> np.ndarray:
        rates = 10000 ** (-np.arange(width // 2) / (width // 2 - 1))
        angles = np.arange(len(ids))[:, None] * rates
        rows = np.stack([p["Wemb"][i] if i >= 0 else np.zeros(width) for i in ids])
        return rows * np.sqrt(width) + np.concatenate([np.sin(angles), np.cos(angles)], 1)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return centred / deviation * p[f"{name}_ln_scale"] + p[f"{name}_ln_bias"]

    def attend(x: np.ndarray, read: np.ndarray, name: str) -> np.ndarray:
        q, k, v = (y @ p[f"{name}_W{c}"] + p[f"{name}_b{c}"] for y, c in ((x, "q"), (read, "k"), (read, "v")))
        mixed = np.empty_like(q)
        for h in range(heads):
            part = slice(h * width // heads, (h + 1) * width // heads)
            weights = np.exp(q[:, part] @ k[:, part].T / np.sqrt(width // heads))
            mixed[:, part] = weights / weights.sum(1, keepdims=True) @ v[:, part]
        return norm(x + mixed @ p[f"{name}_Wo"] + p[f"{name}_bo"], f"{name}_Wo")

    def feed_forward(x: np.ndarray, name: str) -> np.ndarray:
        wide = np.maximum(x @ p[f"{name}_W1"] + p[f"{name}_b1"], 0)
        return norm(x + wide @ p[f"{name}_W2"] + p[f"{name}_b2"], f"{name}_ffn")

    encoded = embed(source)
    for i in (1, 2):
        encoded = feed_forward(attend(encoded, encoded, f"encoder_l{i}_self"), f"encoder_l{i}_ffn")
    x = embed([-1, *target[:-1]])
    for i in (1, 2):
        forget = 1 / (1 + np.exp(-(x @ p[f"decoder_l{i}_rnn_Wf"] + p[f"decoder_l{i}_rnn_bf"])))
        fresh = x @ p[f"decoder_l{i}_rnn_W"]
        state, outputs = np.zeros(width), []
        for t in range(len(x)):
            state = forget[t] * state + (1 - forget[t]) * fresh[t]
            outputs.append(np.maximum(state, 0))
        x = norm(x + np.stack(outputs), f"decoder_l{i}_rnn_ffn")
        x = feed_forward(attend(x, encoded, f"decoder_l{i}_context"), f"decoder_l{i}_ffn")
    return x @ p["Wemb"].T + p["decoder_ff_logit_out_b"]


def test_the_model_is_the_formulas() -> None:
    parameters = tensors()
    student = load_student(parameters, SHAPE)
    sources = [[5, 9, 30, 0], [7, 0]]
    targets = torch.tensor([[3, 4, 50, 6, 0], [8, 12, 1, 2, 0]])
    ids = torch.tensor([[5, 9, 30, 0], [7, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.inference_mode():
        logits = student(ids, mask, shift_right(targets))
    for row, source in enumerate(sources):
        expected = reference(parameters, source, targets[row].tolist())
        np.testing.assert_allclose(logits[row].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_shift_right_and_positions() -> None:
    assert shift_right(torch.tensor([[3, 4, 0]])).tolist() == [[START, 3, 4]]
    codes = sinusoids(torch.tensor([0.0, 2.0]), 4)
    np.testing.assert_allclose(codes[0], [0, 0, 1, 1], atol=1e-7)
    np.testing.assert_allclose(codes[1], [np.sin(2), np.sin(2e-4), np.cos(2), np.cos(2e-4)], rtol=1e-6)


def test_the_three_uses_of_the_embedding_are_one_weight() -> None:
    student = Student(SHAPE)
    assert student.encoder.embed_tokens.weight is student.decoder.embed_tokens.weight is student.lm_head.weight
    names = [name for name, _ in student.named_parameters()]
    assert sum("embed" in name or "lm_head.weight" in name for name in names) == 1


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("marian")
    marian.export_student(load_student(tensors(), SHAPE), folder)
    return folder


def products(path: Path) -> dict[str, list[str]]:
    """Names of the nodes that use each weight matrix."""
    return {w.name: [site.node.name for site in w.sites] for w in find_weights(load(path).model).weights}


def test_products_are_named_after_their_layers(exported: Path) -> None:
    encoder, decoder = products(exported / marian.ENCODER), products(exported / marian.DECODER)
    assert encoder["encoder.embed_tokens.weight"] == ["/encoder/embed_tokens/Gather"]
    assert encoder["encoder.layers.1.self_attn.k_proj.weight"] == ["/encoder/layers.1/self_attn/k_proj/MatMul"]
    # Keys and values of the cross-attention are computed once a sentence, with the encoder.
    assert encoder["decoder.layers.0.encoder_attn.k_proj.weight"] == ["/decoder/layers.0/encoder_attn/k_proj/MatMul"]
    assert decoder["decoder.embed_tokens.weight"] == ["/decoder/embed_tokens/Gather", "/lm_head/MatMul"]
    assert decoder["decoder.layers.0.rnn.Wf.weight"] == ["/decoder/layers.0/rnn/Wf/MatMul"]
    assert (len(encoder), len(decoder)) == (1 + 2 * 6 + 2 * 2, 1 + 2 * 6)


def test_the_table_is_stored_once(exported: Path) -> None:
    graph = ir.load(exported / marian.DECODER).graph
    sized = [v.name for v in graph.initializers.values() if SHAPE.vocabulary in v.shape and len(v.shape) == 2]
    assert sized == ["decoder.embed_tokens.weight"]


def test_shapes_of_the_graphs(exported: Path) -> None:
    encoder, decoder = (ir.load(exported / name).graph for name in (marian.ENCODER, marian.DECODER))
    cross = {f"cross_{part}_{i}": ["batch", 4, "source", 4] for i in (0, 1) for part in ("key", "value")}

    def shapes(values: list[ir.Value]) -> dict[str, list[object]]:
        return {v.name: [d if isinstance(d, int) else str(d) for d in v.shape] for v in values}

    assert shapes(encoder.outputs) == {"last_hidden_state": ["batch", "source", 16], **cross}
    assert shapes(decoder.inputs) == {
        "input_ids": ["batch", 1],
        "position": [1],
        "encoder_attention_mask": ["batch", "source"],
        **cross,
        "state_0": ["batch", 16],
        "state_1": ["batch", 16],
    }
    assert shapes(decoder.outputs) == {
        "logits": ["batch", 1, 80],
        "new_state_0": ["batch", 16],
        "new_state_1": ["batch", 16],
    }


def test_the_settings_are_beside_the_graphs(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert StudentShape(**{name: config[name] for name in vars(SHAPE)}) == SHAPE
    assert (config["eos_token_id"], config["unk_token_id"], config["decoder_start_token_id"]) == (0, 1, -1)


def test_the_folder_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_binary(source / "model.x.bin", tensors())
    for name in ("vocab.enpt.spm", "tokenizer.json"):
        (source / name).write_bytes(b"words")
    monkeypatch.setattr(marian, "fetch", lambda artefact, cache: source)
    folder = marian.prepare(tmp_path)
    shutil.rmtree(source)
    assert marian.prepare(tmp_path) == folder
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "decoder_model.onnx",
        "encoder_model.onnx",
        "tokenizer.json",
        "vocab.spm",
    ]
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


@pytest.mark.models
def test_every_weight_of_the_real_model_is_found() -> None:
    folder = cache_folder() / marian.FOLDER
    if not (folder / marian.DECODER).is_file():
        pytest.skip("not made: run `python -m tools.marian`")
    encoder, decoder = products(folder / marian.ENCODER), products(folder / marian.DECODER)
    assert (len(encoder), len(decoder)) == (1 + 6 * 6 + 2 * 2, 1 + 2 * 6)
