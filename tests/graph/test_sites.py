"""Which uses are sites, and that each site's matrix is the one its node multiplies by."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from onnxq.graph import Site, find_weights
from onnxq.graph.sites import find_constants
from onnxq.graph.ties import matrix_view
from tests.graph import models
from tests.graph.models import constant, floats, integers, node, weight

RUN_TOLERANCE = 1e-5  # float32 products of at most 32 terms, against another summation order


def _sites(proto: onnx.ModelProto) -> list[Site]:
    found = [site for c in find_constants(models.as_ir(proto)) for site in c.sites]
    return sorted(found, key=lambda site: site.order)


def _skipped(proto: onnx.ModelProto) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in find_weights(models.as_ir(proto)).skipped}


def _one_matmul(array: np.ndarray, x: list[int], y: list[int], left: bool = False, **chain: object) -> onnx.ModelProto:
    inputs = "w x" if left else "x w"
    return models.model([node("MatMul", inputs, "y", "fc")], [floats("x", x)], [floats("y", y)], {"w": array})


@pytest.mark.parametrize(
    ("shape", "x", "y", "batch"),
    [
        ((6, 4), [3, 6], [3, 4], 1),
        ((6, 4), [2, 5, 6], [2, 5, 4], 1),
        ((1, 6, 4), [2, 5, 6], [2, 5, 4], 1),
        ((1, 1, 6, 4), [5, 6], [1, 1, 5, 4], 1),
        ((3, 6, 4), [3, 5, 6], [3, 5, 4], 3),
        ((2, 3, 6, 4), [5, 6], [2, 3, 5, 4], 6),
        ((6, 1), [3, 6], [3, 1], 1),
    ],
)
def test_matmul_right(shape: tuple[int, ...], x: list[int], y: list[int], batch: int) -> None:
    proto = _one_matmul(weight(*shape), x, y)
    (site,) = _sites(proto)
    n, k = shape[-1], shape[-2]
    assert (site.kind, site.side, site.weight_input, site.name, site.scope) == (
        "linear",
        "right",
        1,
        "fc",
        "",
    )
    assert (site.batch, site.n, site.k, site.shape) == (batch, n, k, shape)
    assert site.input.name == "x"
    matrix = matrix_view(site).reshape(*shape[:-2], n, k)
    data = weight(*x, seed=1)
    expected = models.run(proto, {"x": data})[0]
    np.testing.assert_allclose(data @ matrix.swapaxes(-1, -2), expected, atol=RUN_TOLERANCE)


@pytest.mark.parametrize(("shape", "x", "batch"), [((4, 6), [2, 6, 5], 1), ((3, 4, 6), [3, 6, 5], 3)])
def test_matmul_left(shape: tuple[int, ...], x: list[int], batch: int) -> None:
    proto = _one_matmul(weight(*shape), x, [*x[:1], 4, 5], left=True)
    (site,) = _sites(proto)
    assert (site.side, site.weight_input, site.batch, site.n, site.k) == ("left", 0, batch, 4, 6)
    data = weight(*x, seed=1)
    matrix = matrix_view(site).reshape(shape)
    np.testing.assert_allclose(matrix @ data, models.run(proto, {"x": data})[0], atol=RUN_TOLERANCE)


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("left", [False, True])
def test_gemm(trans_a: int, trans_b: int, left: bool) -> None:
    m, k, n = 5, 6, 4
    a_shape = (k, m) if trans_a else (m, k)
    b_shape = (n, k) if trans_b else (k, n)
    stored, given = (a_shape, b_shape) if left else (b_shape, a_shape)
    proto = models.model(
        [node("Gemm", "w x" if left else "x w", "y", "fc", transA=trans_a, transB=trans_b, alpha=0.5)],
        [floats("x", given)],
        [floats("y", [m, n])],
        {"w": weight(*stored)},
    )
    (site,) = _sites(proto)
    assert site.side == ("left" if left else "right")
    assert (site.n, site.k) == ((m, k) if left else (n, k))
    data = weight(*given, seed=1)
    matrix = matrix_view(site)
    other = data.T if (trans_b if left else trans_a) else data
    expected = 0.5 * (matrix @ other if left else other @ matrix.T)
    np.testing.assert_allclose(models.run(proto, {"x": data})[0], expected, atol=RUN_TOLERANCE)


@pytest.mark.parametrize("axis", [0, -2])
def test_gather_rows(axis: int) -> None:
    proto = models.model(
        [node("Gather", "table ids", "y", "embed", axis=axis)],
        [integers("ids", [3])],
        [floats("y", [3, 4])],
        {"table": weight(10, 4)},
    )
    (site,) = _sites(proto)
    assert (site.kind, site.n, site.k, site.input.name) == ("table", 10, 4, "ids")
    np.testing.assert_array_equal(matrix_view(site), weight(10, 4))


@pytest.mark.parametrize(
    ("nodes", "shape"),
    [
        ([node("Transpose", "w", "v")], (4, 6)),
        ([node("Transpose", "w", "v", perm=[1, 0])], (4, 6)),
        ([node("Identity", "w", "a"), node("Transpose", "a", "v")], (4, 6)),
        ([node("Squeeze", "w axes", "v")], (1, 6, 4)),
        ([node("Squeeze", "w", "v")], (1, 6, 1, 4)),
        ([node("Unsqueeze", "w axes", "a"), node("Squeeze", "a axes", "v")], (6, 4)),
        ([node("Reshape", "w shape", "v")], (24,)),
        ([node("Reshape", "w shape", "v")], (2, 3, 4)),
        ([node("Reshape", "w keep", "v")], (6, 2, 2)),
        ([node("Identity", "shape", "s"), node("Reshape", "w s", "v")], (3, 8)),
        ([node("Transpose", "w", "a", perm=[1, 0, 2]), node("Reshape", "a shape", "v")], (3, 2, 4)),
        ([node("Cast", "w", "a", to=10), node("Cast", "a", "v", to=1)], (6, 4)),
    ],
)
@pytest.mark.parametrize("stored", ["initializer", "node"])
def test_chains(nodes: list[onnx.NodeProto], shape: tuple[int, ...], stored: str) -> None:
    array = np.round(weight(*shape), 1).astype(np.float16).astype(np.float32)
    initializers = {"axes": np.array([0]), "shape": np.array([6, -1]), "keep": np.array([0, 4])}
    nodes = [*nodes, node("MatMul", "x v", "y", "fc")]
    if stored == "node":
        nodes = [constant("w", array), *nodes]
    else:
        initializers["w"] = array
    proto = models.model(nodes, [floats("x", [3, 6])], [floats("y", [3, 4])], initializers)
    (site,) = _sites(proto)
    assert [n.op_type for n in site.chain] == [n.op_type for n in nodes if n.input and n.input[0] in "wa"]
    assert site.root.name == "w"
    data = weight(3, 6, seed=1)
    np.testing.assert_allclose(data @ matrix_view(site).T, models.run(proto, {"x": data})[0], atol=RUN_TOLERANCE)


def test_half_precision_behind_a_cast() -> None:
    proto = models.model(
        [node("Cast", "w", "v", to=1), node("MatMul", "x v", "y", "fc")],
        [floats("x", [3, 6])],
        [floats("y", [3, 4])],
        {"w": weight(6, 4, dtype=np.float16)},
    )
    (found,) = find_weights(models.as_ir(proto)).weights
    assert found.dtype == ir.DataType.FLOAT16
    assert found.sites[0].dtype == ir.DataType.FLOAT
    np.testing.assert_array_equal(found.matrix(), weight(6, 4, dtype=np.float16).T.astype(np.float32))


def test_merged_decoder() -> None:
    sites = _sites(models.merged_decoder())
    first, second = sites[:3], sites[3:]
    assert {s.scope for s in first} | {s.scope for s in second} == {
        "/optimum::if.then_branch",
        "/optimum::if.else_branch",
    }
    assert [(s.kind, s.name) for s in first] == [
        ("table", "/decoder/embed/Gather"),
        ("linear", "/decoder/q_proj/MatMul"),
        ("linear", "/lm_head/MatMul"),
    ]
    assert [s.name for s in second] == [s.name + "#2" for s in first]
    assert len({s.graph for s in sites}) == 2
    assert len({s.name for s in sites}) == len(sites) == 6
    assert all(s.graph is not s.root.graph for s in sites)


def test_loop_body() -> None:
    sites = _sites(models.loop())
    assert [(s.root.name, s.scope) for s in sites] == [("W_outer", "/loop.body"), ("V_inner", "/loop.body")]
    assert all(s.input.name == "state" for s in sites)


def test_function_body() -> None:
    proto = models.function_body()
    (site,) = _sites(proto)
    assert (site.name, site.scope, site.root.name) == ("/block/proj/MatMul", "local::Block", "inner")
    assert isinstance(site.graph, ir.Function)
    assert _skipped(proto) == {
        "given": "passed to the model-local function local::Block 'call_0': inline functions first; "
        "passed to the model-local function local::Block 'call_1': inline functions first"
    }


def test_transposition_from_a_function_attribute() -> None:
    gemm = node("Gemm", "a inner", "r", "fc")
    gemm.attribute.append(onnx.AttributeProto(name="transB", type=onnx.AttributeProto.INT, ref_attr_name="t"))
    function = helper.make_function(
        "local",
        "F",
        ["a"],
        ["r"],
        [constant("inner", weight(4, 4)), gemm],
        [helper.make_opsetid("", 21)],
        ["t"],
    )
    proto = models.model(
        [node("F", "x", "y", "call", "local", t=1)], [floats("x", [2, 4])], [floats("y", [2, 4])],
        functions=[function], domains=["local"],
    )  # fmt: skip
    assert _sites(proto) == []
    assert "transposition from its function's caller" in _skipped(proto)["inner"]


_PICKED = constant("i", np.array([1]))

# What is asked: nodes, shape of x, the constant w, what the reason says of it.
REFUSED: dict[str, tuple[list[onnx.NodeProto], list[int], np.ndarray, str]] = {
    "a bias": ([node("Add", "x w", "y")], [2, 4], weight(4), "rank 1: bias or norm parameter"),
    "a broadcast matrix": ([node("Mul", "x w", "y", "scale")], [2, 4], weight(2, 4), "used by Mul 'scale'"),
    "Gemm's bias": (
        [node("Gemm", "x x w", "y", "g", transB=1)],
        [2, 4],
        weight(2, 2),
        "bias of Gemm 'g'",
    ),
    "a vector operand": (
        [node("MatMul", "x w", "y", "m")],
        [2, 4],
        weight(4),
        "rank 1: a vector operand of MatMul 'm'",
    ),
    "an outer product": ([node("MatMul", "x w", "y", "rope")], [2, 1], weight(1, 4), "'rope' has K = 1"),
    "two constants": (
        [
            constant("c", weight(4, 4, seed=1)),
            node("Identity", "c", "d"),
            node("MatMul", "w d", "m", "mm"),
            node("Add", "x m", "y"),
        ],
        [4, 4],
        weight(4, 4),
        "both operands of MatMul 'mm' are constant",
    ),
    "columns": (
        [_PICKED, node("Gather", "w i", "g", "pick", axis=1), node("Add", "x g", "y")],
        [4, 1],
        weight(4, 4),
        "'pick' picks columns",
    ),
    "deep table": (
        [_PICKED, node("Gather", "w i", "g", "pick"), node("Add", "x g", "y")],
        [1, 4, 4],
        weight(3, 4, 4),
        "rank 3: Gather 'pick'",
    ),
    "a convolution": (
        [node("Conv", "x w", "y", "conv")],
        [1, 2, 8],
        weight(3, 2, 3),
        "used by Conv 'conv'",
    ),
    "a computed shape": (
        [node("Shape", "x", "s"), node("Reshape", "w s", "v", "r"), node("MatMul", "x v", "y")],
        [4, 4],
        weight(16),
        "Reshape 'r' has a computed shape",
    ),
    "a cast to integers": (
        [node("Cast", "w", "i", "c", to=7), node("Cast", "i", "v", to=1), node("MatMul", "x v", "y")],
        [4, 4],
        weight(4, 4),
        "Cast 'c' turns it from FLOAT to INT64",
    ),
    "fused": (
        [node("FusedMatMul", "x w", "y", "f", "com.microsoft")],
        [4, 4],
        weight(4, 4),
        "com.microsoft::FusedMatMul 'f', fused",
    ),
    "nothing": ([node("Relu", "x", "y")], [4, 4], weight(4, 4), "unused: nothing reads it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_why(case: str) -> None:
    nodes, x, array, reason = REFUSED[case]
    domains = ["com.microsoft"] if "fused" in case else []
    proto = models.model(nodes, [floats("x", x)], [floats("y", [])], {"w": array}, domains=domains)
    report = find_weights(ir.from_proto(proto))
    assert report.weights == []
    (entry,) = [s for s in report.skipped if s.name == "w"]
    assert reason in entry.reason
    assert (entry.shape, entry.dtype, entry.bytes) == (array.shape, ir.DataType.FLOAT, array.nbytes)


def test_an_initializer_that_is_an_input_is_no_constant() -> None:
    proto = _one_matmul(weight(4, 4), [2, 4], [2, 4])
    proto.graph.input.append(floats("w", [4, 4]))
    assert "which a caller may replace" in _skipped(proto)["w"]


def test_graph_output() -> None:
    proto = models.model(
        [node("Relu", "x", "y")],
        [floats("x", [2])],
        [floats("y", [2]), floats("w", [4, 4])],
        {"w": weight(4, 4)},
    )
    assert _skipped(proto) == {"w": "graph output"}


def test_dequantised_weights_are_listed() -> None:
    proto = models.model(
        [
            node("DequantizeLinear", "codes scale zero", "w", "dq", axis=1),
            node("MatMul", "x w", "y", "fc"),
            node("QuantizeLinear", "f s0", "q", "quant"),
            node("DequantizeLinear", "q s0", "g"),
            node("MatMul", "y g", "z", "fc2"),
        ],
        [floats("x", [2, 4])],
        [floats("z", [2, 4])],
        {
            "codes": np.ones((4, 4), np.int8),
            "scale": weight(4),
            "zero": np.zeros(4, np.int8),
            "f": weight(4, 4),
            "s0": np.array(1, np.float32),
        },
    )
    assert _sites(proto) == []
    assert _skipped(proto) == {
        "codes": "already quantised (DequantizeLinear 'dq')",
        "scale": "scale of DequantizeLinear 'dq'",
        "zero": "zero point of DequantizeLinear 'dq'",
        "f": "already quantised (QuantizeLinear 'quant')",
    }


def test_integer_weight() -> None:
    data = helper.make_tensor_value_info("x", onnx.TensorProto.INT32, [2, 16])
    out = helper.make_tensor_value_info("y", onnx.TensorProto.INT32, [2, 32])
    proto = models.model([node("MatMul", "x w", "y", "fc")], [data], [out], {"w": np.ones((16, 32), np.int32)})
    assert "INT32: only float32, float16, bfloat16 and double weights are encoded" in _skipped(proto)["w"]
    assert _sites(proto) == []


def test_small_integers_and_scalars_are_not_listed() -> None:
    proto = models.model(
        [node("Reshape", "x shape", "a"), node("Mul", "a half", "y")],
        [floats("x", [4, 4])],
        [floats("y", [2, 8])],
        {"shape": np.array([2, 8]), "half": np.array(0.5, np.float32)},
    )
    assert _skipped(proto) == {}


def test_large_masks_are_listed() -> None:
    out = helper.make_tensor_value_info("y", onnx.TensorProto.BOOL, [40, 40])
    proto = models.model([node("Not", "mask", "y", "not")], [], [out], {"mask": np.ones((40, 40), bool)})
    assert _skipped(proto) == {"mask": "BOOL: not a float weight (used by Not 'not')"}


def test_nodes_cut_out_of_the_graph_do_not_count() -> None:
    model = models.as_ir(models.mlp())
    gemm = model.graph.node("/layers.0/fc2/Gemm")
    hidden = gemm.inputs[0]
    assert hidden is not None
    model.graph.outputs[0] = hidden
    model.graph.remove(gemm)
    report = find_weights(model)
    assert [w.name for w in report.weights] == ["layers.0.fc1"]
    assert {s.name: s.reason for s in report.skipped}["layers.0.fc2.weight"] == "unused: nothing reads it"
