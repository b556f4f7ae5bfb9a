"""Transforms of activations: equal ones are merged, others and those of branches stay."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import pytest

from onnxq.passes.forms.framed import TRANSFORM_PROPERTY
from onnxq.passes.share import ShareTransformsPass
from tests.graph import models


def marked(proto: onnx.ModelProto, *op_types: str) -> ir.Model:
    model = ir.from_proto(proto)
    for graph in model.graphs():
        for node in graph:
            if node.op_type in op_types:
                node.metadata_props[TRANSFORM_PROPERTY] = "analysis"
    return model


def counts(model: ir.Model) -> dict[str, int]:
    names = [node.op_type for graph in model.graphs() for node in graph]
    return {name: names.count(name) for name in names}


def check_same(before: onnx.ModelProto, after: ir.Model, feeds: dict[str, np.ndarray]) -> None:
    written = ir.to_proto(after)
    onnx.checker.check_model(written, full_check=True)
    for got, expected in zip(models.run(written, feeds), models.run(before, feeds), strict=True):
        np.testing.assert_array_equal(got, expected)


def chain(second: np.ndarray, x_of_second: str = "x", op: str = "Mul") -> onnx.ModelProto:
    """Two chains Constant -> Mul -> Neg, of x or another input, that meet in a Sub of their Relus."""
    first = np.array([1.0, 2.0, 3.0], np.float32)
    return models.model(
        [
            models.constant("c1", first),
            models.node("Mul", "x c1", "m1"),
            models.node("Neg", "m1", "n1"),
            models.node("Relu", "n1", "r1"),
            models.constant("c2", second),
            models.node(op, f"{x_of_second} c2", "m2"),
            models.node("Neg", "m2", "n2"),
            models.node("Abs", "n2", "r2"),
            models.node("Sub", "r1 r2", "y"),
        ],
        [models.floats("x", ["b", 3]), models.floats("z", ["b", 3])],
        [models.floats("y", ["b", 3])],
    )


FEEDS = {"x": models.weight(2, 3), "z": models.weight(2, 3, seed=1)}


def test_equal_chains_become_one() -> None:
    """Node after node: what reads merged nodes is equal then itself. Constants count by value."""
    proto = chain(np.array([1.0, 2.0, 3.0], np.float32))
    model = marked(proto, "Constant", "Mul", "Neg")
    assert ShareTransformsPass()(model).modified
    assert counts(model) == {"Constant": 1, "Mul": 1, "Neg": 1, "Relu": 1, "Abs": 1, "Sub": 1}
    check_same(proto, model, FEEDS)
    assert not ShareTransformsPass()(model).modified


@pytest.mark.parametrize(
    ("second", "source", "op"),
    [
        (np.array([1.0, 2.0, 4.0], np.float32), "x", "Mul"),
        (np.array([[1.0, 2.0, 3.0]], np.float32), "x", "Mul"),
        (np.array([1.0, 2.0, 3.0], np.float32), "x", "Add"),
        (np.array([1.0, 2.0, 3.0], np.float32), "z", "Mul"),
    ],
    ids=["value", "shape", "op", "input"],
)
def test_what_differs_stays(second: np.ndarray, source: str, op: str) -> None:
    proto = chain(second, source, op)
    model = marked(proto, "Mul", "Add", "Neg", "Constant")
    ShareTransformsPass()(model)
    names = counts(model)
    assert names["Neg"] == 2
    assert names.get("Mul", 0) + names.get("Add", 0) == 2
    check_same(proto, model, FEEDS)


def test_nodes_without_the_mark_stay() -> None:
    model = marked(chain(np.array([1.0, 2.0, 3.0], np.float32)))
    assert not ShareTransformsPass()(model).modified
    assert counts(model)["Mul"] == 2


def test_attributes_count() -> None:
    nodes = [models.node("Softmax", "x", f"s{axis}{copy}", axis=axis) for axis in (0, 1) for copy in (0, 1)]
    nodes.append(models.node("Sum", "s00 s01 s10 s11", "y"))
    proto = models.model(nodes, [models.floats("x", ["b", 3])], [models.floats("y", ["b", 3])])
    model = marked(proto, "Softmax")
    ShareTransformsPass()(model)
    assert counts(model)["Softmax"] == 2
    check_same(proto, model, {"x": FEEDS["x"]})


def test_branches_share_among_themselves_only() -> None:
    def branch(name: str, op: str) -> onnx.GraphProto:
        nodes = [
            models.node("Neg", "x", f"{name}_1"),
            models.node("Neg", "x", f"{name}_2"),
            models.node(op, f"{name}_1 {name}_2", f"{name}_y"),
        ]
        return models.graph(nodes, [], [models.floats(f"{name}_y", ["b", 3])], name=name)

    flag = oh.make_tensor_value_info("flag", onnx.TensorProto.BOOL, [])
    proto = models.model(
        [
            models.node("Neg", "x", "outer"),
            models.node("If", "flag", "chosen", then_branch=branch("a", "Add"), else_branch=branch("b", "Mul")),
            models.node("Add", "outer chosen", "y"),
        ],
        [models.floats("x", ["b", 3]), flag],
        [models.floats("y", ["b", 3])],
    )
    model = marked(proto, "Neg")
    ShareTransformsPass()(model)
    for graph in model.graphs():
        assert [node.op_type for node in graph].count("Neg") == 1
    for value in (True, False):
        check_same(proto, model, {"x": FEEDS["x"], "flag": np.array(value)})
