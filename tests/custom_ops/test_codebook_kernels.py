"""CodebookMatMul of the kernel library through ONNX Runtime, against the op's text in numpy and its function body."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from tests.custom_ops.codebook_reference import (
    CodebookWeight,
    codebook_model,
    column_group,
    random_codebook,
    relative_error,
)
from tests.custom_ops.layout_reference import quantize_activations
from tests.custom_ops.test_kernels import new_session
from tests.ops.test_codebook_bodies import FORMATS, body_model
from tests.ops.test_lowbit_bodies import run_stock

ROOT = Path(__file__).resolve().parents[2]

# Largest error over the sum of |x| |level| scale: float32 sums of K terms in any order.
FLOAT_TOLERANCE = 2e-6
# The round trip through int8 is exact in the reference, so only the order of the sums is left here too.
INT8_TOLERANCE = 2e-6
ALL_FORMATS = sorted({*FORMATS, (5, 5), (5, 6), (6, 6)})
ROWS = (0, 1, 3, 17, 40)


def check(weight: CodebookWeight, accuracy_level: int, library: Path) -> None:
    rng = np.random.default_rng(weight.n * 1000 + weight.k)
    bias = rng.standard_normal(weight.n).astype(np.float32)
    session = new_session(codebook_model(weight, bias, accuracy_level=accuracy_level), library)
    for rows in ROWS:
        x = rng.standard_normal((rows, weight.k)).astype(np.float32)
        y = session.run(None, {"x": x})[0]
        assert y.shape == (rows, weight.n)
        used = x if accuracy_level == 1 else quantize_activations(x, weight.group_size)
        limit = FLOAT_TOLERANCE if accuracy_level == 1 else INT8_TOLERANCE
        assert relative_error(y, used, weight, bias) <= limit


@pytest.mark.parametrize("n", [20, 33, 100])
@pytest.mark.parametrize("accuracy_level", [1, 4])
@pytest.mark.parametrize(("bits", "window"), ALL_FORMATS)
def test_kernel_agrees_with_the_text(bits: int, window: int, accuracy_level: int, n: int, library: Path) -> None:
    rng = np.random.default_rng(bits * 100 + window * 10 + n)
    for k in (33, 96, 160):
        for group_size in (32, 64, 128, column_group(k)):
            for shared_zero in (True, False):
                weight = random_codebook(rng, n, k, bits, window, group_size, shared_zero=shared_zero, gain=0.25)
                check(weight, accuracy_level, library)


@pytest.mark.parametrize("accuracy_level", [1, 4])
@pytest.mark.parametrize(("bits", "window"), [(1, 2), (1, 3), (2, 3)])
def test_windows_that_a_wider_kernel_serves(bits: int, window: int, accuracy_level: int, library: Path) -> None:
    check(random_codebook(np.random.default_rng(window), 200, 160, bits, window, 64), accuracy_level, library)


@pytest.mark.parametrize("opset", [13, 21, 25])
@pytest.mark.parametrize(("bits", "window"), ALL_FORMATS)
def test_kernel_agrees_with_the_body(bits: int, window: int, opset: int, library: Path) -> None:
    weight = random_codebook(np.random.default_rng(bits), 100, 160, bits, window, 64, shared_zero=False)
    model = body_model(weight, opset)
    next(a for a in model.graph.node[0].attribute if a.name == "accuracy_level").i = 1
    x = np.random.default_rng(1).standard_normal((3, 160)).astype(np.float32)
    body, kernel = run_stock(model, x), new_session(model, library).run(None, {"x": x})[0]
    assert relative_error(kernel, x, weight) <= FLOAT_TOLERANCE
    assert relative_error(body, x, weight) <= FLOAT_TOLERANCE


def test_largest_levels_and_inputs_do_not_overflow(library: Path) -> None:
    weight = random_codebook(np.random.default_rng(0), 64, 256, 2, 4, 128)
    weight.table[:] = 127
    for sign in (1, -1):
        for rows in (1, 2, 13):
            x = np.full((rows, 256), sign, np.float32)
            y = new_session(codebook_model(weight), library).run(None, {"x": x})[0]
            assert relative_error(y, x, weight) <= INT8_TOLERANCE


@pytest.mark.parametrize("accuracy_level", [1, 4])
def test_threads_agree_with_one_thread(accuracy_level: int, library: Path) -> None:
    rng = np.random.default_rng(1)
    weight = random_codebook(rng, 2048, 1000, 3, 6, 1024, shared_zero=False)
    model = codebook_model(weight, accuracy_level=accuracy_level)
    for rows in (1, 33):
        x = rng.standard_normal((rows, 1000)).astype(np.float32)
        one = new_session(model, library, 1).run(None, {"x": x})[0]
        two = new_session(model, library, 2).run(None, {"x": x})[0]
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("shape", [(96,), (2, 3, 96), (2, 0, 96)])
def test_any_rank(shape: tuple[int, ...], library: Path) -> None:
    weight = random_codebook(np.random.default_rng(2), 40, 96, 2, 4, 32)
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    y = new_session(codebook_model(weight, accuracy_level=1, x_shape=list(shape)), library).run(None, {"x": x})[0]
    assert y.shape == (*shape[:-1], 40)
    assert relative_error(y.reshape(-1, 40), x.reshape(-1, 96), weight) <= FLOAT_TOLERANCE


def test_shape_inference_keeps_symbols(library: Path) -> None:
    weight = random_codebook(np.random.default_rng(3), 40, 96, 4, 5, 32)
    session = new_session(codebook_model(weight, x_shape=["batch", 5, 96]), library)
    assert session.get_outputs()[0].shape == ["batch", 5, 40]


WRONG_ATTRIBUTES = [
    ({"bits": 0}, r"bits is 0, expected 1 to 6"),
    ({"bits": 7}, r"bits is 7, expected 1 to 6"),
    ({"bits": 5}, r"input 1 \(packed\) is uint8 \[2, 3, 2, 32, 4\], expected uint8 \[2, 3, 5, 32, 4\]"),
    ({"bits": 3}, r"input 1 \(packed\) is uint8 \[2, 3, 2, 32, 4\], expected uint8 \[2, 3, 3, 32, 4\]"),
    ({"window": 1}, r"window is 1, expected 2 \(bits\) to 6"),
    ({"window": 7}, r"window is 7, expected 2 \(bits\) to 6"),
    ({"window": 2**40}, r"window is 1099511627776"),
    ({"window": 5}, r"input 2 \(table\) is uint8 \[16\], expected uint8 \[32\] for window = 5"),
    ({"group_size": 48}, r"group_size is 48, expected a positive multiple of 32"),
    ({"group_size": 64}, r"input 3 \(scales\) is float16 \[2, 3, 32\], expected float16 \[2, 2, 32\]"),
    ({"layout_version": 2}, r"layout_version is 2.*reads version 1; update onnxq"),
    ({"K": -1}, r"N = 40 and K = -1"),
    ({"N": 65}, r"expected uint8 \[3, 3, 2, 32, 4\]"),
    ({"gain": float("inf")}, r"gain is not a finite number"),
    ({"accuracy_level": 2}, r"accuracy_level is 2, expected 1 .* or 4"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_ATTRIBUTES)
def test_wrong_attributes_are_refused_at_session_creation(
    wrong: dict[str, object], message: str, library: Path
) -> None:
    weight = random_codebook(np.random.default_rng(0), 40, 96, 2, 4, 32)
    with pytest.raises(Exception, match="CodebookMatMul node 'the_node'.*" + message):
        new_session(codebook_model(weight, **wrong), library)


@pytest.mark.parametrize("name", ["bits", "window"])
def test_missing_attributes_are_refused(name: str, library: Path) -> None:
    model = codebook_model(random_codebook(np.random.default_rng(0), 40, 96, 2, 4, 32))
    kept = [a for a in model.graph.node[0].attribute if a.name != name]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)
    with pytest.raises(Exception, match=f"integer attribute '{name}' is missing"):
        new_session(model, library)


WRONG_TENSORS = [
    ("packed", np.zeros((2, 3, 2, 31, 4), np.uint8), r"\[2, 3, 2, 31, 4\], expected uint8 \[2, 3, 2, 32, 4\]"),
    ("table", np.zeros((4, 4), np.uint8), r"input 2 \(table\) is uint8 \[4, 4\], expected uint8 \[16\]"),
    ("table", np.zeros(15, np.uint8), r"input 2 \(table\) is uint8 \[15\]"),
    ("table", np.array([0] * 9 + [128] + [0] * 6, np.uint8), r"holds 128 at position 9, expected levels of 0 to 127"),
    ("scales", np.zeros((2, 2, 32), np.float16), r"input 3 \(scales\)"),
    ("zero_points", np.zeros((2, 1, 32), np.uint8), r"input 4 \(zero_points\).*or \[1, 1, 1\]"),
    ("bias", np.zeros(39, np.float32), r"input 5 \(bias\) is float32 \[39\], expected float32 \[40\]"),
]


@pytest.mark.parametrize(("name", "array", "message"), WRONG_TENSORS)
def test_wrong_tensors_are_refused_at_session_creation(
    name: str, array: np.ndarray, message: str, library: Path
) -> None:
    weight = random_codebook(np.random.default_rng(0), 40, 96, 2, 4, 32)
    with pytest.raises(Exception, match="the_node.*" + message):
        new_session(codebook_model(weight, replace={name: array}), library)


def test_table_as_run_time_input_is_checked_at_each_run_and_its_bit_7_ignored(library: Path) -> None:
    weight = random_codebook(np.random.default_rng(6), 40, 96, 2, 4, 32)
    model = codebook_model(weight, accuracy_level=1)
    kept = [t for t in model.graph.initializer if t.name != "table"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.input.append(helper.make_tensor_value_info("table", TensorProto.UINT8, [None]))
    session = new_session(model, library)
    x = np.random.default_rng(1).standard_normal((2, 96)).astype(np.float32)
    for table in (weight.table, weight.table | 128):
        assert relative_error(session.run(None, {"x": x, "table": table})[0], x, weight) <= FLOAT_TOLERANCE
    with pytest.raises(Exception, match=r"input 2 \(table\) is uint8 \[8\], expected uint8 \[16\]"):
        session.run(None, {"x": x, "table": weight.table[:8]})


def test_external_data(tmp_path: Path, library: Path) -> None:
    weight = random_codebook(np.random.default_rng(7), 64, 512, 2, 6, 64)
    path = tmp_path / "m.onnx"
    model = codebook_model(weight, accuracy_level=1)
    onnx.save(model, path, save_as_external_data=True, size_threshold=0)
    x = np.random.default_rng(1).standard_normal((2, 512)).astype(np.float32)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    y = ort.InferenceSession(str(path), options).run(None, {"x": x})[0]
    assert relative_error(y, x, weight) <= FLOAT_TOLERANCE


def test_forced_scalar_path_agrees(library: Path) -> None:
    """The agreement test of one shape once more in a process that may use no vector instructions."""
    if os.environ.get("ONNXQ_ISA"):
        pytest.skip("already forced")
    tests = [f"{__file__}::test_kernel_agrees_with_the_text", f"{__file__}::test_windows_that_a_wider_kernel_serves"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "33 or wider", *tests]
    environment = os.environ | {"ONNXQ_ISA": "scalar", "ONNXQ_LIBRARY": str(library)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
