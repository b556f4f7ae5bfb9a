"""The kernel library through ONNX Runtime, against the layout's text in numpy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from tests.custom_ops.layout_reference import (
    Weight,
    attributes,
    finish_model,
    gather_model,
    initializers,
    matmul_model,
    quantize_activations,
    random_weight,
)

ROOT = Path(__file__).resolve().parents[2]

# Largest error over the sum of |x| |W|: float32 sums of K terms in any order.
FLOAT_TOLERANCE = 2e-6
# The round trip through int8 is exact in the reference, so only the order of the sums is left here too.
INT8_TOLERANCE = 2e-6


def new_session(model: onnx.ModelProto, library: Path, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def relative_error(y: np.ndarray, x: np.ndarray, weight: Weight, bias: np.ndarray | float = 0.0) -> float:
    w = weight.dequantize()
    # Codes enter the kernel's sums before the zero point is taken off, so their size sets the scale of rounding.
    bound = np.abs(x).astype(np.float64) @ (np.abs(w) + np.abs(weight.gain) * 0.1 * 2**weight.bits).T + 1e-12
    return float(np.max(np.abs(y - (x.astype(np.float64) @ w.T + bias)) / bound, initial=0.0))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("accuracy_level", [1, 4])
@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(64, 128, 32), (45, 200, 64), (33, 384, 128), (7, 70, 96), (70, 352, 160)]
)
def test_matmul_agrees_with_layout_text(
    bits: int, accuracy_level: int, n: int, k: int, group_size: int, library: Path
) -> None:
    rng = np.random.default_rng(bits * 1000 + n)
    for shared_zero in (True, False):
        weight = random_weight(rng, n, k, bits, group_size, shared_zero=shared_zero, gain=0.25)
        bias = rng.standard_normal(n).astype(np.float32)
        session = new_session(matmul_model(weight, bias, accuracy_level=accuracy_level), library)
        for rows in (0, 1, 2, 7, 40):
            x = rng.standard_normal((rows, k)).astype(np.float32)
            y = session.run(None, {"x": x})[0]
            assert y.shape == (rows, n)
            used = x if accuracy_level == 1 else quantize_activations(x, group_size)
            limit = FLOAT_TOLERANCE if accuracy_level == 1 else INT8_TOLERANCE
            assert relative_error(y, used, weight, bias) < limit


def test_whole_column_group_and_threads_agree_with_one_thread(library: Path) -> None:
    rng = np.random.default_rng(1)
    weight = random_weight(rng, 2048, 1000, 3, 1024, shared_zero=False)
    x = rng.standard_normal((33, 1000)).astype(np.float32)
    for level in (1, 4):
        model = matmul_model(weight, accuracy_level=level)
        one = new_session(model, library, 1).run(None, {"x": x})[0]
        two = new_session(model, library, 2).run(None, {"x": x})[0]
        np.testing.assert_array_equal(one, two)
        assert relative_error(one, x if level == 1 else quantize_activations(x, 1024), weight) < INT8_TOLERANCE


@pytest.mark.parametrize("shape", [(96,), (2, 3, 96), (2, 0, 96), (1, 1, 1, 96)])
def test_any_rank(shape: tuple[int, ...], library: Path) -> None:
    rng = np.random.default_rng(2)
    weight = random_weight(rng, 40, 96, 4, 32)
    x = rng.standard_normal(shape).astype(np.float32)
    session = new_session(matmul_model(weight, accuracy_level=1, x_shape=list(shape)), library)
    y = session.run(None, {"x": x})[0]
    assert y.shape == (*shape[:-1], 40)
    np.testing.assert_allclose(y, x @ weight.dequantize().T, rtol=1e-4, atol=1e-4)


def test_shape_inference_keeps_symbols(library: Path) -> None:
    weight = random_weight(np.random.default_rng(3), 40, 96, 4, 32)
    session = new_session(matmul_model(weight, x_shape=["batch", 5, 96]), library)
    assert session.get_outputs()[0].shape == ["batch", 5, 40]
    table = new_session(gather_model(weight), library)
    assert table.get_outputs()[0].shape == ["a", "b", 96]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_a_number_is_not_hidden(bad: float, library: Path) -> None:
    weight = random_weight(np.random.default_rng(4), 40, 96, 4, 32)
    x = np.ones((2, 96), np.float32)
    x[1, 5] = bad
    y = new_session(matmul_model(weight), library).run(None, {"x": x})[0]
    assert np.isfinite(y[0]).all()
    assert not np.isfinite(y[1]).any()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shared_zero", [True, False])
@pytest.mark.parametrize("index_type", [TensorProto.INT64, TensorProto.INT32])
def test_gather_is_exact(bits: int, shared_zero: bool, index_type: int, library: Path) -> None:
    rng = np.random.default_rng(bits)
    weight = random_weight(rng, 75, 100, bits, 32, shared_zero=shared_zero, gain=0.5)
    indices = rng.integers(-75, 75, (3, 50)).astype(helper.tensor_dtype_to_np_dtype(index_type))
    y = new_session(gather_model(weight, index_type), library, 2).run(None, {"indices": indices})[0]
    np.testing.assert_array_equal(y, weight.dequantize().astype(np.float32)[indices])


@pytest.mark.parametrize("index", [75, -76, 2**40])
def test_gather_refuses_index_out_of_range(index: int, library: Path) -> None:
    weight = random_weight(np.random.default_rng(0), 75, 100, 2, 32)
    session = new_session(gather_model(weight), library)
    with pytest.raises(Exception, match=rf"the_table.*holds {index} at position 1, expected -75 to 74"):
        session.run(None, {"indices": np.array([[0, index]], np.int64)})
    empty = session.run(None, {"indices": np.zeros((0, 4), np.int64)})[0]
    assert empty.shape == (0, 4, 100)


WRONG_ATTRIBUTES = [
    ({"bits": 0}, r"bits is 0, expected 1 to 8"),
    ({"bits": 9}, r"bits is 9, expected 1 to 8"),
    ({"bits": 3}, r"input 1 \(packed\) is uint8 \[2, 3, 4, 32, 4\], expected uint8 \[2, 3, 3, 32, 4\]"),
    ({"group_size": 48}, r"group_size is 48, expected a positive multiple of 32"),
    ({"group_size": -32}, r"group_size is -32"),
    ({"group_size": 64}, r"input 2 \(scales\) is float16 \[2, 3, 32\], expected float16 \[2, 2, 32\]"),
    ({"layout_version": 2}, r"layout_version is 2.*reads version 1; update onnxq"),
    ({"K": -1}, r"N = 40 and K = -1"),
    ({"K": 2**62}, r"K = 4611686018427387904"),
    ({"N": 0}, r"N = 0"),
    ({"N": 2**62}, r"N = 4611686018427387904"),
    ({"N": 65}, r"expected uint8 \[3, 3, 4, 32, 4\]"),
    ({"gain": float("nan")}, r"gain is not a finite number"),
    ({"accuracy_level": 2}, r"accuracy_level is 2, expected 1 .* or 4"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_ATTRIBUTES)
def test_wrong_attributes_are_refused_at_session_creation(
    wrong: dict[str, object], message: str, library: Path
) -> None:
    weight = random_weight(np.random.default_rng(0), 40, 96, 4, 32)
    with pytest.raises(Exception, match="LowBitMatMul node 'the_node'.*" + message):
        new_session(matmul_model(weight, **wrong), library)


WRONG_TENSORS = [
    ("packed", np.zeros((2, 3, 4, 32), np.uint8), r"input 1 \(packed\) is uint8 \[2, 3, 4, 32\]"),
    ("packed", np.zeros((2, 3, 4, 31, 4), np.uint8), r"\[2, 3, 4, 31, 4\], expected uint8 \[2, 3, 4, 32, 4\]"),
    ("scales", np.zeros((2, 2, 32), np.float16), r"input 2 \(scales\)"),
    ("zero_points", np.zeros((2, 1, 32), np.uint8), r"input 3 \(zero_points\).*or \[1, 1, 1\]"),
    ("zero_points", np.zeros((1,), np.uint8), r"input 3 \(zero_points\)"),
    ("bias", np.zeros(39, np.float32), r"input 4 \(bias\) is float32 \[39\], expected float32 \[40\]"),
    ("bias", np.zeros((), np.float32), r"input 4 \(bias\) is float32 \[\]"),
]


@pytest.mark.parametrize(("name", "array", "message"), WRONG_TENSORS)
def test_wrong_tensors_are_refused_at_session_creation(
    name: str, array: np.ndarray, message: str, library: Path
) -> None:
    weight = random_weight(np.random.default_rng(0), 40, 96, 4, 32)
    with pytest.raises(Exception, match="the_node.*" + message):
        new_session(matmul_model(weight, replace={name: array}), library)


def test_missing_attribute_is_refused(library: Path) -> None:
    model = matmul_model(random_weight(np.random.default_rng(0), 40, 96, 4, 32))
    kept = [a for a in model.graph.node[0].attribute if a.name != "bits"]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)
    with pytest.raises(Exception, match="integer attribute 'bits' is missing"):
        new_session(model, library)


def test_wrong_width_of_x_is_refused(library: Path) -> None:
    weight = random_weight(np.random.default_rng(0), 40, 96, 4, 32)
    session = new_session(matmul_model(weight, x_shape=["rows", "width"]), library)
    with pytest.raises(Exception, match=r"input 0 \(x\) is \[2, 95\], expected \[\.\.\., 96\]"):
        session.run(None, {"x": np.zeros((2, 95), np.float32)})


def if_model(weight: Weight, arrays: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Both branches read the packed weight of the outer graph."""

    def branch(name: str, level: int) -> onnx.GraphProto:
        node = helper.make_node(
            "LowBitMatMul",
            ["x", "packed", "scales", "zero_points", "bias"],
            [f"{name}_y"],
            name=f"{name}_node",
            domain="onnxq",
            **attributes(weight, accuracy_level=level),
        )
        return helper.make_graph(
            [node], name, [], [helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)]
        )

    node = helper.make_node("If", ["c"], ["y"], then_branch=branch("yes", 1), else_branch=branch("no", 4))
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", weight.k]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers(arrays),
    )
    return finish_model(graph)


