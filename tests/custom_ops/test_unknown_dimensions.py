"""Dimensions that nobody knows before the run: ONNX Runtime must not take what the library says of them for numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnxruntime as ort

from onnxq.formats.uniform import UniformFormat, ZeroPoint
from tests.encodings import random_encoding, relative_error

INT8_ACTIVATIONS = 0.02
N, K, HEADS = 64, 32, 4


def test_heads_are_split_behind_a_product_of_unknown_shape(library: Path) -> None:
    """As in a transformer: Reshape takes the product's own first two dimensions, both unknown and without a name."""
    encoding = random_encoding(UniformFormat(4, 32, ZeroPoint.PER_GROUP), N, K)
    packed = encoding.pack()
    arrays = {
        "packed": packed.packed,
        "scales": packed.scales,
        "zero_points": packed.zero_points,
        "bias": np.zeros(1, np.float32),
        "first": np.array([0]),
        "second": np.array([1]),
        "heads": np.array([HEADS, N // HEADS]),
    }
    attributes = {"K": K, "N": N, "bits": 4, "group_size": 32, "gain": encoding.gain}
    nodes = [
        oh.make_node("Expand", ["x", "shape"], ["unknown"]),
        oh.make_node(
            "LowBitMatMul", ["unknown", "packed", "scales", "zero_points", "bias"], ["y"], domain="onnxq", **attributes
        ),
        oh.make_node("Shape", ["y"], ["dims"]),
        oh.make_node("Gather", ["dims", "first"], ["batch"]),
        oh.make_node("Gather", ["dims", "second"], ["tokens"]),
        oh.make_node("Concat", ["batch", "tokens", "heads"], ["target"], axis=0),
        oh.make_node("Reshape", ["y", "target"], ["split"]),
    ]
    graph = oh.make_graph(
        nodes,
        "heads",
        [
            oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["rows", 1, K]),
            oh.make_tensor_value_info("shape", onnx.TensorProto.INT64, [3]),
        ],
        [oh.make_tensor_value_info("split", onnx.TensorProto.FLOAT, ["b", "t", HEADS, N // HEADS])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [oh.make_opsetid("", 21), oh.make_opsetid("onnxq", 1)]
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    model = oh.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), options)
    x = np.random.default_rng(0).standard_normal((2, 1, K)).astype(np.float32)
    (split,) = session.run(None, {"x": x, "shape": np.array([2, 3, K])})
    expected = np.broadcast_to(x, (2, 3, K)) @ encoding.dequantize().T
    assert relative_error(split, expected.reshape(2, 3, HEADS, N // HEADS)) <= INT8_ACTIVATIONS
