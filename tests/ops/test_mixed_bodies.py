"""The function body of MixedBitMatMul against numpy: every depth, band and opset, ragged shapes included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxq import ops
from onnxq.formats.mixed import DEEPEST, TABLE_DEPTHS, WINDOW, table_of, window_of, zero_of
from onnxq.ops import mixed
from tests.custom_ops.mixed_reference import MixedWeight, mixed_model, random_mixed, relative_error
from tests.ops.test_lowbit_bodies import run_stock

FLOAT32_SUMMATION = 2e-6
"""Largest error over the sum of |x| |largest level| scale that the order of float32 additions explains here."""
SHAPES = [(64, 128, 32), (45, 100, 32), (100, 96, 64), (200, 33, 96), (1, 1, 32), (33, 40, 4096)]
DEPTHS = {"all": range(DEEPEST + 1), "none": [0], **{str(depth): [depth] for depth in range(1, DEEPEST + 1)}}
OPSETS = [13, 17, 18, 21, 23, 25]


def body_model(
    weight: MixedWeight, opset: int, bias: np.ndarray | None = None, rank: int = 2, **changes
) -> onnx.ModelProto:
    lead = ["b", "s"][2 - (rank - 1) :]
    model = mixed_model(weight, bias, x_shape=[*lead, weight.k], **changes)
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [*lead, weight.n])
    model.graph.output[0].CopyFrom(y)
    model.opset_import[0].version = opset
    model.ir_version = 10 if opset >= 21 else 8
    model.functions.extend(ir.to_proto(function) for function in ops.functions_for("MixedBitMatMul", opset))
    return model


def random_x(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def check(weight: MixedWeight, opset: int) -> None:
    x, bias = random_x(3, weight.k), np.random.default_rng(2).standard_normal(weight.n).astype(np.float32)
    model = body_model(weight, opset, bias)
    onnx.checker.check_model(model, full_check=True)
    assert relative_error(run_stock(model, x), x, weight, bias) <= FLOAT32_SUMMATION


@pytest.mark.parametrize("depths", DEPTHS.values(), ids=DEPTHS)
@pytest.mark.parametrize(("n", "k", "band"), SHAPES)
def test_every_depth_band_and_shape(n: int, k: int, band: int, depths) -> None:
    check(random_mixed(np.random.default_rng(n + k), n, k, band, depths, gain=0.25), 21)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("depths", [range(DEEPEST + 1), [0]], ids=["all", "none"])
def test_every_opset(depths, opset: int) -> None:
    check(random_mixed(np.random.default_rng(opset), 200, 100, 96, depths, gain=0.5), opset)


@pytest.mark.parametrize("shape", [(100,), (0, 100), (2, 3, 100)], ids=len)
def test_any_rank_and_no_row(shape: tuple[int, ...]) -> None:
    weight, x = random_mixed(np.random.default_rng(0), 45, 100, 32), random_x(*shape)
    y = run_stock(body_model(weight, 21, rank=len(shape)), x)
    assert y.shape == (*shape[:-1], 45)
    assert relative_error(y.reshape(-1, 45), x.reshape(-1, 100), weight) <= FLOAT32_SUMMATION


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("depths", [range(DEEPEST + 1), [0]], ids=["all", "none"])
def test_the_reference_evaluator_runs_the_body(depths, opset: int) -> None:
    """The second implementation of ONNX, with no optimiser in between."""
    from onnx.reference import ReferenceEvaluator

    weight, x = random_mixed(np.random.default_rng(0), 200, 100, 96, depths), random_x(2, 100)
    (y,) = ReferenceEvaluator(body_model(weight, opset)).run(None, {"x": x})
    assert relative_error(y, x, weight) <= FLOAT32_SUMMATION


def test_what_is_stored_and_does_not_count() -> None:
    """Bit 7 of an entry, the step of depth 0, columns and scales of inputs and outputs that are not there."""
    weight = random_mixed(np.random.default_rng(0), 45, 100, 32)
    arrays, x = weight.pack(), random_x(3, 100)
    columns, scales = weight.columns.copy(), arrays["scales"].copy()
    columns[:, 100:] = 255
    scales[-1, :, 45 % 32 :] = np.nan
    steps = np.concatenate([[7], weight.steps[1:]]).astype(np.float32)
    replaced = {"tables": weight.tables | 128, "steps": steps, "columns": columns, "scales": scales}
    np.testing.assert_array_equal(
        run_stock(body_model(weight, 21, replace=replaced), x), run_stock(body_model(weight, 21), x)
    )


@pytest.mark.parametrize("opset", [13, 21])
def test_stock_onnx_runtime_folds_the_weight_and_leaves_the_inputs_alone(opset: int, tmp_path: Path) -> None:
    weight = random_mixed(np.random.default_rng(0), 64, 128, 32)
    path = tmp_path / "optimized.onnx"
    run_stock(body_model(weight, opset), random_x(1, 128), str(path))
    optimized = onnx.load(path).graph
    assert [node.op_type for node in optimized.node] == ["MatMul", "Add"]
    assert {tensor.name: list(tensor.dims) for tensor in optimized.initializer}[optimized.node[0].input[1]] == [128, 64]


@pytest.mark.parametrize("opset", [17, 21])
def test_the_body_goes_with_other_bodies_in_one_model(opset: int) -> None:
    """No function of one name and another meaning."""
    bodies: dict[str, set[bytes]] = {}
    for op_type in ops.op_types():
        for function in ops.functions_for(op_type, opset):
            bodies.setdefault(function.name, set()).add(ir.to_proto(function).SerializeToString(deterministic=True))
    assert all(len(bodies[name]) == 1 for name in ops.body_names("MixedBitMatMul"))


def test_constants_are_those_of_the_format() -> None:
    depths = range(1, DEEPEST + 1)
    assert mixed._LEVELS[1:] == [1 << window_of(depth) for depth in depths]
    assert mixed._ZERO[1:] == [zero_of(depth) for depth in depths]
    starts = np.cumsum([0, *(len(table_of(depth)) for depth in TABLE_DEPTHS)])
    assert mixed._FIRST[1:] == [*starts[:-1], starts[-1], starts[-1]]
    places = np.array(mixed._PLACES).reshape(DEEPEST + 1, WINDOW)
    for depth in TABLE_DEPTHS:
        assert list(places[depth]) == [1 << depth * b if depth * b < window_of(depth) else 0 for b in range(WINDOW)]
