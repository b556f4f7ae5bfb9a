"""Small models for the tests of evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

WIDTH = 8


def write_encoder(path: Path, seed: int = 0, noise: float = 0.0, external: bool = False) -> Path:
    """Look-up, two dense layers, a residual: input_ids, attention_mask [batch, tokens] -> hidden [batch,
    tokens, WIDTH].

    `noise` is added to the second layer's weight; node and tensor names do not depend on it.
    """
    rng = np.random.default_rng(seed)
    weights = {
        "table": rng.standard_normal((30, WIDTH)),
        "w1": rng.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH),
        "w2": rng.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH),
    }
    weights["w2"] = weights["w2"] + noise * np.random.default_rng(99).standard_normal((WIDTH, WIDTH))
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"], name="look_up"),
        helper.make_node("MatMul", ["embedded", "w1"], ["first"], name="dense_1"),
        helper.make_node("Tanh", ["first"], ["act"], name="tanh"),
        helper.make_node("MatMul", ["act", "w2"], ["second"], name="dense_2"),
        helper.make_node("Add", ["second", "embedded"], ["hidden"], name="residual"),
    ]
    ids = [
        helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "tokens"])
        for n in ("input_ids", "attention_mask")
    ]
    graph = helper.make_graph(
        nodes,
        "encoder",
        ids,
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "tokens", WIDTH])],
        [onnx.numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save_model(model, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=0)
    return path


def feeds(batches: int = 3, batch: int = 4, tokens: int = 6) -> list[dict[str, np.ndarray]]:
    """Random ids; the last two tokens of every second sentence are padding (id 0)."""
    made = []
    for i in range(batches):
        ids = np.random.default_rng(i).integers(1, 30, (batch, tokens))
        mask = np.ones_like(ids)
        mask[::2, -2:] = 0
        made.append({"input_ids": ids * mask, "attention_mask": mask})
    return made


VOCABULARY = ("[UNK]", "a", "b", "c", "d")


def write_bigram_model(path: Path, table: np.ndarray, *, positions: bool = False) -> Path:
    """A language model whose next token depends on the last one only: row i of `table` [V, V] are the logits after i.

    Takes `attention_mask` too, and `position_ids` where asked for, and does nothing with them.
    """
    names = ["input_ids", "attention_mask", *(["position_ids"] if positions else [])]
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["logits"], name="look_up")],
        "bigrams",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"]) for name in names],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", table.shape[1]])],
        [onnx.numpy_helper.from_array(table.astype(np.float32), "table")],
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def write_classifier(path: Path, *, batch: int | str = "batch", flip: float = 1.0) -> Path:
    """`logits` [batch, 3] are the input `x` [batch, 3] times `flip`."""
    shape = [batch, 3]
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "flip"], ["logits"], name="scale")],
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [onnx.numpy_helper.from_array(np.float32(flip), "flip")],
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def write_tokenizer(folder: Path) -> Path:
    """A folder with a tokenizer whose tokens are the words of `VOCABULARY`; it would put "[UNK]" first."""
    import tokenizers

    built = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token=VOCABULARY[0])
    )
    built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    built.post_processor = tokenizers.processors.TemplateProcessing(
        single="[UNK] $A", special_tokens=[(VOCABULARY[0], 0)]
    )
    folder.mkdir()
    built.save(str(folder / "tokenizer.json"))
    return folder
