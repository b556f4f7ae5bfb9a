"""Small hand-made models in the shapes that exporters give to real ones. Other rooms' tests may use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped]
from onnx import TensorProto, helper, numpy_helper

OPSET = 21
IR_VERSION = 10

Dims = Sequence[int | str]


def weight(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    """A normal random array, equal for equal arguments."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def node(op: str, inputs: str, outputs: str, name: str = "", domain: str = "", **attributes: Any) -> onnx.NodeProto:
    """A node from space-separated value names."""
    return helper.make_node(op, inputs.split(), outputs.split(), name=name, domain=domain, **attributes)


def constant(name: str, array: np.ndarray) -> onnx.NodeProto:
    """A Constant node."""
    return helper.make_node("Constant", [], [name], name=f"{name}_node", value=numpy_helper.from_array(array, name))


def floats(name: str, dims: Dims) -> onnx.ValueInfoProto:
    """A float32 graph input or output."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)


def integers(name: str, dims: Dims) -> onnx.ValueInfoProto:
    """An int64 graph input or output."""
    return helper.make_tensor_value_info(name, TensorProto.INT64, dims)


def graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Mapping[str, np.ndarray] | None = None,
    name: str = "g",
) -> onnx.GraphProto:
    """A graph with named arrays as initializers."""
    stored = [numpy_helper.from_array(array, key) for key, array in (initializers or {}).items()]
    return helper.make_graph(list(nodes), name, list(inputs), list(outputs), stored)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Mapping[str, np.ndarray] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
    domains: Sequence[str] = (),
    opset: int = OPSET,
) -> onnx.ModelProto:
    """A model of one graph."""
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(
        graph(nodes, inputs, outputs, initializers),
        opset_imports=imports,
        functions=list(functions),
        ir_version=IR_VERSION,
    )


def save(proto: onnx.ModelProto, path: Path, external: bool = False) -> Path:
    """Write a model; with ``external`` all its initializers go to ``<name>.onnx.data``."""
    if external:
        onnx.save_model(
            proto,
            path,
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=path.name + ".data",
            size_threshold=0,
        )
    else:
        onnx.save_model(proto, path)
    return path


def as_ir(proto: onnx.ModelProto) -> ir.Model:
    """The model in the IR, after a check that it is valid ONNX."""
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def run(source: onnx.ModelProto | Path, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs from stock ONNX Runtime, on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    data = source.SerializeToString() if isinstance(source, onnx.ModelProto) else str(source)
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def mlp(width: int = 8, hidden: int = 16) -> onnx.ModelProto:
    """x -> MatMul -> Add -> Relu -> Gemm: anonymous and named initializers, as torch exports them."""
    return model(
        [
            node("MatMul", "x onnx::MatMul_7", "h0", "/layers.0/fc1/MatMul"),
            node("Add", "h0 layers.0.fc1.bias", "h1", "/layers.0/fc1/Add"),
            node("Relu", "h1", "h2", "/layers.0/act/Relu"),
            node("Gemm", "h2 layers.0.fc2.weight layers.0.fc2.bias", "y", "/layers.0/fc2/Gemm", transB=1),
        ],
        [floats("x", ["b", width])],
        [floats("y", ["b", 4])],
        {
            "onnx::MatMul_7": weight(width, hidden, seed=1),
            "layers.0.fc1.bias": weight(hidden, seed=2),
            "layers.0.fc2.weight": weight(4, hidden, seed=3),
            "layers.0.fc2.bias": weight(4, seed=4),
        },
    )


def tied_embedding(stored_twice: bool, rows: int = 20, width: int = 8) -> onnx.ModelProto:
    """ids -> Gather -> MatMul with the transposed table -> logits.

    Args:
        stored_twice: the head has its own transposed copy [d, V] (optimum without accelerate); otherwise one
            table [V, d] feeds both through a Transpose.
    """
    table = weight(rows, width, seed=5)
    nodes = [node("Gather", "embed.weight ids", "h", "/embed/Gather")]
    initializers = {"embed.weight": table}
    if stored_twice:
        initializers["onnx::MatMul_31"] = np.ascontiguousarray(table.T)
        nodes.append(node("MatMul", "h onnx::MatMul_31", "logits", "/lm_head/MatMul"))
    else:
        nodes.append(node("Transpose", "embed.weight", "t", "/lm_head/Transpose", perm=[1, 0]))
        nodes.append(node("MatMul", "h t", "logits", "/lm_head/MatMul"))
    return model(nodes, [integers("ids", ["b", "s"])], [floats("logits", ["b", "s", rows])], initializers)


def merged_decoder(rows: int = 20, width: int = 8) -> onnx.ModelProto:
    """One If on ``use_cache_branch``; both branches read outer weights under the same node names.

    The table is tied to the head through a Transpose inside each branch; the projection is an anonymous
    initializer with the suffix that merging adds.
    """

    def branch(name: str) -> onnx.GraphProto:
        return graph(
            [
                node("Gather", "embed.weight_merged_0 ids", f"{name}_e", "/decoder/embed/Gather"),
                node("MatMul", f"{name}_e onnx::MatMul_713_merged_0", f"{name}_q", "/decoder/q_proj/MatMul"),
                node("Transpose", "embed.weight_merged_0", f"{name}_t", "/lm_head/Transpose", perm=[1, 0]),
                node("MatMul", f"{name}_q {name}_t", f"{name}_y", "/lm_head/MatMul"),
            ],
            [],
            [floats(f"{name}_y", ["b", "s", rows])],
            name=name,
        )

    condition = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    return model(
        [
            node(
                "If",
                "use_cache_branch",
                "y",
                "optimum::if",
                then_branch=branch("past"),
                else_branch=branch("first"),
            )
        ],
        [integers("ids", ["b", "s"]), condition],
        [floats("y", ["b", "s", rows])],
        {
            "embed.weight_merged_0": weight(rows, width, seed=5),
            "onnx::MatMul_713_merged_0": weight(width, width, seed=6),
        },
    )


def loop(width: int = 8) -> onnx.ModelProto:
    """Three rounds of x <- x W + x V: W from the outer graph, V an initializer of the body."""
    body = graph(
        [
            node("Identity", "go", "go_out", "go"),
            node("MatMul", "state W_outer", "m", "/body/outer/MatMul"),
            node("MatMul", "state V_inner", "n", "/body/inner/MatMul"),
            node("Add", "m n", "state_out", "/body/Add"),
        ],
        [
            integers("i", []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            floats("state", ["b", width]),
        ],
        [helper.make_tensor_value_info("go_out", TensorProto.BOOL, []), floats("state_out", ["b", width])],
        {"V_inner": weight(width, width, seed=8)},
        name="body",
    )
    return model(
        [node("Loop", "trips always x", "y", "loop", body=body)],
        [floats("x", ["b", width])],
        [floats("y", ["b", width])],
        {"trips": np.array(3), "always": np.array(True), "W_outer": weight(width, width, seed=7)},
    )


def function_body(width: int = 8) -> onnx.ModelProto:
    """A model-local function that holds a constant weight and takes another as an argument; called twice."""
    function = helper.make_function(
        "local",
        "Block",
        ["a", "w"],
        ["r"],
        [
            constant("inner", weight(width, width, seed=9)),
            node("MatMul", "a inner", "p", "/block/proj/MatMul"),
            node("MatMul", "p w", "r", "/block/out/MatMul"),
        ],
        [helper.make_opsetid("", OPSET)],
    )
    return model(
        [node("Block", "x given", "h", "call_0", "local"), node("Block", "h given", "y", "call_1", "local")],
        [floats("x", ["b", width])],
        [floats("y", ["b", width])],
        {"given": weight(width, width, seed=10)},
        functions=[function],
        domains=["local"],
    )
