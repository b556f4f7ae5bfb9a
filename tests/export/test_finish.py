from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from onnxq.errors import ExportError
from onnxq.export.finish import convert_opset, finish_graph, name_weights, share_weights

RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((50, 24)).astype(np.float32)
INNER = RNG.standard_normal((24, 50)).astype(np.float32)


def model(weights: dict[str, np.ndarray], nodes: list[onnx.NodeProto], opset: int = 20) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "width"])],
        [onnx.numpy_helper.from_array(w, n) for n, w in weights.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9))


def tied() -> ir.Model:
    """Look-up, an inner layer, and an output layer that is the table transposed."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"], name="look"),
        helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["h"], name="inner"),
        helper.make_node("Transpose", ["onnx::MatMul_7"], ["it"], name="t", perm=[1, 0]),
        helper.make_node("MatMul", ["h", "it"], ["back"], name="second"),
        helper.make_node("MatMul", ["back", "onnx::MatMul_9"], ["y"], name="head"),
    ]
    return model({"onnx::MatMul_9": np.ascontiguousarray(TABLE.T), "table": TABLE, "onnx::MatMul_7": INNER}, nodes)


def run(built: ir.Model) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(built).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": np.array([3, 1])})[0]


def test_transposed_tie_becomes_one_weight_with_the_same_result() -> None:
    before, built = run(tied()), tied()
    assert share_weights(built) == ("table <- onnx::MatMul_9",)
    assert sorted(built.graph.initializers) == ["onnx::MatMul_7", "table"]
    np.testing.assert_array_equal(run(built), before)


def test_equal_weights_are_stored_once() -> None:
    nodes = [
        helper.make_node("Gather", ["a", "ids"], ["x"]),
        helper.make_node("Gather", ["b", "ids"], ["z"]),
        helper.make_node("Add", ["x", "z"], ["y"]),
    ]
    built = model({"a": TABLE, "b": TABLE.copy()}, nodes)
    assert share_weights(built) == ("a <- b",)
    np.testing.assert_array_equal(run(built), 2 * TABLE[[3, 1]])


def test_different_weights_stay_apart() -> None:
    nodes = [
        helper.make_node("Gather", ["a", "ids"], ["x"]),
        helper.make_node("Gather", ["b", "ids"], ["z"]),
        helper.make_node("Add", ["x", "z"], ["y"]),
    ]
    other = TABLE.copy()
    other[0, 0] += 1
    built = model({"a": TABLE, "b": other}, nodes)
    assert share_weights(built) == ()
    assert len(built.graph.initializers) == 2


def test_anonymous_weights_get_their_parameters_names() -> None:
    built = tied()
    parameters = {"table": TABLE, "inner.weight": np.ascontiguousarray(INNER.T), "unused.weight": INNER[:3]}
    # The transposed table is the parameter "table" too, but that name is taken.
    assert name_weights(built, parameters) == 1
    assert sorted(built.graph.initializers) == ["inner.weight", "onnx::MatMul_9", "table"]


def test_opset_is_converted_inside_subgraphs_too() -> None:
    def branch(name: str) -> onnx.GraphProto:
        node = helper.make_node("Gather", ["table", "ids"], [f"{name}_out"], name=name)
        return helper.make_graph(
            [node], name, [], [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, ["n", 24])]
        )

    nodes = [
        helper.make_node("Size", ["ids"], ["size"]),
        helper.make_node("Constant", [], ["one"], value=onnx.numpy_helper.from_array(np.array(1))),
        helper.make_node("Greater", ["size", "one"], ["many"]),
        helper.make_node("If", ["many"], ["y"], then_branch=branch("then"), else_branch=branch("else")),
    ]
    built = model({"table": TABLE}, nodes)
    convert_opset(built, 21)
    assert built.opset_imports[""] == 21
    onnx.checker.check_model(ir.to_proto(built), full_check=True)
    np.testing.assert_array_equal(run(built), TABLE[[3, 1]])


def test_opset_beyond_the_converter_is_refused() -> None:
    with pytest.raises(ExportError, match="cannot be converted from opset 20 to 99"):
        convert_opset(tied(), 99)


def test_traces_and_large_weights_leave_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxq.export.finish.LARGEST_SINGLE_FILE", 1000)
    built = tied()
    before = run(built)
    for node in built.graph:
        node.metadata_props["pkg.torch.onnx.stack_trace"] = "File secret.py"
        node.doc_string = "secret"
    facts = finish_graph(built, tmp_path / "m.onnx", 21, {})
    assert b"secret" not in (tmp_path / "m.onnx").read_bytes()
    assert facts.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert (tmp_path / "m.onnx.data").stat().st_size >= TABLE.nbytes + INNER.nbytes
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"ids": np.array([3, 1])})[0], before)
