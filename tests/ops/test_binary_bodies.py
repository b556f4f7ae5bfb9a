"""The function bodies of BinaryCodeMatMul and MixedBitGather against numpy: planes, groups, orders and opsets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxq import ops
from onnxq.formats.binary import BinaryEncoding, BinaryFormat
from tests.custom_ops.binary_reference import BinaryWeight, binary_model, gather_model, random_binary, relative_error
from tests.ops.test_lowbit_bodies import run_stock

FLOAT32_SUMMATION = 2e-6
"""Largest error over the sum of |x| times the largest weight that the order of float32 additions explains here."""
FLOAT32 = 1e-6
"""Largest error of a decoded weight: a sum of seven numbers up to 1."""
PLANES = {
    **{f"{planes} of all rows": (70,) * planes for planes in range(1, 7)},
    "nested": (150, 101, 64, 63, 2),
    "few rows": (3, 1, 1),
    "one row": (1,),
}
COLUMNS = [(100, None), (33, None), (128, 32), (100, 64), (3, None)]
OPSETS = [13, 17, 18, 21, 23, 25]


def with_body(model: onnx.ModelProto, opset: int, y: list[int | str] | None = None) -> onnx.ModelProto:
    op_type = next(node.op_type for node in model.graph.node)
    if y is not None:
        model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, y))
    model.opset_import[0].version = opset
    model.ir_version = 10 if opset >= 21 else 8
    model.functions.extend(ir.to_proto(function) for function in ops.functions_for(op_type, opset))
    return model


def matmul(weight: BinaryWeight, opset: int = 21, bias: np.ndarray | None = None, rank: int = 2, **changes):
    lead = ["b", "s"][2 - (rank - 1) :]
    model = binary_model(weight, bias, x_shape=[*lead, weight.k], **changes)
    return with_body(model, opset, [*lead, weight.n])


def random_x(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def check(weight: BinaryWeight, opset: int = 21) -> None:
    rng = np.random.default_rng(2)
    x, bias = random_x(3, weight.k), rng.standard_normal(weight.n).astype(np.float32)
    model = matmul(weight, opset, bias)
    onnx.checker.check_model(model, full_check=True)
    assert relative_error(run_stock(model, x), x, weight, bias) <= FLOAT32_SUMMATION

    indices = rng.integers(-weight.n, weight.n, (2, 5))
    model = with_body(gather_model(weight), opset)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(run_stock(model, indices), weight.dequantize()[indices], atol=FLOAT32)


@pytest.mark.parametrize("ordered", [False, True], ids=["natural", "ordered"])
@pytest.mark.parametrize("offset", [False, True], ids=["", "offset"])
@pytest.mark.parametrize(("k", "group_size"), COLUMNS)
@pytest.mark.parametrize("planes", PLANES.values(), ids=PLANES)
def test_planes_groups_offsets_and_orders(
    planes: tuple[int, ...], k: int, group_size: int | None, offset: bool, ordered: bool
) -> None:
    rng = np.random.default_rng(k)
    check(random_binary(rng, planes, k, group_size, offset=offset, ordered=ordered, gain=0.25))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("group_size", [None, 64])
def test_every_opset(group_size: int | None, opset: int) -> None:
    rng = np.random.default_rng(opset)
    check(random_binary(rng, (150, 70, 20), 100, group_size, offset=group_size is None, ordered=True, gain=2.0), opset)


@pytest.mark.parametrize("shape", [(100,), (0, 100), (2, 3, 100)], ids=len)
def test_products_of_any_rank_and_no_row(shape: tuple[int, ...]) -> None:
    weight, x = random_binary(np.random.default_rng(0), (70, 5), 100), random_x(*shape)
    y = run_stock(matmul(weight, rank=len(shape)), x)
    assert y.shape == (*shape[:-1], 70)
    assert relative_error(y.reshape(-1, 70), x.reshape(-1, 100), weight) <= FLOAT32_SUMMATION


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 0, 3), (2, 3, 2)], ids=str)
def test_look_ups_of_any_rank_and_none(shape: tuple[int, ...], dtype: type) -> None:
    weight = random_binary(np.random.default_rng(0), (70, 5), 100, 64, offset=True, ordered=True)
    indices = np.random.default_rng(1).integers(-70, 70, shape).astype(dtype)
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    names: list[int | str] = [f"d{axis}" for axis in range(len(shape))]
    rows = run_stock(with_body(gather_model(weight, kind, shape=names), 21), indices)
    assert rows.shape == (*shape, 100)
    np.testing.assert_allclose(rows, weight.dequantize()[indices], atol=FLOAT32)


@pytest.mark.parametrize("opset", [13, 21])
def test_the_reference_evaluator_runs_the_bodies(opset: int) -> None:
    """The second implementation of ONNX, with no optimiser in between."""
    from onnx.reference import ReferenceEvaluator

    weight = random_binary(np.random.default_rng(0), (150, 70, 20), 100, 64, offset=True, ordered=True)
    x, indices = random_x(2, 100), np.random.default_rng(1).integers(0, 150, (2, 3))
    (y,) = ReferenceEvaluator(matmul(weight, opset)).run(None, {"x": x})
    assert relative_error(y, x, weight) <= FLOAT32_SUMMATION
    (rows,) = ReferenceEvaluator(with_body(gather_model(weight), opset)).run(None, {"x": indices})
    np.testing.assert_allclose(rows, weight.dequantize()[indices], atol=FLOAT32)


def test_a_looked_up_row_is_the_dequantised_one_to_the_bit() -> None:
    weight = random_binary(np.random.default_rng(0), (150, 70, 20), 100, 64, offset=True, ordered=True, gain=4.0)
    format = BinaryFormat(weight.plane_rows, 64, offset=True, ordered=True)
    encoding = BinaryEncoding(format, weight.bits, weight.scales, weight.offsets, weight.order, weight.gain)
    rows = run_stock(with_body(gather_model(weight), 21), np.arange(150)[None])[0]
    np.testing.assert_array_equal(rows, encoding.dequantize())


def test_what_is_stored_and_does_not_count() -> None:
    """Bits, scales and offsets of rows and inputs that are not there."""
    weight = random_binary(np.random.default_rng(0), (70, 5), 33, offset=True)
    arrays, x = weight.pack(), random_x(3, 33)
    codes, scales, offsets = (arrays[name].copy() for name in ("codes", "scales", "offsets"))
    planes = codes[: 2 * 16 * 32].reshape(2, 16, 32), codes[2 * 16 * 32 :].reshape(1, 16, 32)
    planes[0][1, :, 6:] = planes[1][0, :, 5:] = 255
    planes[0][:, 9:] = 255
    planes[0][0, 8] |= 0xEE
    scales[70:128] = scales[128 + 5 :] = offsets[1, :, 6:] = np.nan
    replaced = {"codes": codes, "scales": scales, "offsets": offsets}
    np.testing.assert_array_equal(run_stock(matmul(weight, replace=replaced), x), run_stock(matmul(weight), x))


@pytest.mark.parametrize("opset", [13, 21])
def test_stock_onnx_runtime_folds_the_weight_and_leaves_the_inputs_alone(opset: int, tmp_path: Path) -> None:
    weight = random_binary(np.random.default_rng(0), (64, 64), 128, ordered=True)
    path = tmp_path / "optimized.onnx"
    run_stock(matmul(weight, opset), random_x(1, 128), str(path))
    optimized = onnx.load(path).graph
    assert [node.op_type for node in optimized.node] == ["MatMul", "Add"]
    assert {tensor.name: list(tensor.dims) for tensor in optimized.initializer}[optimized.node[0].input[1]] == [128, 64]


@pytest.mark.parametrize("opset", [13, 21])
def test_a_look_up_decodes_the_rows_it_reads_and_no_other(opset: int, tmp_path: Path) -> None:
    """Codes stay bytes, and no constant is as large as a decoded table."""
    weight = random_binary(np.random.default_rng(0), (1024, 512), 128, offset=True, ordered=True)
    path = tmp_path / "optimized.onnx"
    run_stock(with_body(gather_model(weight), opset), np.zeros((1, 1), np.int64), str(path))
    sizes = [np.prod(tensor.dims) for tensor in onnx.load(path).graph.initializer]
    assert max(sizes) == 1024 * 128 * 1.5 / 8
    assert sum(sizes) < 1.5 * max(sizes)


@pytest.mark.parametrize("opset", [17, 21])
def test_the_bodies_go_with_others_in_one_model(opset: int) -> None:
    """No function of one name and another meaning."""
    bodies: dict[str, set[bytes]] = {}
    for op_type in ops.op_types():
        for function in ops.functions_for(op_type, opset):
            bodies.setdefault(function.name, set()).add(ir.to_proto(function).SerializeToString(deterministic=True))
    for op_type in ("BinaryCodeMatMul", "MixedBitGather"):
        assert all(len(bodies[name]) == 1 for name in ops.body_names(op_type))
