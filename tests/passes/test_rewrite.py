"""Every shape of site, rewritten to every form, against numpy on the dequantised weight."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxq.formats.uniform import UniformEncoding, UniformFormat, ZeroPoint, choose_gain, round_scales
from onnxq.graph import find_weights
from onnxq.passes.forms import Readers, StoredWeight, choose_form
from onnxq.passes.rewrite import WEIGHT_PROPERTY, Assignment, RewriteSitesPass, site_refusal
from tests.encodings import relative_error

FLOAT32_SUMMATION = 2e-6
INT8_ACTIVATIONS = 0.02
"""MatMulNBits at accuracy level 4 rounds activations to 8 bits."""
HALF = 2e-3

N, K = 48, 64
FORMAT = UniformFormat(4, 32, ZeroPoint.PER_GROUP_INTEGER)
rng = np.random.default_rng(0)


def rounded(weight: np.ndarray, format: UniformFormat = FORMAT) -> UniformEncoding:
    """Plain min-max rounding: these tests are about graphs."""
    n, k = weight.shape
    groups, group = format.groups(k), format.effective_group(k)
    padded = np.pad(weight, ((0, 0), (0, groups * group - k)), mode="edge").reshape(n, groups, group)
    low, high = padded.min(2), padded.max(2)
    scales = (high - low) / (format.levels - 1)
    gain = choose_gain(scales)
    stored = round_scales(scales, gain)
    zeros = format.quantize_zero(-low / scales)
    steps = stored.astype(np.float32) * gain
    codes = np.clip(np.rint(padded / steps[..., None] + format.zero_of(zeros)[..., None]), 0, format.levels - 1)
    return UniformEncoding(format, codes.reshape(n, -1)[:, :k].astype(np.uint8), stored, zeros, gain)


def make_model(nodes, inputs, outputs, initializers, opset=21, dtype=onnx.TensorProto.FLOAT) -> onnx.ModelProto:
    def info(name: str, shape: list) -> onnx.ValueInfoProto:
        kind = onnx.TensorProto.INT64 if name.startswith("ids") else dtype
        return oh.make_tensor_value_info(name, kind, shape)

    graph = oh.make_graph(
        nodes, "g", [info(*item) for item in inputs.items()], [info(*item) for item in outputs.items()],
        [onnx.numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )  # fmt: skip
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", opset)], ir_version=10)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(model.SerializeToString(), options).run(None, feeds)


def rewrite(proto: onnx.ModelProto, *, stock: bool = False) -> tuple[onnx.ModelProto, onnx.ModelProto, ir.Model]:
    """The rewritten model, and the original with its weights replaced by what the encodings decode to."""
    onnx.checker.check_model(proto, full_check=True)
    model = ir.from_proto(proto)
    reference = ir.from_proto(proto)
    twins = {weight.name: weight for weight in find_weights(reference).weights}
    assignments = []
    for weight in find_weights(model).weights:
        assert all(site_refusal(site, weight) is None for site in weight.sites)
        parts = []
        for index, member in enumerate(np.split(weight.matrix(), weight.batch)):
            encoding = rounded(member)
            opset = model.graph.opset_imports[""]
            form, _ = choose_form(
                encoding, stock=stock, opset=opset, readers=Readers.of(weight.sites), accuracy_level=1
            )
            tensors = {
                role: ir.Value(name=f"{weight.name}.{index}.{role}", const_value=ir.tensor(array))
                for role, array in form.arrays(encoding).items()
            }
            parts.append(StoredWeight(weight.name, form, encoding.shape, form.attributes(encoding), tensors))
        assignments.append(Assignment(weight, tuple(parts)))
        for root in twins[weight.name].roots:
            root.const_value = ir.tensor(_dequantised_like(weight, root), name=root.name)
    RewriteSitesPass(assignments)(model)
    return ir.to_proto(model), ir.to_proto(reference), model


def _dequantised_like(weight, root: ir.Value) -> np.ndarray:
    """The encodings' weight laid out as the stored tensor of a root."""
    decoded = np.concatenate([rounded(member).dequantize() for member in np.split(weight.matrix(), weight.batch)])
    site = next(site for site in weight.sites if site.root.name == root.name)
    count = int(np.prod(site.layout.source))
    positions = site.layout.apply(np.arange(count).reshape(site.layout.source)).reshape(decoded.shape)
    flat = np.empty(count, np.float32)
    flat[positions.ravel()] = decoded.ravel()
    return flat.reshape(site.layout.source).astype(root.const_value.dtype.numpy())


