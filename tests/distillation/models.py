"""A small transformer-like float model with a norm, biases, a Gemm, a tied table, and data for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from onnxq.calibration import CalibrationData, model_inputs, open_data
from onnxq.formats.uniform import UniformEncoding, UniformFormat, ZeroPoint
from onnxq.graph import LoadedModel, Weight, find_weights, load
from onnxq.solvers.nearest import nearest
from tests.graph import models
from tests.graph.models import floats, integers, node, weight

WIDTH, HIDDEN, ROWS = 64, 96, 50
TWO_BITS = UniformFormat(2, 32, ZeroPoint.INTEGER)


def network(*, written_out: bool = False, logits: bool = False) -> onnx.ModelProto:
    """ids [b, s] -> table -> norm -> two layers with biases -> y [b, s, width], or logits by the tied table.

    Args:
        written_out: the norm is a root-mean-square norm in small steps, its bias an Add.
        logits: end in the tied head.
    """
    if written_out:
        norm = [
            node("Pow", "e two", "squares"),
            node("ReduceMean", "squares last", "mean"),
            node("Add", "mean epsilon", "safe"),
            node("Sqrt", "safe", "root"),
            node("Div", "one root", "inverse"),
            node("Mul", "e inverse", "plain"),
            node("Mul", "norm.gain plain", "scaled"),
            node("Add", "scaled norm.bias", "n"),
        ]
    else:
        norm = [node("LayerNormalization", "e norm.gain norm.bias", "n", "norm")]
    nodes = [
        node("Gather", "table ids", "e", "embed"),
        *norm,
        node("MatMul", "n up.weight", "u", "up"),
        node("Add", "up.bias u", "ub", "up_bias"),
        node("Gelu", "ub", "h", "act"),
        node("Reshape", "h flat", "hf", "flatten"),
        node("Gemm", "hf down.weight down.bias", "d", "down", transB=1),
        node("Shape", "ids", "shape", "shape"),
        node("Concat", "shape width", "full", "full", axis=0),
        node("Reshape", "d full", "t" if logits else "y", "back"),
    ]
    if logits:
        nodes += [node("Transpose", "table", "tt", perm=[1, 0]), node("MatMul", "t tt", "logits", "head")]
    initializers = {
        "table": weight(ROWS, WIDTH, seed=1),
        "norm.gain": 1 + 0.1 * weight(WIDTH, seed=2),
        "norm.bias": 0.1 * weight(WIDTH, seed=3),
        "up.weight": weight(WIDTH, HIDDEN, seed=4) / 8,
        "up.bias": 0.1 * weight(HIDDEN, seed=5),
        "down.weight": weight(WIDTH, HIDDEN, seed=6) / 8,
        "down.bias": np.zeros(WIDTH, np.float32),
        "flat": np.array([-1, HIDDEN]),
        "width": np.array([WIDTH]),
    }
    if written_out:
        initializers |= {
            "two": np.array(2, np.float32),
            "one": np.array(1, np.float32),
            "last": np.array([-1]),
            "epsilon": np.array(1e-5, np.float32),
        }
    output = floats("logits", ["b", "s", ROWS]) if logits else floats("y", ["b", "s", WIDTH])
    inputs = [integers("ids", ["b", "s"]), integers("attention_mask", ["b", "s"])]
    return models.model(nodes, inputs, [output], initializers)


def opened(proto: onnx.ModelProto, folder: Path) -> LoadedModel:
    """The model from a file."""
    return load(models.save(proto, folder / "model.onnx", external=True))


def batches(loaded: LoadedModel, count: int = 8, *, padded: bool = False) -> CalibrationData:
    """Random batches [4, 6]; with ``padded`` the last tokens of a sample are padding."""
    rng = np.random.default_rng(3)
    feeds = []
    for _ in range(count):
        mask = np.ones((4, 6), np.int64)
        if padded:
            mask[1, 4:] = 0
        feeds.append({"ids": rng.integers(0, ROWS, (4, 6)), "attention_mask": mask})
    return open_data(feeds, model_inputs(loaded.model))


def linear_weights(loaded: LoadedModel) -> list[Weight]:
    """The weights that products read."""
    return [found for found in find_weights(loaded.model).weights if "linear" in found.kinds]


def two_bits(found: Weight) -> UniformEncoding:
    """A weight rounded to nearest on 2 bits."""
    return nearest(found.matrix(), TWO_BITS, None)
