"""The function bodies of the float8 ops against numpy: kinds, groups, opsets, ragged shapes, all codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import pytest

from onnxq import ops
from onnxq.errors import ModelError
from onnxq.formats.float8 import Float8Format, Float8Kind
from tests.encodings import random_float8, relative_error
from tests.ops.test_lowbit_bodies import run_stock

FLOAT32_SUMMATION = 2e-6
"""Largest relative difference that the order of float32 additions explains at the sizes used here."""
SHAPES = [(64, 128), (45, 100), (1, 33)]
OPSETS = [13, 17, 19, 21, 25]
GROUPS = [32, 64, None]
KINDS = list(Float8Kind)


def body_model(op_type: str, inputs: dict[str, list], arrays: dict[str, np.ndarray], y: list, opset: int, **attributes):
    """A model of one node: inputs and y by shape, arrays as initializers."""
    integer = op_type == "Float8Gather"
    kind = onnx.TensorProto.INT64 if integer else onnx.TensorProto.FLOAT
    node = oh.make_node(op_type, [*inputs, *arrays], ["y"], domain=ops.DOMAIN, **attributes)
    graph = oh.make_graph(
        [node],
        "body",
        [oh.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, y)],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = oh.make_model(
        graph,
        opset_imports=[oh.make_opsetid("", opset), oh.make_opsetid(ops.DOMAIN, 1)],
        functions=[ir.to_proto(function) for function in ops.functions_for(op_type, opset)],
        ir_version=10 if opset >= 21 else 8,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def weight_model(op_type: str, encoding, opset: int, bias: np.ndarray | None = None) -> onnx.ModelProto:
    n, k = encoding.shape
    kind = encoding.format.kind
    arrays = {"codes": encoding.codes, "scales": encoding.scales}
    if op_type == "Float8MatMul":
        arrays["bias"] = np.zeros(1, np.float32) if bias is None else bias
    return body_model(
        op_type, {"x": ["b", "s", k] if "bias" in arrays else ["b", "s"]}, arrays,
        ["b", "s", n if "bias" in arrays else k], opset, K=k, N=n, mantissa_bits=kind.mantissa_bits,
        exponent_bias=kind.bias, group_size=encoding.format.effective_group(k), gain=encoding.gain,
    )  # fmt: skip


def round_model(op_type: str, kind: Float8Kind, opset: int, scale: np.ndarray | None = None, rank: int = 1):
    arrays = {} if scale is None else {"scale": scale}
    shape = [*"abc"[:rank]]
    attributes = {"mantissa_bits": kind.mantissa_bits, "exponent_bias": kind.bias}
    return body_model(op_type, {"x": shape}, arrays, shape, opset, **attributes)


def check_matmul(encoding, opset: int) -> None:
    rng = np.random.default_rng(1)
    n, k = encoding.shape
    x, bias = rng.standard_normal((2, 3, k)).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    expected = x @ encoding.dequantize().T + bias
    got = run_stock(weight_model("Float8MatMul", encoding, opset, bias), x)
    assert relative_error(got, expected) <= FLOAT32_SUMMATION


def check_gather(encoding, opset: int) -> None:
    n, _ = encoding.shape
    indices = np.random.default_rng(1).integers(-n, n, (2, 5))
    got = run_stock(weight_model("Float8Gather", encoding, opset), indices)
    np.testing.assert_array_equal(got, encoding.dequantize()[indices])


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_group_and_shape(kind: Float8Kind, group_size: int | None) -> None:
    for n, k in SHAPES:
        encoding = random_float8(Float8Format(kind, group_size), n, k)
        check_matmul(encoding, 21)
        check_gather(encoding, 21)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("format", [Float8Format(group_size=32), Float8Format(Float8Kind.E5M2, one_scale=True)])
def test_every_opset(format: Float8Format, opset: int) -> None:
    encoding = random_float8(format, 45, 100)
    check_matmul(encoding, opset)
    check_gather(encoding, opset)


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("kind", KINDS)
def test_all_codes_follow_the_formula(kind: Float8Kind, opset: int) -> None:
    """Those that the types give to infinity and NaN too."""
    arrays = {"codes": np.arange(256, dtype=np.uint8).reshape(256, 1), "scales": np.full((1, 1), 0.5, np.float16)}
    sizes = {"K": 1, "N": 256, "group_size": 1, "mantissa_bits": kind.mantissa_bits, "exponent_bias": kind.bias}
    table = body_model("Float8Gather", {"x": ["s"]}, arrays, ["s", 1], opset, gain=4.0, **sizes)
    np.testing.assert_array_equal(run_stock(table, np.arange(256))[:, 0], 2 * kind.values())
    product = body_model(
        "Float8MatMul", {"x": ["s", 1]}, {**arrays, "bias": np.zeros(1, np.float32)}, ["s", 256], opset, **sizes
    )
    np.testing.assert_array_equal(run_stock(product, np.full((1, 1), 2, np.float32))[0], kind.values())


def neighbours(values: np.ndarray) -> np.ndarray:
    """Values, the float32 numbers next to each, and all that with the other sign."""
    values = values.astype(np.float32)
    down, up = np.nextafter(values, np.float32(-np.inf)), np.nextafter(values, np.float32(np.inf))
    around = np.concatenate([values, down, up])
    return np.concatenate([around, -around])


def hard_cases(kind: Float8Kind) -> np.ndarray:
    """All values, all midpoints, what is too large, subnormals of both types, infinity, and the neighbours of each."""
    values = np.sort(kind.values()[:128])
    values = values[values <= kind.largest]
    beyond = kind.largest * np.array([1, 1.01, 1.03, 1.07, 1.1, 2, 1e4])
    tiny = np.array([0, 1e-45, 1e-40, 1.2e-38, 1e-20])
    found = np.concatenate([values, (values[:-1] + values[1:]) / 2, beyond, tiny])
    return np.concatenate([neighbours(found), np.array([np.inf, -np.inf, 3e38, -3e38], np.float32)])


def rounded(x: np.ndarray, scale: np.ndarray, kind: Float8Kind) -> np.ndarray:
    """What ml_dtypes makes of it."""
    limited = np.clip(x / scale, -kind.largest, kind.largest)
    return limited.astype(kind.dtype).astype(np.float32) * scale


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_rounded_to_the_nearest_value(kind: Float8Kind, opset: int) -> None:
    x = hard_cases(kind)
    one = np.array(1, np.float32)
    np.testing.assert_array_equal(run_stock(round_model("Float8Round", kind, opset, one), x), rounded(x, one, kind))


@pytest.mark.parametrize("shape", [(), (1,)], ids=len)
@pytest.mark.parametrize("scale", [0.37, 2.0**-8, 3e-9, 1e6])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_divides_and_multiplies_in_float32(kind: Float8Kind, scale: float, shape: tuple[int, ...]) -> None:
    step = np.full(shape, scale, np.float32)
    x = (np.random.default_rng(0).standard_normal((4, 500)) * 30 * scale).astype(np.float32)
    got = run_stock(round_model("Float8Round", kind, 17, step, rank=2), x)
    np.testing.assert_array_equal(got, rounded(x, step, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays(kind: Float8Kind) -> None:
    x = np.array([1, np.nan, -2], np.float32)
    got = run_stock(round_model("Float8Round", kind, 21, np.array(1, np.float32)), x)
    np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_have_scales_of_their_own(kind: Float8Kind, opset: int) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2, 5, 33)) * np.exp(5 * rng.standard_normal((2, 5, 1)))).astype(np.float32)
    x[0, 1] = 0
    x[1, 2] = 1e-45  # less than a step: its scale is no float32 number above 0
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(kind.largest)
    got = run_stock(round_model("Float8RoundTokens", kind, opset, rank=3), x)
    np.testing.assert_array_equal(got, rounded(x, np.where(scale == 0, np.float32(1), scale), kind))


def test_no_token_at_all() -> None:
    got = run_stock(round_model("Float8RoundTokens", Float8Kind.E5M2, 21, rank=2), np.zeros((0, 8), np.float32))
    assert got.shape == (0, 8)


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_evaluator_runs_the_bodies(kind: Float8Kind, opset: int) -> None:
    """The second implementation of ONNX, with no optimiser in between."""
    from onnx.reference import ReferenceEvaluator

    encoding = random_float8(Float8Format(kind, 32), 45, 100)
    x = np.random.default_rng(1).standard_normal((1, 2, 100)).astype(np.float32)
    (y,) = ReferenceEvaluator(weight_model("Float8MatMul", encoding, opset)).run(None, {"x": x})
    assert relative_error(y, x @ encoding.dequantize().T) <= FLOAT32_SUMMATION
    indices = np.array([[0, 44, -1]])
    (y,) = ReferenceEvaluator(weight_model("Float8Gather", encoding, opset)).run(None, {"x": indices})
    np.testing.assert_array_equal(y, encoding.dequantize()[indices])
    scale, hard = np.array(0.5, np.float32), hard_cases(kind)
    with np.errstate(over="ignore"):
        (y,) = ReferenceEvaluator(round_model("Float8Round", kind, opset, scale)).run(None, {"x": hard})
        np.testing.assert_array_equal(y, rounded(hard, scale, kind))
    tokens = x[0] * np.float32([[1], [100]])
    (y,) = ReferenceEvaluator(round_model("Float8RoundTokens", kind, opset, rank=2)).run(None, {"x": tokens})
    scale = np.abs(tokens).max(axis=-1, keepdims=True) / np.float32(kind.largest)
    np.testing.assert_array_equal(y, rounded(tokens, scale, kind))


def optimized(model: onnx.ModelProto, feed: np.ndarray, path: Path) -> onnx.GraphProto:
    run_stock(model, feed, str(path))
    return onnx.load(path).graph


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("format", [Float8Format(group_size=32), Float8Format(one_scale=True)])
def test_stock_onnx_runtime_folds_the_weight(format: Float8Format, opset: int, tmp_path: Path) -> None:
    """A DequantizeLinear would stay, and decode it again at every call."""
    encoding = random_float8(format, 64, 128)
    x = np.zeros((1, 1, 128), np.float32)
    graph = optimized(weight_model("Float8MatMul", encoding, opset), x, tmp_path / "optimized.onnx")
    assert [node.op_type for node in graph.node] == ["MatMul", "Add"]
    assert {tensor.name: list(tensor.dims) for tensor in graph.initializer}[graph.node[0].input[1]] == [128, 64]


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("format", [Float8Format(group_size=32), Float8Format(one_scale=True)])
def test_a_table_stays_bytes_of_which_rows_are_decoded(format: Float8Format, opset: int, tmp_path: Path) -> None:
    encoding = random_float8(format, 300, 128)
    graph = optimized(weight_model("Float8Gather", encoding, opset), np.array([[0]]), tmp_path / "optimized.onnx")
    large = {tensor.name: tensor for tensor in graph.initializer if np.prod(tensor.dims) >= 300 * 128}
    (codes,) = large.values()
    assert codes.data_type == onnx.TensorProto.UINT8
    assert [node.op_type for node in graph.node for name in node.input if name == codes.name] == ["Gather"]
    held = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer)
    assert held <= 300 * 128 + 4 * 300 * 4 + 4 * 256 + 8 * 128 + 64  # codes, scales, values, groups


@pytest.mark.parametrize("op_type", [name for name in ops.op_types() if name.startswith("Float8")])
def test_an_opset_that_is_too_old_is_refused(op_type: str) -> None:
    with pytest.raises(ModelError, match=f"opset 12 is too old: {op_type} needs opset 13.*--opset 21"):
        ops.functions_for(op_type, 12)


@pytest.mark.parametrize("opset", [17, 21])
def test_the_bodies_go_with_other_bodies_in_one_model(opset: int) -> None:
    """No function of one name and another meaning."""
    bodies: dict[str, set[bytes]] = {}
    for op_type in ops.op_types():
        for function in ops.functions_for(op_type, opset):
            bodies.setdefault(function.name, set()).add(ir.to_proto(function).SerializeToString(deterministic=True))
    ours = {name for op_type in ops.op_types() if op_type.startswith("Float8") for name in ops.body_names(op_type)}
    assert all(len(bodies[name]) == 1 for name in ours)
