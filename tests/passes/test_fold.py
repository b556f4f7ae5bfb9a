from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxq
from onnxq.graph import find_weights, load
from onnxq.passes.fold import FoldFramesPass
from onnxq.pipeline.plan import frame_of
from onnxq.recipe import FrameSpec, GridSpec, LinearPlan, Recipe, SolverSpec, TablePlan

SAME_FUNCTION = 1e-4
"""Largest relative difference between two float32 computations of one function."""

K1, MIDDLE, N = 64, 96, 128


def recipe(redundancy: float = 1.0) -> Recipe:
    linear = LinearPlan(GridSpec(8, "column"), FrameSpec(redundancy), SolverSpec(name="nearest"), "float32")
    return Recipe("test", linear=linear, tables=TablePlan(None))


def write_chain(path: Path, *, between: str | None = None, gemm: bool = False, extra_reader: bool = False) -> Path:
    """X [rows, 64] -> first product with a bias -> perhaps an op -> two products; weights of 96 and 128 outputs."""
    rng = np.random.default_rng(0)
    arrays = {
        "first": rng.standard_normal((K1, MIDDLE)),
        "bias": rng.standard_normal(MIDDLE),
        "left": rng.standard_normal((MIDDLE, N)),
        "right": rng.standard_normal((MIDDLE, N)),
    }
    if gemm:
        nodes = [helper.make_node("Gemm", ["x", "first", "bias"], ["h"])]
    else:
        nodes = [helper.make_node("MatMul", ["x", "first"], ["p"]), helper.make_node("Add", ["bias", "p"], ["h"])]
    hidden = "h"
    if between is not None:
        nodes.append(helper.make_node(between, ["h"], ["a"]))
        hidden = "a"
    nodes += [helper.make_node("MatMul", [hidden, side], [f"y_{side}"]) for side in ("left", "right")]
    outputs = ["y_left", "y_right"]
    if extra_reader:
        nodes.append(helper.make_node("Relu", ["h"], ["seen"]))
        outputs.append("seen")
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", K1])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def run(path: Path, x: np.ndarray) -> list[np.ndarray]:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})


def difference(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("gemm", [False, True])
@pytest.mark.parametrize("redundancy", [1.0, 1.3])
def test_a_frame_between_two_products_leaves_no_transform(tmp_path: Path, gemm: bool, redundancy: float) -> None:
    source = write_chain(tmp_path / "chain.onnx", gemm=gemm)
    x = np.random.default_rng(1).standard_normal((5, K1)).astype(np.float32)
    report = onnxq.quantize(source, tmp_path / "out.onnx", recipe=recipe(redundancy))
    written = onnx.load(tmp_path / "out.onnx")
    # Only the first product's own input is transformed at run time.
    assert [node.op_type for node in written.graph.node].count("FrameAnalysis") == 1
    (note,) = [note for note in report.notes if "folded into both" in note]
    assert "first" in note
    assert "left" in note
    assert "right" in note
    eight_bits = 0.02
    assert difference(run(tmp_path / "out.onnx", x), run(source, x)) < eight_bits


@pytest.mark.parametrize("redundancy", [1.0, 1.3])
def test_folding_keeps_the_function(tmp_path: Path, redundancy: float) -> None:
    source = write_chain(tmp_path / "chain.onnx")
    loaded = load(source)
    weights = find_weights(loaded.model).weights
    fold = FoldFramesPass(weights, lambda weight: frame_of(weight, recipe(redundancy)))
    assert fold(loaded.model).modified
    (folded,) = fold.folded
    assert folded.before == "first"
    assert set(folded.after) == {"left", "right"}
    onnx.save(onnx.ModelProto.FromString(_bytes(loaded.model)), tmp_path / "folded.onnx")
    x = np.random.default_rng(1).standard_normal((5, K1)).astype(np.float32)
    assert difference(run(tmp_path / "folded.onnx", x), run(source, x)) < SAME_FUNCTION
    again = {weight.name: weight for weight in find_weights(loaded.model).weights}
    assert again["left.folded"].k == again["first.folded"].n >= MIDDLE


@pytest.mark.parametrize("obstacle", [{"between": "Relu"}, {"between": "Tanh"}, {"extra_reader": True}])
def test_nothing_is_folded_across_what_does_not_commute(tmp_path: Path, obstacle: dict[str, object]) -> None:
    source = write_chain(tmp_path / "chain.onnx", **obstacle)  # type: ignore[arg-type]
    loaded = load(source)
    fold = FoldFramesPass(find_weights(loaded.model).weights, lambda weight: frame_of(weight, recipe()))
    assert not fold(loaded.model).modified
    assert not fold.folded


def test_nothing_is_folded_into_a_weight_that_a_rule_keeps(tmp_path: Path) -> None:
    source = write_chain(tmp_path / "chain.onnx")
    from onnxq.recipe import Rule

    kept = Recipe("test", linear=recipe().linear, rules=(Rule("left", keep=True),))
    loaded = load(source)
    fold = FoldFramesPass(find_weights(loaded.model).weights, lambda weight: frame_of(weight, kept))
    assert not fold(loaded.model).modified


def _bytes(model: object) -> bytes:
    import onnx_ir as ir

    return ir.to_proto(model).SerializeToString()  # type: ignore[arg-type]


def test_rules_know_a_folded_weight_by_its_name_in_the_file(tmp_path: Path) -> None:
    from onnxq.recipe import Rule

    source = write_chain(tmp_path / "chain.onnx")
    pinned = Recipe("test", linear=recipe().linear, rules=(Rule("right", grid=GridSpec(4, 32)),))
    report = onnxq.quantize(source, tmp_path / "out.onnx", recipe=pinned)
    formats = {record.name: record.format for record in report.weights}
    assert any("folded into both" in note for note in report.notes)
    assert "4-bit g32" in formats["right.folded"]
    assert "8-bit column" in formats["left.folded"]


def test_nothing_is_folded_into_a_weight_in_front_that_stays_in_float(tmp_path: Path) -> None:
    from onnxq.recipe import Rule

    source = write_chain(tmp_path / "chain.onnx")
    pinned = Recipe("test", linear=recipe(1.3).linear, rules=(Rule("first", keep=True),))
    report = onnxq.quantize(source, tmp_path / "out.onnx", recipe=pinned)
    assert {"first", "bias"} <= {record.name for record in report.kept}
    assert {record.name for record in report.weights} == {"left", "right"}


def test_a_budget_puts_no_second_frame_round_a_folded_weight(tmp_path: Path) -> None:
    source = write_chain(tmp_path / "chain.onnx")
    report = onnxq.quantize(source, tmp_path / "out.onnx", recipe=recipe(), bits=5.5)
    written = onnx.load(tmp_path / "out.onnx")
    assert [node.op_type for node in written.graph.node].count("FrameAnalysis") == 1
    framed = {record.name for record in report.weights if "frame" in record.format}
    assert framed == {"first.folded"}


def test_calibration_sees_the_coefficients_of_a_folded_frame(tmp_path: Path) -> None:
    source = write_chain(tmp_path / "chain.onnx")
    x = np.random.default_rng(1).standard_normal((64, K1)).astype(np.float32)
    linear = LinearPlan(GridSpec(4, "column"), FrameSpec(1.3))
    report = onnxq.quantize(
        source, tmp_path / "out.onnx", recipe=Recipe("test", linear=linear), calibration=[{"x": x}, {"x": x[::-1]}]
    )
    assert {record.solver for record in report.weights} == {"error-feedback"}
    four_bits = 0.2
    assert difference(run(tmp_path / "out.onnx", x), run(source, x)) < four_bits