def test_weight_of_the_outer_scope_inside_if(library: Path) -> None:
    rng = np.random.default_rng(5)
    weight = random_weight(rng, 40, 96, 5, 32)
    x = rng.standard_normal((3, 96)).astype(np.float32)
    session = new_session(if_model(weight, weight.pack() | {"bias": np.zeros(1, np.float32)}), library)
    yes = session.run(None, {"c": np.array(True), "x": x})[0]
    no = session.run(None, {"c": np.array(False), "x": x})[0]
    assert relative_error(yes, x, weight) < FLOAT_TOLERANCE
    assert relative_error(no, quantize_activations(x, 32), weight) < INT8_TOLERANCE


def test_wrong_weight_of_the_outer_scope_is_refused_at_session_creation(library: Path) -> None:
    weight = random_weight(np.random.default_rng(5), 40, 96, 5, 32)
    arrays = weight.pack() | {"bias": np.zeros(1, np.float32)}
    arrays["packed"] = arrays["packed"][:1]
    with pytest.raises(Exception, match=r"(yes|no)_node.*input 1 \(packed\)"):
        new_session(if_model(weight, arrays), library)


def test_weight_as_run_time_input_is_checked_at_each_run(library: Path) -> None:
    rng = np.random.default_rng(6)
    weight = random_weight(rng, 40, 96, 2, 32)
    model = matmul_model(weight, accuracy_level=1)
    packed = weight.pack()["packed"]
    kept = [t for t in model.graph.initializer if t.name != "packed"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.input.append(helper.make_tensor_value_info("packed", TensorProto.UINT8, [None] * 5))
    session = new_session(model, library)
    x = rng.standard_normal((2, 96)).astype(np.float32)
    assert relative_error(session.run(None, {"x": x, "packed": packed})[0], x, weight) < FLOAT_TOLERANCE
    with pytest.raises(Exception, match=r"input 1 \(packed\) is uint8 \[2, 2, 2, 32, 4\]"):
        session.run(None, {"x": x, "packed": packed[:, :2]})


def test_external_data(tmp_path: Path, library: Path) -> None:
    rng = np.random.default_rng(7)
    weight = random_weight(rng, 64, 512, 4, 64)
    path = tmp_path / "m.onnx"
    onnx.save(matmul_model(weight, accuracy_level=1), path, save_as_external_data=True, size_threshold=0)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    x = rng.standard_normal((2, 512)).astype(np.float32)
    y = ort.InferenceSession(str(path), options).run(None, {"x": x})[0]
    assert relative_error(y, x, weight) < FLOAT_TOLERANCE


def test_sessions_share_the_library(library: Path) -> None:
    weight = random_weight(np.random.default_rng(8), 40, 96, 4, 32)
    first, second = (new_session(matmul_model(weight), library) for _ in range(2))
    x = np.ones((1, 96), np.float32)
    del first
    assert second.run(None, {"x": x})[0].shape == (1, 40)


DESCRIBE = (
    "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).OnnxqDescribe; f.restype = ctypes.c_char_p; print(f().decode())"
)


def describe(library: Path, isa: str | None) -> dict[str, object]:
    environment = {k: v for k, v in os.environ.items() if k != "ONNXQ_ISA"} | ({"ONNXQ_ISA": isa} if isa else {})
    command = [sys.executable, "-c", DESCRIBE, str(library)]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def test_describe_names_the_choice(library: Path) -> None:
    best = describe(library, None)
    assert best["isa"] == best["available"][0]
    assert best["warning"] is None
    assert best["layout_version"] == 1
    scalar = describe(library, "scalar")
    assert (scalar["isa"], scalar["reason"]) == ("scalar", "ONNXQ_ISA=scalar")
    wrong = describe(library, 'neo"n')
    assert wrong["isa"] == best["isa"]
    assert "not available here" in wrong["warning"]


def test_forced_scalar_path_agrees(library: Path) -> None:
    """The whole agreement test once more in a process that may use no vector instructions."""
    if os.environ.get("ONNXQ_ISA"):
        pytest.skip("already forced")
    tests = [f"{__file__}::test_matmul_agrees_with_layout_text", f"{__file__}::test_any_rank"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"ONNXQ_ISA": "scalar", "ONNXQ_LIBRARY": str(library)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
