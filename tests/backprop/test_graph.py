"""What a graph is run for: overrides, taps, branches, loops, functions, what is left out, and messages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

pytest.importorskip("torch")
import torch

from onnxq.backprop import TorchGraph, missing_ops
from onnxq.backprop.plan import Wanted, plan_graph
from onnxq.errors import ModelError
from onnxq.graph import find_weights, load
from tests.graph import models
from tests.graph.models import floats, integers, node, weight

TOLERANCE = 1e-5  # float32 in another order of summation
IDS = np.array([[1, 2, 3], [4, 5, 0]])


def _graph(proto: onnx.ModelProto) -> TorchGraph:
    return TorchGraph(models.as_ir(proto))


def _agree(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> None:
    graph = _graph(proto)
    found = graph.run(feeds)
    for name, expected in zip(graph.outputs, models.run(proto, feeds), strict=True):
        np.testing.assert_allclose(found[name].numpy(), expected, TOLERANCE, TOLERANCE)


@pytest.mark.parametrize("first", [True, False])
def test_both_branches_of_a_merged_decoder(first: bool) -> None:
    _agree(models.merged_decoder(), {"ids": IDS, "use_cache_branch": np.array([not first])})


def test_tied_embedding() -> None:
    _agree(models.tied_embedding(stored_twice=False), {"ids": IDS})


def test_loop() -> None:
    _agree(models.loop(), {"x": weight(2, 8)})


def test_loop_with_scan_outputs_that_stops_itself() -> None:
    body = models.graph(
        [
            node("Add", "total x", "total_out"),
            node("ReduceSum", "total_out", "size", keepdims=0),
            node("Less", "size bound", "go_out"),
            node("Mul", "total_out total_out", "kept"),
        ],
        [integers("i", []), helper.make_tensor_value_info("go", TensorProto.BOOL, []), floats("total", [2])],
        [helper.make_tensor_value_info("go_out", TensorProto.BOOL, []), floats("total_out", [2]), floats("kept", [2])],
        name="body",
    )
    loop = helper.make_node("Loop", ["", "always", "start"], ["last", "all"], name="loop", body=body)
    for bound in (7.0, -1.0):
        proto = models.model(
            [loop],
            [floats("x", [2])],
            [floats("last", [2]), floats("all", ["trips", 2])],
            {"always": np.array(True), "start": np.zeros(2, np.float32), "bound": np.array(bound, np.float32)},
        )
        _agree(proto, {"x": np.ones(2, np.float32)})


def test_loop_without_a_trip() -> None:
    proto = models.loop()
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.array(0), "trips"))
    _agree(proto, {"x": weight(2, 8)})


def test_function() -> None:
    _agree(models.function_body(), {"x": weight(2, 8)})


def test_function_with_attributes_of_its_caller() -> None:
    scaled, joined = node("LeakyRelu", "a", "b"), node("Concat", "a b", "r")
    scaled.attribute.add(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    joined.attribute.add(name="axis", ref_attr_name="axis", type=onnx.AttributeProto.INT)
    function = helper.make_function(
        "local", "Leak", ["a"], ["r"], [scaled, joined], [helper.make_opsetid("", 21)], ["axis"],
        [helper.make_attribute("slope", 0.25)],
    )  # fmt: skip
    calls = [
        node("Leak", "x", "h", "one", "local", slope=0.5, axis=0),
        node("Leak", "h", "y", "two", "local", axis=-1),
    ]
    proto = models.model(calls, [floats("x", [2, 3])], [floats("y", [4, 6])], functions=[function], domains=["local"])
    _agree(proto, {"x": weight(2, 3)})


def test_half_precision_is_computed_in_single() -> None:
    half = weight(8, 4).astype(np.float16)
    proto = models.model(
        [node("MatMul", "x w", "h"), node("Cast", "h", "c", to=TensorProto.FLOAT16), node("Mul", "c two", "y")],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [3, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [3, 4])],
        {"w": half, "two": np.array(2, np.float16)},
    )
    x = weight(3, 8, seed=1).astype(np.float16)
    y = _graph(proto).run({"x": x})["y"]
    assert y.dtype == torch.float32
    np.testing.assert_allclose(y.numpy(), 2 * x.astype(np.float32) @ half.astype(np.float32), TOLERANCE, TOLERANCE)


def test_stored_weights_are_not_copied(tmp_path: Path) -> None:
    path = models.save(models.mlp(), tmp_path / "m.onnx", external=True)
    loaded = load(path)
    graph = TorchGraph(loaded)
    graph.run({"x": weight(2, 8)})
    (large,) = [v for v in loaded.model.graph.initializers.values() if v.name == "onnx::MatMul_7"]
    addresses = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if ".data" in line
    ]
    place = graph.constant(large).data_ptr()
    assert any(int(start, 16) <= place < int(end, 16) for start, end in addresses)


def test_values_stand_for_initializers_and_for_computed_tensors() -> None:
    proto, x = models.mlp(), weight(2, 8)
    graph = _graph(proto)
    other = weight(8, 16, seed=9)
    changed = models.mlp()
    changed.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(other, "onnx::MatMul_7"))
    found = graph.run({"x": x}, values={"onnx::MatMul_7": torch.from_numpy(other)})["y"]
    np.testing.assert_allclose(found.numpy(), models.run(changed, {"x": x})[0], TOLERANCE, TOLERANCE)
    # What only the given tensor needed is not run: x is not even fed.
    hidden = graph.run({"x": x}, watch=["h2"])["h2"]
    again = graph.run({}, values={"h2": hidden}, watch=["h2"])
    assert torch.equal(again["h2"], hidden)
    np.testing.assert_allclose(again["y"].numpy(), models.run(proto, {"x": x})[0], TOLERANCE, TOLERANCE)


def test_operands_stand_for_what_one_node_reads() -> None:
    proto = models.tied_embedding(stored_twice=False)
    graph = _graph(proto)
    (tied,) = find_weights(graph.model).weights
    head = next(site for site in tied.sites if site.kind == "linear")
    other = torch.from_numpy(weight(8, 20, seed=3))
    found = graph.run({"ids": IDS}, operands={(head.node, head.weight_input): other}, watch=["h"])
    assert torch.equal(found["h"], torch.from_numpy(weight(20, 8, seed=5))[IDS])
    np.testing.assert_allclose(found["logits"].numpy(), (found["h"] @ other).numpy(), TOLERANCE, TOLERANCE)


def test_only_the_asked_outputs_are_computed() -> None:
    proto = models.model(
        [node("Relu", "x", "y"), node("Exp", "z", "unwanted")],
        [floats("x", [2]), floats("z", [2])],
        [floats("y", [2]), floats("unwanted", [2])],
    )
    assert list(_graph(proto).run({"x": np.ones(2, np.float32)}, outputs=["y"])) == ["y"]


def test_a_watched_tensor_in_a_branch() -> None:
    graph = _graph(models.merged_decoder())
    branch = next(iter(graph.model.graph)).attributes["then_branch"].as_graph()
    inner = next(value for n in branch for value in n.outputs if value.name == "past_q")
    key = graph.key(inner)
    assert key == "optimum::if.then_branch/past_q"
    taken = graph.run({"ids": IDS, "use_cache_branch": np.array([True])}, watch=[key])
    assert taken[key].shape == (2, 3, 8)
    assert key not in graph.run({"ids": IDS, "use_cache_branch": np.array([False])}, watch=[key])
    # Asked for alone, it still runs the If that holds it.
    alone = graph.run({"ids": IDS, "use_cache_branch": np.array([True])}, outputs=[], watch=["past_q"])
    assert torch.equal(alone["past_q"], taken[key])


def test_gradients_at_tracked_tensors_of_a_frozen_model() -> None:
    graph = _graph(models.mlp())
    found = graph.run({"x": weight(2, 8)}, track=["h0", "h2"])
    at_h0, at_h2 = torch.autograd.grad(found["y"].sum(), [found["h0"], found["h2"]])
    second = torch.from_numpy(weight(4, 16, seed=3))
    assert torch.allclose(at_h2, second.sum(0).expand(2, 16), TOLERANCE, TOLERANCE)
    active = found["h0"] + torch.from_numpy(weight(16, seed=2)) > 0
    assert torch.allclose(at_h0, at_h2 * active, TOLERANCE, TOLERANCE)


def test_the_gradient_of_a_weight_is_that_of_its_output_times_its_input() -> None:
    """What gradient variances are made of: no gradient of the size of the weight is needed."""
    graph, x = _graph(models.mlp()), weight(2, 8)
    site = next(s for w in find_weights(graph.model).weights for s in w.sites if s.node.op_type == "MatMul")
    output = graph.key(site.node.outputs[0])
    found = graph.run({"x": x}, track=[output], watch=[graph.key(site.input)])
    (slope,) = torch.autograd.grad(found["y"].square().sum(), [found[output]])
    stored = graph.constant(site.root).clone().requires_grad_()
    direct = graph.run({"x": x}, values={graph.key(site.root): stored})
    (expected,) = torch.autograd.grad(direct["y"].square().sum(), [stored])
    assert torch.allclose(found["x"].T @ slope, expected, TOLERANCE, TOLERANCE)


def test_a_tracked_feed() -> None:
    graph = _graph(models.mlp())
    found = graph.run({"x": weight(2, 8)}, track=["x"])
    (slope,) = torch.autograd.grad(found["y"].sum(), [found["x"]])
    assert slope.shape == (2, 8)
    assert bool((slope != 0).any())


def test_every_tensor_goes_after_its_last_reader() -> None:
    graph = models.as_ir(models.mlp()).graph
    wanted = Wanted(frozenset(["y"]), frozenset(), frozenset(), frozenset())
    freed = [sorted(str(value.name) for value in step.free) for step in plan_graph(graph, [0], wanted).steps]
    assert freed == [["x"], ["h0"], ["h1"], ["h2"]]


def test_outer_tensors_outlive_a_branch_that_reads_them() -> None:
    then = models.graph([node("Neg", "h", "a")], [], [floats("a", [2])], name="then")
    other = models.graph([node("Exp", "h", "b")], [], [floats("b", [2])], name="else")
    proto = models.model(
        [
            node("Relu", "x", "h"),
            node("If", "c", "i", "if", then_branch=then, else_branch=other),
            node("Add", "i h", "y"),
        ],
        [floats("x", [2]), helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [floats("y", [2])],
    )
    for condition in (True, False):
        _agree(proto, {"x": np.array([1.0, 2.0], np.float32), "c": np.array(condition)})


def test_missing_operators_are_known_up_front() -> None:
    proto = models.model(
        [node("Relu", "x", "h"), node("Det", "h", "d", "the_det"), node("Whatever", "d", "y", "mine", "com.example")],
        [floats("x", [2, 2])],
        [floats("y", [])],
        domains=["com.example"],
    )
    model = ir.from_proto(proto)
    assert [(missing.op, missing.nodes) for missing in missing_ops(model)] == [
        ("Det", ("the_det",)),
        ("com.example::Whatever", ("mine",)),
    ]
    with pytest.raises(ModelError, match="Det 'the_det' can't be run with gradients"):
        TorchGraph(model).run({"x": np.eye(2, dtype=np.float32)})
    assert missing_ops(models.as_ir(models.merged_decoder())) == ()


def test_a_failing_node_is_named() -> None:
    proto = models.model(
        [node("MatMul", "x w", "y", "the_product")],
        [floats("x", ["a", "b"])],
        [floats("y", ["a", 3])],
        {"w": weight(2, 3)},
    )
    with pytest.raises(
        ModelError, match=r"MatMul 'the_product' failed on inputs \(float32 \[1, 5\], float32 \[2, 3\]\)"
    ):
        _graph(proto).run({"x": weight(1, 5)})


def test_unknown_names_are_refused() -> None:
    graph, x = _graph(models.mlp()), weight(2, 8)
    with pytest.raises(ModelError, match="no input 'z'; it takes x"):
        graph.run({"z": x})
    with pytest.raises(ModelError, match="input 'x' is needed and was not fed"):
        graph.run({})
    with pytest.raises(ModelError, match=r"no output \['logits'\]; it has y"):
        graph.run({"x": x}, outputs=["logits"])
    with pytest.raises(ModelError, match=r"Did you mean 'layers\.0\.fc2\.weight'"):
        graph.run({"x": x}, values={"layers.0.fc2.weigth": torch.zeros(1)})
    looped = _graph(models.loop())
    body = next(iter(looped.model.graph)).attributes["body"].as_graph()
    with pytest.raises(ModelError, match="Loop's body"):
        looped.key(next(iter(body)).outputs[0])