def check(proto: onnx.ModelProto, feeds: dict[str, np.ndarray], tolerance=FLOAT32_SUMMATION, stock=False) -> ir.Model:
    rewritten, reference, model = rewrite(proto, stock=stock)
    onnx.checker.check_model(rewritten, full_check=True)
    for got, expected in zip(run(rewritten, feeds), run(reference, feeds), strict=True):
        assert relative_error(got.astype(np.float32), expected.astype(np.float32)) <= tolerance
    return model


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for graph in model.graphs() for node in graph]


def weight(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("stock", [False, True])
def test_matmul_takes_its_bias_along(stock: bool) -> None:
    nodes = [oh.make_node("MatMul", ["x", "w"], ["h"], name="fc"), oh.make_node("Add", ["h", "b"], ["y"])]
    proto = make_model(nodes, {"x": ["s", K]}, {"y": ["s", N]}, {"w": weight(K, N), "b": weight(N)})
    model = check(proto, {"x": weight(3, K)}, stock=stock)
    if stock:
        assert op_types(model) == ["Cast", "DequantizeLinear", "MatMul", "Add"]
    else:
        assert op_types(model) == ["LowBitMatMul"]
        (node,) = model.graph
        assert node.name == "fc"
        assert node.metadata_props[WEIGHT_PROPERTY] == "w"


def test_a_sum_that_is_read_twice_keeps_its_add() -> None:
    nodes = [
        oh.make_node("MatMul", ["x", "w"], ["h"]),
        oh.make_node("Add", ["h", "b"], ["y"]),
        oh.make_node("Relu", ["h"], ["z"]),
    ]
    proto = make_model(nodes, {"x": ["s", K]}, {"y": ["s", N], "z": ["s", N]}, {"w": weight(K, N), "b": weight(N)})
    assert "Add" in op_types(check(proto, {"x": weight(3, K)}))


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"transB": 1},
        {"transA": 1},
        {"transA": 1, "transB": 1},
        {"alpha": 0.5},
        {"beta": 2.0},
        {"alpha": 2.0, "beta": 0.5},
    ],
)
@pytest.mark.parametrize("c", [None, (N,), (1, N), (3, N)])
def test_gemm(attributes: dict[str, float], c: tuple[int, ...] | None, stock: bool) -> None:
    initializers = {"w": weight(N, K) if attributes.get("transB") else weight(K, N)}
    inputs = ["x", "w"]
    if c is not None:
        initializers["c"] = weight(*c)
        inputs.append("c")
    x = weight(K, 3) if attributes.get("transA") else weight(3, K)
    proto = make_model(
        [oh.make_node("Gemm", inputs, ["y"], **attributes)], {"x": list(x.shape)}, {"y": [3, N]}, initializers
    )
    check(proto, {"x": x}, stock=stock)


@pytest.mark.parametrize("attributes", [{}, {"transA": 1}, {"transB": 1}, {"alpha": 0.5, "beta": 2.0}])
def test_gemm_with_the_weight_on_the_left(attributes: dict[str, float]) -> None:
    w = weight(K, N) if attributes.get("transA") else weight(N, K)
    x = weight(3, K) if attributes.get("transB") else weight(K, 3)
    proto = make_model(
        [oh.make_node("Gemm", ["w", "x", "c"], ["y"], **attributes)],
        {"x": list(x.shape)}, {"y": [N, 3]}, {"w": w, "c": weight(N, 1)},
    )  # fmt: skip
    check(proto, {"x": x})


@pytest.mark.parametrize("shape", [(K,), (K, 3), (2, K, 3), (2, 5, K, 3)])
def test_matmul_with_the_weight_on_the_left(shape: tuple[int, ...]) -> None:
    out = [*shape[:-2], N, 3] if len(shape) > 1 else [N]
    proto = make_model([oh.make_node("MatMul", ["w", "x"], ["y"])], {"x": list(shape)}, {"y": out}, {"w": weight(N, K)})
    check(proto, {"x": weight(*shape)})


