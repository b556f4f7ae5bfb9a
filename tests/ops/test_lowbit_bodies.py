"""The function bodies against numpy: every width, grouping, zero point and opset, ragged shapes included."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxq import ops
from onnxq.errors import ModelError
from onnxq.formats.uniform import UniformEncoding, UniformFormat, ZeroPoint
from tests.encodings import random_encoding, relative_error

FLOAT32_SUMMATION = 2e-6
"""Largest relative difference that the order of float32 additions explains at the sizes used here."""
SHAPES = [(64, 128), (45, 100), (1, 33)]
OPSETS = [13, 17, 18, 21, 23, 25]


def body_model(op_type: str, encoding: UniformEncoding, opset: int, bias: np.ndarray | None = None) -> onnx.ModelProto:
    n, k = encoding.shape
    packed = encoding.pack()
    arrays = {"packed": packed.packed, "scales": packed.scales, "zero_points": packed.zero_points}
    if op_type == "LowBitMatMul":
        arrays["bias"] = np.zeros(1, np.float32) if bias is None else bias
        x = oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", "rows", k])
    else:
        x = oh.make_tensor_value_info("x", onnx.TensorProto.INT64, ["batch", "rows"])
    node = oh.make_node(
        op_type, ["x", *arrays], ["y"], domain=ops.DOMAIN, K=k, N=n, bits=encoding.format.bits,
        group_size=encoding.format.effective_group(k), gain=encoding.gain,
    )  # fmt: skip
    y = oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", "rows", n if "bias" in arrays else k])
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    return oh.make_model(
        oh.make_graph([node], "body", [x], [y], initializers),
        opset_imports=[oh.make_opsetid("", opset), oh.make_opsetid(ops.DOMAIN, 1)],
        functions=[ir.to_proto(function) for function in ops.functions_for(op_type, opset)],
        ir_version=10 if opset >= 21 else 8,
    )


def run_stock(model: onnx.ModelProto, feed: np.ndarray, optimized: str | None = None) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # 1: float32 activations, so that the body is compared and not ONNX Runtime's int8 rounding of activations.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if optimized is not None:
        options.optimized_model_filepath = optimized
    return ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": feed})[0]


def check_matmul(encoding: UniformEncoding, opset: int) -> None:
    rng = np.random.default_rng(1)
    n, k = encoding.shape
    x = rng.standard_normal((2, 3, k)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    model = body_model("LowBitMatMul", encoding, opset, bias)
    onnx.checker.check_model(model, full_check=True)
    expected = x @ encoding.dequantize().T + bias
    assert relative_error(run_stock(model, x), expected) <= FLOAT32_SUMMATION


def check_gather(encoding: UniformEncoding, opset: int) -> None:
    n, _ = encoding.shape
    indices = np.random.default_rng(1).integers(-n, n, (2, 5))
    model = body_model("LowBitGather", encoding, opset)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(run_stock(model, indices), encoding.dequantize()[indices])


@pytest.mark.parametrize("zero_point", list(ZeroPoint))
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_group_and_zero_point(bits: int, group_size: int | None, zero_point: ZeroPoint) -> None:
    for n, k in SHAPES:
        encoding = random_encoding(UniformFormat(bits, group_size, zero_point), n, k)
        check_matmul(encoding, 21)
        check_gather(encoding, 21)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_opset(bits: int, opset: int) -> None:
    encoding = random_encoding(UniformFormat(bits, 64, ZeroPoint.PER_GROUP), 45, 100)
    check_matmul(encoding, opset)
    check_gather(encoding, opset)


def test_the_reference_evaluator_runs_the_body() -> None:
    """The second implementation of ONNX, with no optimiser in between."""
    from onnx.reference import ReferenceEvaluator

    encoding = random_encoding(UniformFormat(3, 64, ZeroPoint.PER_GROUP), 45, 100)
    x = np.random.default_rng(1).standard_normal((1, 2, 100)).astype(np.float32)
    (y,) = ReferenceEvaluator(body_model("LowBitMatMul", encoding, 21)).run(None, {"x": x})
    assert relative_error(y, x @ encoding.dequantize().T) <= FLOAT32_SUMMATION


@pytest.mark.parametrize("bits", range(1, 9))
def test_stock_onnx_runtime_fuses_the_body_to_its_own_8_bit_product(bits: int, tmp_path) -> None:
    encoding = random_encoding(UniformFormat(bits, None, ZeroPoint.PER_GROUP), 64, 384)
    path = str(tmp_path / "optimized.onnx")
    run_stock(body_model("LowBitMatMul", encoding, 21), np.ones((1, 1, 384), np.float32), path)
    optimized = onnx.load(path)
    assert [node.op_type for node in optimized.graph.node if node.op_type != "Add"] == ["MatMulNBits"]


def test_an_opset_too_old_is_refused_with_the_way_out() -> None:
    with pytest.raises(ModelError, match=r"opset 12 is too old.*onnxq export --opset 21"):
        ops.functions_for("LowBitMatMul", 12)
