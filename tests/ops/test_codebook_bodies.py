"""The function body of CodebookMatMul against numpy: every width, window, grouping, zero point and opset."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxq import ops
from tests.custom_ops.codebook_reference import (
    CodebookWeight,
    codebook_model,
    column_group,
    random_codebook,
    relative_error,
)
from tests.ops.test_lowbit_bodies import run_stock

FLOAT32_SUMMATION = 2e-6
"""Largest error over the sum of |x| |level| scale that the order of float32 additions explains at these sizes."""
FORMATS = [(bits, window) for bits in range(1, 5) for window in sorted({bits, 4, 5, 6})]
SHAPES = [(20, 160), (33, 33), (100, 96)]
"""The kernels' test has all pairs of these sizes."""
OPSETS = [13, 17, 18, 21, 23, 25]


def body_model(weight: CodebookWeight, opset: int, bias: np.ndarray | None = None) -> onnx.ModelProto:
    model = codebook_model(weight, bias)
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["rows", weight.n])
    model.graph.output[0].CopyFrom(y)
    model.opset_import[0].version = opset
    model.ir_version = 10 if opset >= 21 else 8
    model.functions.extend(ir.to_proto(function) for function in ops.functions_for("CodebookMatMul", opset))
    return model


def check(weight: CodebookWeight, opset: int) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, weight.k)).astype(np.float32)
    bias = rng.standard_normal(weight.n).astype(np.float32)
    model = body_model(weight, opset, bias)
    onnx.checker.check_model(model, full_check=True)
    assert relative_error(run_stock(model, x), x, weight, bias) <= FLOAT32_SUMMATION


@pytest.mark.parametrize("shared_zero", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize(("bits", "window"), FORMATS)
def test_every_width_window_group_and_zero_point(
    bits: int, window: int, group_size: int | None, shared_zero: bool
) -> None:
    rng = np.random.default_rng(bits * 10 + window)
    for n, k in SHAPES:
        group = group_size or column_group(k)
        check(random_codebook(rng, n, k, bits, window, group, shared_zero=shared_zero, gain=0.25), 21)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(("bits", "window"), [*FORMATS, (1, 2), (1, 3), (2, 3)])
def test_every_opset(bits: int, window: int, opset: int) -> None:
    rng = np.random.default_rng(bits * 10 + window)
    check(random_codebook(rng, 100, 96, bits, window, 64, shared_zero=opset == 17, gain=0.5), opset)


@pytest.mark.parametrize("opset", [13, 21])
def test_bit_7_of_a_table_entry_is_ignored(opset: int) -> None:
    weight = random_codebook(np.random.default_rng(0), 33, 96, 2, 4, 32)
    model = body_model(weight, opset)
    table = next(tensor for tensor in model.graph.initializer if tensor.name == "table")
    table.CopyFrom(onnx.numpy_helper.from_array(weight.table | 128, "table"))
    x = np.random.default_rng(1).standard_normal((3, 96)).astype(np.float32)
    assert relative_error(run_stock(model, x), x, weight) <= FLOAT32_SUMMATION


@pytest.mark.parametrize("opset", [13, 21])
def test_the_reference_evaluator_runs_the_body(opset: int) -> None:
    """The second implementation of ONNX, with no optimiser in between."""
    from onnx.reference import ReferenceEvaluator

    weight = random_codebook(np.random.default_rng(0), 100, 96, 2, 6, 64, shared_zero=False)
    x = np.random.default_rng(1).standard_normal((2, 96)).astype(np.float32)
    (y,) = ReferenceEvaluator(body_model(weight, opset)).run(None, {"x": x})
    assert relative_error(y, x, weight) <= FLOAT32_SUMMATION


@pytest.mark.parametrize(("bits", "window"), FORMATS)
def test_stock_onnx_runtime_fuses_the_body_to_its_own_8_bit_product(bits: int, window: int, tmp_path) -> None:
    weight = random_codebook(np.random.default_rng(0), 64, 384, bits, window, 384)
    path = str(tmp_path / "optimized.onnx")
    run_stock(body_model(weight, 21), np.ones((1, 384), np.float32), path)
    optimized = onnx.load(path)
    assert [node.op_type for node in optimized.graph.node if node.op_type != "Add"] == ["MatMulNBits"]
