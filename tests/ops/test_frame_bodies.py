"""The bodies of FrameAnalysis and FrameSynthesis against a dense matrix, and what ONNX Runtime leaves of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.ops.frame_reference import (
    CASES,
    FLOAT32_SUMMATION,
    LARGE_CASES,
    FrameCase,
    dense_analysis,
    error,
    frame_model,
    random_frame,
)

OPSETS = [13, 17, 18, 21, 23, 25]
SHAPE_OPS = {"Shape", "Slice", "Concat", "Reshape"}


def run_stock(model: onnx.ModelProto, feed: np.ndarray, optimized: Path | None = None) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": feed})[0]


def check_both(case: FrameCase, opset: int, leading: tuple[int, ...] = (2, 3)) -> None:
    signs, block = random_frame(case)
    matrix = dense_analysis(case, signs, block)
    rng = np.random.default_rng(1)
    for op_type, width, dense in (
        ("FrameAnalysis", case.length, matrix.T),
        ("FrameSynthesis", case.wide_length, matrix),
    ):
        x = rng.standard_normal((*leading, width)).astype(np.float32)
        model = frame_model(op_type, case, signs, block, opset=opset, x_shape=[*(None for _ in leading), width])
        onnx.checker.check_model(model, full_check=True)
        y = run_stock(model, x)
        assert y.shape == (*leading, dense.shape[1])
        assert error(y, x @ dense) <= FLOAT32_SUMMATION


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_body_is_the_dense_matrix(case: FrameCase) -> None:
    check_both(case, 13)


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset(opset: int) -> None:
    check_both(FrameCase(8, 16, 3, 12, 14), opset)


@pytest.mark.parametrize("leading", [(), (5,), (1, 2, 3), (0,), (2, 0)])
def test_every_rank_and_no_rows(leading: tuple[int, ...]) -> None:
    check_both(FrameCase(8, 16, 3, 16, 18), 21, leading)


@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_synthesis_undoes_analysis(case: FrameCase) -> None:
    signs, block = random_frame(case)
    x = np.random.default_rng(2).standard_normal((1, 2, case.length)).astype(np.float32)
    coefficients = run_stock(frame_model("FrameAnalysis", case, signs, block), x)
    assert coefficients.shape == (1, 2, case.wide_length)
    np.testing.assert_allclose(np.linalg.norm(coefficients), np.linalg.norm(x), rtol=FLOAT32_SUMMATION)
    assert error(run_stock(frame_model("FrameSynthesis", case, signs, block), coefficients), x) <= FLOAT32_SUMMATION


def test_the_reference_evaluator_runs_the_bodies() -> None:
    """The second implementation of ONNX, with no optimiser in between."""
    from onnx.reference import ReferenceEvaluator

    case = FrameCase(8, 4, 3, 12, 14)
    signs, block = random_frame(case)
    matrix = dense_analysis(case, signs, block)
    x = np.random.default_rng(3).standard_normal((1, 2, case.length)).astype(np.float32)
    (y,) = ReferenceEvaluator(frame_model("FrameAnalysis", case, signs, block)).run(None, {"x": x})
    assert error(y, x @ matrix.T) <= FLOAT32_SUMMATION
    (back,) = ReferenceEvaluator(frame_model("FrameSynthesis", case, signs, block)).run(None, {"x": y})
    assert error(back, x) <= FLOAT32_SUMMATION


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("op_type", ["FrameAnalysis", "FrameSynthesis"])
def test_only_two_products_and_small_change_are_left_to_run(op_type: str, opset: int, tmp_path: Path) -> None:
    case = FrameCase(8, 16, 3, 12, 14)
    signs, block = random_frame(case)
    width = case.length if op_type == "FrameAnalysis" else case.wide_length
    path = tmp_path / "optimized.onnx"
    run_stock(frame_model(op_type, case, signs, block, opset=opset), np.ones((1, 1, width), np.float32), path)
    left = [node.op_type for node in onnx.load(path).graph.node]
    assert left.count("MatMul") == 2
    assert left.count("Mul") == 1
    assert left.count("Reshape") == 2
    assert set(left) - {"MatMul", "Mul"} <= SHAPE_OPS
