"""The kernels of FrameAnalysis and FrameSynthesis through ONNX Runtime: against a dense matrix and their bodies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
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

ROOT = Path(__file__).resolve().parents[2]
OP_TYPES = ["FrameAnalysis", "FrameSynthesis"]
LATEST = 25
CASE = FrameCase(8, 16, 3, 12, 14)


def kernel_session(model: onnx.ModelProto, library: Path, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def stock_session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def input_width(op_type: str, case: FrameCase) -> int:
    return case.length if op_type == "FrameAnalysis" else case.wide_length


def without_functions(
    op_type: str, case: FrameCase, signs: np.ndarray | None, block: np.ndarray | None, **changes: object
) -> onnx.ModelProto:
    """A model that nothing but the kernel can run."""
    return frame_model(op_type, case, signs, block, functions=False, **changes)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_the_dense_matrix(case: FrameCase, library: Path) -> None:
    signs, block = random_frame(case)
    matrix = dense_analysis(case, signs, block)
    rng = np.random.default_rng(1)
    for op_type, dense in (("FrameAnalysis", matrix.T), ("FrameSynthesis", matrix)):
        session = kernel_session(without_functions(op_type, case, signs, block), library, threads=2)
        for leading in ((0, 3), (1, 1), (3, 43)):
            x = rng.standard_normal((*leading, dense.shape[0])).astype(np.float32)
            y = session.run(None, {"x": x})[0]
            assert y.shape == (*leading, dense.shape[1])
            assert error(y, x @ dense) <= FLOAT32_SUMMATION


@pytest.mark.parametrize("case", [*CASES[5:20:3], *LARGE_CASES], ids=str)
def test_the_kernel_is_the_body(case: FrameCase, library: Path) -> None:
    signs, block = random_frame(case)
    for op_type in OP_TYPES:
        x = np.random.default_rng(2).standard_normal((2, 3, input_width(op_type, case))).astype(np.float32)
        model = frame_model(op_type, case, signs, block)
        ours = kernel_session(model, library).run(None, {"x": x})[0]
        assert error(ours, stock_session(model).run(None, {"x": x})[0]) <= FLOAT32_SUMMATION


@pytest.mark.parametrize("case", [*CASES, *LARGE_CASES], ids=str)
def test_synthesis_undoes_analysis(case: FrameCase, library: Path) -> None:
    signs, block = random_frame(case)
    x = np.random.default_rng(3).standard_normal((1, 5, case.length)).astype(np.float32)
    coefficients = kernel_session(without_functions("FrameAnalysis", case, signs, block), library).run(None, {"x": x})
    back = kernel_session(without_functions("FrameSynthesis", case, signs, block), library)
    assert error(back.run(None, {"x": coefficients[0]})[0], x) <= FLOAT32_SUMMATION


@pytest.mark.parametrize("case", [FrameCase(2, 2, 2049), FrameCase(2, 2, 2049, 3, 4)], ids=str)
def test_an_odd_factor_too_large_for_a_matrix(case: FrameCase, library: Path) -> None:
    signs, block = random_frame(case)
    x = np.random.default_rng(4).standard_normal((1, 2, case.length)).astype(np.float32)
    y = kernel_session(without_functions("FrameAnalysis", case, signs, block), library).run(None, {"x": x})[0]
    # Rows of the dense matrix, a few of them: all would take 2 GB.
    picked = np.array([0, 1, case.wide, case.wide_length // 2 - 1, case.wide_length - 1])
    factor = case.middle * case.odd
    index = np.arange(case.odd)
    angle = 2 * np.pi * (np.outer(index, index) % case.odd) / case.odd
    hartley = np.cos(angle) + np.sin(angle)
    signed = (x * (1.0 - 2.0 * np.unpackbits(signs, count=case.length, bitorder="little"))).reshape(2, 2, 2, case.odd)
    walsh = np.array([[1.0, 1.0], [1.0, -1.0]])
    mixed = np.einsum("ij,kl,njlc,cd->nikd", walsh, walsh, signed, hartley) / np.sqrt(case.length)
    wide = mixed.reshape(2, 2, factor // case.w, case.w) @ block.astype(np.float64)
    assert error(y[0][:, picked], wide.reshape(2, -1)[:, picked]) <= FLOAT32_SUMMATION
    back = kernel_session(without_functions("FrameSynthesis", case, signs, block), library)
    assert error(back.run(None, {"x": y})[0], x) <= FLOAT32_SUMMATION


@pytest.mark.parametrize("op_type", OP_TYPES)
@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (1, 2, 3), (0,), (2, 0), (1, 0, 4)])
def test_any_rank(op_type: str, leading: tuple[int, ...], library: Path) -> None:
    signs, block = random_frame(CASE)
    matrix = dense_analysis(CASE, signs, block)
    dense = matrix.T if op_type == "FrameAnalysis" else matrix
    x = np.random.default_rng(5).standard_normal((*leading, len(dense))).astype(np.float32)
    y = kernel_session(without_functions(op_type, CASE, signs, block, x_shape=list(x.shape)), library)
    found = y.run(None, {"x": x})[0]
    assert found.shape == (*leading, dense.shape[1])
    assert error(found, x @ dense) <= FLOAT32_SUMMATION


@pytest.mark.parametrize("opset", [13, 17, LATEST])
@pytest.mark.parametrize("op_type", OP_TYPES)
def test_every_opset(op_type: str, opset: int, library: Path) -> None:
    signs, block = random_frame(CASE)
    x = np.ones((1, 2, input_width(op_type, CASE)), np.float32)
    newest = kernel_session(without_functions(op_type, CASE, signs, block), library).run(None, {"x": x})[0]
    session = kernel_session(frame_model(op_type, CASE, signs, block, opset=opset), library)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], newest)


@pytest.mark.parametrize("op_type", OP_TYPES)
def test_threads_agree_with_one_thread(op_type: str, library: Path) -> None:
    case = FrameCase(16, 64, 1, 16, 18)
    signs, block = random_frame(case)
    x = np.random.default_rng(6).standard_normal((1, 129, input_width(op_type, case))).astype(np.float32)
    one, two = (
        kernel_session(without_functions(op_type, case, signs, block), library, threads).run(None, {"x": x})[0]
        for threads in (1, 2)
    )
    np.testing.assert_array_equal(one, two)
    # Rows know nothing of each other.
    single = kernel_session(without_functions(op_type, case, signs, block), library)
    np.testing.assert_array_equal(one[:, 70:71], single.run(None, {"x": x[:, 70:71]})[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_a_number_stays_in_its_row(bad: float, library: Path) -> None:
    signs, block = random_frame(CASE)
    for op_type in OP_TYPES:
        x = np.ones((1, 3, input_width(op_type, CASE)), np.float32)
        x[0, 1, 5] = bad
        y = kernel_session(without_functions(op_type, CASE, signs, block), library).run(None, {"x": x})[0]
        assert np.isfinite(y[0, [0, 2]]).all()
        assert not np.isfinite(y[0, 1]).any()


def test_shape_inference_keeps_names_and_knows_the_width(library: Path) -> None:
    signs, block = random_frame(CASE)
    for op_type, width in (("FrameAnalysis", CASE.wide_length), ("FrameSynthesis", CASE.length)):
        model = without_functions(op_type, CASE, signs, block)
        del model.graph.output[0].type.tensor_type.shape.dim[:]
        model.graph.output[0].type.tensor_type.ClearField("shape")
        assert kernel_session(model, library).get_outputs()[0].shape == ["batch", "rows", width]


def test_a_reshape_behind_dimensions_without_names(library: Path) -> None:
    """As when heads are split: Reshape takes the op's own first dimensions, which nobody knows before the run."""
    signs, block = random_frame(CASE)
    model = without_functions("FrameAnalysis", CASE, signs, block, x_shape=["rows", 1, CASE.length])
    model.graph.node[0].input[0] = "unknown"
    model.graph.node.insert(0, oh.make_node("Expand", ["x", "shape"], ["unknown"]))
    for node in (
        oh.make_node("Shape", ["y"], ["dims"]),
        oh.make_node("Gather", ["dims", "axes"], ["leading"]),
        oh.make_node("Concat", ["leading", "heads"], ["target"], axis=0),
        oh.make_node("Reshape", ["y", "target"], ["split"]),
    ):
        model.graph.node.append(node)
    for name, values in (("axes", [0, 1]), ("heads", [2, CASE.wide_length // 2])):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(values), name))
    model.graph.input.append(oh.make_tensor_value_info("shape", onnx.TensorProto.INT64, [3]))
    del model.graph.output[:]
    model.graph.output.append(oh.make_tensor_value_info("split", onnx.TensorProto.FLOAT, [None] * 4))
    x = np.random.default_rng(7).standard_normal((2, 1, CASE.length)).astype(np.float32)
    y = kernel_session(model, library).run(None, {"x": x, "shape": np.array([2, 3, CASE.length])})[0]
    expected = np.broadcast_to(x, (2, 3, CASE.length)) @ dense_analysis(CASE, signs, block).T
    assert error(y, expected.reshape(2, 3, 2, -1)) <= FLOAT32_SUMMATION


@pytest.mark.parametrize("op_type", OP_TYPES)
def test_signs_and_block_as_run_time_inputs(op_type: str, library: Path) -> None:
    signs, block = random_frame(CASE)
    other_signs, other_block = random_frame(CASE, seed=1)
    session = kernel_session(without_functions(op_type, CASE, None, None, x_shape=["rows", None]), library)
    for s, b in ((signs, block), (other_signs, other_block), (signs, block)):
        matrix = dense_analysis(CASE, s, b)
        dense = matrix.T if op_type == "FrameAnalysis" else matrix
        x = np.random.default_rng(8).standard_normal((2, len(dense))).astype(np.float32)
        y = session.run(None, {"x": x, "signs": s, "block": b})[0]
        assert error(y, x @ dense) <= FLOAT32_SUMMATION
    feed = {"x": x, "signs": signs, "block": block}
    with pytest.raises(Exception, match=r"the_node.*input 1 \(signs\) is uint8 \[47\], expected uint8 \[48\]"):
        session.run(None, feed | {"signs": signs[:-1]})
    with pytest.raises(Exception, match=r"the_node.*input 2 \(block\) is float32 \[11, 14\], expected float32"):
        session.run(None, feed | {"block": block[:11]})
    with pytest.raises(Exception, match=r"the_node.*input 2 \(block\) is float32 \[0, 14\]"):
        session.run(None, feed | {"block": block[:0]})


WRONG_ATTRIBUTES = [
    ({"left": 3}, r"left = 3, middle = 16, odd = 3, expected left and middle powers of two"),
    ({"left": 0}, r"left = 0"),
    ({"left": -8}, r"left = -8"),
    ({"middle": 6}, r"middle = 6"),
    ({"middle": 2**62}, r"middle = 4611686018427387904"),
    ({"odd": 4}, r"odd = 4, expected .* odd an odd number"),
    ({"odd": -3}, r"odd = -3"),
    ({"odd": 2**61 + 1}, r"odd = 2305843009213693953"),
    ({"left": 2**12, "middle": 2**12, "odd": 3}, r"a product of at most 2\*\*24"),
    ({"left": 16}, r"input 1 \(signs\) is uint8 \[48\], expected uint8 \[96\]"),
]


@pytest.mark.parametrize("op_type", OP_TYPES)
@pytest.mark.parametrize(("wrong", "message"), WRONG_ATTRIBUTES)
def test_wrong_attributes_are_refused_at_session_creation(
    wrong: dict[str, int], message: str, op_type: str, library: Path
) -> None:
    signs, block = random_frame(CASE)
    with pytest.raises(Exception, match=f"{op_type} node 'the_node'.*{message}"):
        kernel_session(without_functions(op_type, CASE, signs, block, **wrong), library)


WRONG_TENSORS = [
    ("signs", np.zeros(47, np.uint8), r"input 1 \(signs\) is uint8 \[47\], expected uint8 \[48\]"),
    ("signs", np.zeros(49, np.uint8), r"input 1 \(signs\) is uint8 \[49\]"),
    ("signs", np.zeros((1, 48), np.uint8), r"input 1 \(signs\) is uint8 \[1, 48\]"),
    ("signs", np.zeros((), np.uint8), r"input 1 \(signs\) is uint8 \[\]"),
    ("block", np.zeros((9, 10), np.float32), r"\[9, 10\], expected float32 .* w a divisor of middle \* odd = 48"),
    ("block", np.zeros((12, 11), np.float32), r"\[12, 11\], expected float32 \[w, w'\] with 1 <= w <= w'"),
    ("block", np.zeros((12, 4097), np.float32), r"\[12, 4097\].*w' <= 4096"),
    ("block", np.zeros((96, 96), np.float32), r"\[96, 96\]"),
    ("block", np.zeros((0, 2), np.float32), r"\[0, 2\]"),
    ("block", np.zeros(12, np.float32), r"input 2 \(block\) is float32 \[12\]"),
    ("block", np.zeros((1, 12, 14), np.float32), r"\[1, 12, 14\]"),
]


@pytest.mark.parametrize("op_type", OP_TYPES)
@pytest.mark.parametrize(("name", "array", "message"), WRONG_TENSORS)
def test_wrong_tensors_are_refused_at_session_creation(
    name: str, array: np.ndarray, message: str, op_type: str, library: Path
) -> None:
    signs, block = random_frame(CASE)
    arrays = {"signs": signs, "block": block} | {name: array}
    with pytest.raises(Exception, match=f"{op_type} node 'the_node'.*{message}"):
        kernel_session(without_functions(op_type, CASE, arrays["signs"], arrays["block"]), library)


@pytest.mark.parametrize("op_type", OP_TYPES)
def test_missing_attribute_is_refused(op_type: str, library: Path) -> None:
    model = without_functions(op_type, CASE, *random_frame(CASE))
    kept = [attribute for attribute in model.graph.node[0].attribute if attribute.name != "odd"]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)
    with pytest.raises(Exception, match=r"the_node.*integer attribute 'odd' is missing"):
        kernel_session(model, library)


@pytest.mark.parametrize("op_type", OP_TYPES)
def test_wrong_width_of_x_is_refused(op_type: str, library: Path) -> None:
    session = kernel_session(without_functions(op_type, CASE, *random_frame(CASE), x_shape=["rows", "width"]), library)
    width = input_width(op_type, CASE)
    with pytest.raises(
        Exception, match=rf"the_node.*input 0 \(x\) is \[2, {width - 1}\], expected \[\.\.\., {width}\]"
    ):
        session.run(None, {"x": np.zeros((2, width - 1), np.float32)})
    scalar = kernel_session(without_functions(op_type, CASE, *random_frame(CASE), x_shape=[]), library)
    with pytest.raises(Exception, match=r"input 0 \(x\) is \[\]"):
        scalar.run(None, {"x": np.zeros((), np.float32)})


def test_forced_scalar_path_agrees(library: Path) -> None:
    """The agreement tests once more in a process that may use no vector instructions."""
    if os.environ.get("ONNXQ_ISA"):
        pytest.skip("already forced")
    names = ["test_the_kernel_is_the_dense_matrix", "test_synthesis_undoes_analysis", "test_any_rank"]
    tests = [f"{__file__}::{name}" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"ONNXQ_ISA": "scalar", "ONNXQ_LIBRARY": str(library)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