@pytest.mark.parametrize("shape", [(3, K), (2, 3, K), (1, 3, K), (5, 2, 3, K)])
def test_a_stack_of_weights(shape: tuple[int, ...]) -> None:
    out = [*shape[:-3], 2, 3, N]
    proto = make_model(
        [oh.make_node("MatMul", ["x", "w"], ["y"])], {"x": list(shape)}, {"y": out}, {"w": weight(2, K, N)}
    )
    assert op_types(check(proto, {"x": weight(*shape)})).count("LowBitMatMul") == 2


@pytest.mark.parametrize("stock", [False, True])
def test_a_table_tied_to_the_output_is_stored_once(stock: bool) -> None:
    nodes = [
        oh.make_node("Gather", ["table", "ids"], ["x"]),
        oh.make_node("Transpose", ["table"], ["head"], perm=[1, 0]),
        oh.make_node("MatMul", ["x", "head"], ["y"]),
    ]
    proto = make_model(nodes, {"ids": ["s"]}, {"y": ["s", N]}, {"table": weight(N, K)})
    model = check(proto, {"ids": np.array([0, 47, -1, 5])}, INT8_ACTIVATIONS if stock else FLOAT32_SUMMATION, stock)
    assert len(model.graph.initializers) == 3
    names = ["GatherBlockQuantized", "MatMulNBits"] if stock else ["LowBitGather", "LowBitMatMul"]
    assert [name for name in op_types(model) if name in names] == names


def test_half_precision_computes_in_float() -> None:
    nodes = [oh.make_node("Gather", ["t", "ids"], ["x"]), oh.make_node("MatMul", ["x", "w"], ["y"])]
    initializers = {"t": weight(N, K).astype(np.float16), "w": weight(K, N).astype(np.float16)}
    proto = make_model(nodes, {"ids": ["s"]}, {"y": ["s", N]}, initializers, dtype=onnx.TensorProto.FLOAT16)
    check(proto, {"ids": np.array([3, 1])}, HALF)


@pytest.mark.parametrize(("opset", "stock"), [(13, False), (17, False), (21, False), (17, True), (21, True)])
def test_both_branches_of_an_if_read_one_weight(opset: int, stock: bool) -> None:
    def branch(name: str, op: str) -> onnx.GraphProto:
        nodes = [oh.make_node("MatMul", ["x", "w"], [f"h_{name}"]), oh.make_node(op, [f"h_{name}"], [f"y_{name}"])]
        return oh.make_graph(nodes, name, [], [oh.make_tensor_value_info(f"y_{name}", 1, ["s", N])])

    choose = oh.make_node("If", ["flag"], ["y"], then_branch=branch("then", "Relu"), else_branch=branch("else", "Neg"))
    nodes = [oh.make_node("Greater", ["ids", "zero"], ["flag"]), choose]
    proto = make_model(
        nodes, {"x": ["s", K], "ids": [1]}, {"y": ["s", N]}, {"w": weight(K, N), "zero": np.zeros(1, np.int64)}, opset
    )
    for flag in (0, 1):
        feeds = {"x": weight(3, K), "ids": np.array([flag])}
        model = check(proto, feeds, INT8_ACTIVATIONS if stock else FLOAT32_SUMMATION, stock)
        assert op_types(model).count("MatMulNBits" if stock else "LowBitMatMul") == 2
        assert len(model.graph.initializers) == 4


def test_what_cannot_be_rewritten_says_why() -> None:
    nodes = [oh.make_node("Foo", ["x"], ["h"], domain="other"), oh.make_node("MatMul", ["w", "h"], ["y"])]
    proto = make_model(nodes, {"x": [K, 3]}, {"y": [N, 3]}, {"w": weight(N, K)})
    proto.opset_import.append(oh.make_opsetid("other", 1))
    (found,) = find_weights(ir.from_proto(proto)).weights
    assert "no known rank" in (site_refusal(found.sites[0], found) or "")
