"""The kernels of the float8 ops through ONNX Runtime: against ml_dtypes, against their bodies, and on bad files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from onnxq import ops
from tests.custom_ops.float8_reference import (
    E4M3FN,
    KINDS,
    Kind,
    Weight,
    gather_model,
    hard_values,
    matmul_model,
    random_weight,
    round_model,
    rounded,
    token_scales,
)
from tests.custom_ops.test_kernels import new_session

ROOT = Path(__file__).resolve().parents[2]

# Largest error over the sum of |x| |W|: float32 sums of K terms in any order.
FLOAT_TOLERANCE = 1e-6
# Between the kernel and its body, both of which sum in float32.
BODY_TOLERANCE = 2e-6


def relative_error(y: np.ndarray, x: np.ndarray, weight: Weight, bias: np.ndarray | float = 0.0) -> float:
    w = weight.dequantize()
    wide = x.astype(np.float64)
    bound = np.abs(wide) @ np.abs(w).T + np.abs(bias) + 1e-12
    return float(np.max(np.abs(y - (wide @ w.T + bias)) / bound, initial=0.0))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("n", "k", "group_size"),
    [(64, 128, 32), (45, 200, 64), (33, 384, None), (7, 70, 96), (1, 1, None), (70, 1100, 512), (130, 31, 32)],
)
def test_matmul_is_the_dense_product(kind: Kind, n: int, k: int, group_size: int | None, library: Path) -> None:
    rng = np.random.default_rng(n)
    weight = random_weight(rng, kind, n, k, group_size)
    bias = rng.standard_normal(n).astype(np.float32)
    session = new_session(matmul_model(weight, bias), library)
    for rows in (0, 1, 2, 5, 33):
        x = rng.standard_normal((rows, k)).astype(np.float32)
        y = session.run(None, {"x": x})[0]
        assert y.shape == (rows, n)
        assert relative_error(y, x, weight, bias) < FLOAT_TOLERANCE


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_one_scale_and_one_bias(kind: Kind, library: Path) -> None:
    rng = np.random.default_rng(1)
    weight = random_weight(rng, kind, 50, 77, one_scale=True)
    bias = np.array([0.75], np.float32)
    session = new_session(matmul_model(weight, bias), library)
    for rows in (1, 33):
        x = rng.standard_normal((rows, 77)).astype(np.float32)
        assert relative_error(session.run(None, {"x": x})[0], x, weight, bias) < FLOAT_TOLERANCE


@pytest.mark.parametrize("group_size", [32, None])
def test_threads_agree_with_one_thread(group_size: int | None, library: Path) -> None:
    rng = np.random.default_rng(2)
    weight = random_weight(rng, E4M3FN, 2048, 1000, group_size)
    one, two = (new_session(matmul_model(weight), library, threads) for threads in (1, 2))
    for rows in (1, 5, 33):
        x = rng.standard_normal((rows, 1000)).astype(np.float32)
        np.testing.assert_array_equal(one.run(None, {"x": x})[0], two.run(None, {"x": x})[0])


@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 3, 96), (2, 0, 96), (1, 1, 1, 96)])
def test_any_rank(shape: tuple[int, ...], library: Path) -> None:
    rng = np.random.default_rng(3)
    weight = random_weight(rng, E4M3FN, 40, 96, 32)
    x = rng.standard_normal(shape).astype(np.float32)
    y = new_session(matmul_model(weight, x_shape=list(shape)), library).run(None, {"x": x})[0]
    assert y.shape == (*shape[:-1], 40)
    assert relative_error(y, x, weight) < FLOAT_TOLERANCE


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("rows", [2, 12])
def test_not_a_number_stays_in_its_row(bad: float, rows: int, library: Path) -> None:
    weight = random_weight(np.random.default_rng(4), E4M3FN, 40, 97)
    x = np.ones((rows, 97), np.float32)
    x[1, 96] = bad
    y = new_session(matmul_model(weight), library).run(None, {"x": x})[0]
    assert np.isfinite(np.delete(y, 1, axis=0)).all()
    assert not np.isfinite(y[1]).any()


def test_subnormal_codes_survive_a_session_that_flushes_denormals(library: Path) -> None:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    options.register_custom_ops_library(str(library))
    for kind in KINDS:
        codes = kind.finite_codes()
        weight = Weight(kind, codes[:, None], np.full((1, 1), 2.0**-20, np.float16), 1, 1.0)
        for rows in (1, 12):
            session = ort.InferenceSession(matmul_model(weight).SerializeToString(), options)
            y = session.run(None, {"x": np.ones((rows, 1), np.float32)})[0]
            np.testing.assert_array_equal(y, np.broadcast_to(weight.dequantize().T, y.shape))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize("index_type", [TensorProto.INT64, TensorProto.INT32])
def test_gather_is_exact(kind: Kind, group_size: int | None, index_type: int, library: Path) -> None:
    rng = np.random.default_rng(5)
    weight = random_weight(rng, kind, 75, 100, group_size, one_scale=group_size is None)
    indices = rng.integers(-75, 75, (3, 500)).astype(helper.tensor_dtype_to_np_dtype(index_type))
    y = new_session(gather_model(weight, index_type), library, 2).run(None, {"indices": indices})[0]
    np.testing.assert_array_equal(y, weight.dequantize().astype(np.float32)[indices])


@pytest.mark.parametrize("index", [75, -76, 2**40])
def test_gather_refuses_index_out_of_range(index: int, library: Path) -> None:
    session = new_session(gather_model(random_weight(np.random.default_rng(0), E4M3FN, 75, 100)), library)
    with pytest.raises(Exception, match=rf"the_table.*holds {index} at position 1, expected -75 to 74"):
        session.run(None, {"indices": np.array([[0, index]], np.int64)})
    assert session.run(None, {"indices": np.zeros((0, 4), np.int64)})[0].shape == (0, 4, 100)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-8, 3e-9, 1e6])
def test_round_is_ml_dtypes(kind: Kind, scale: float, library: Path) -> None:
    by = np.array(scale, np.float32)
    rng = np.random.default_rng(6)
    x = np.concatenate([hard_values(kind) * by, np.ldexp(rng.standard_normal(100_003), rng.integers(-20, 20, 100_003))])
    x = x.astype(np.float32)
    for shape in ([], [1]):
        y = new_session(round_model(kind, by.reshape(shape), ["n"]), library, 2).run(None, {"x": x})[0]
        np.testing.assert_array_equal(y, rounded(x, by, kind))
    assert np.isnan(new_session(round_model(kind, by, ["n"]), library).run(None, {"x": x[:1] * np.nan})[0]).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("width", [1, 7, 45, 384])
def test_round_tokens_is_ml_dtypes(kind: Kind, width: int, library: Path) -> None:
    rng = np.random.default_rng(7)
    x = np.ldexp(rng.standard_normal((3, 200, width)), rng.integers(-30, 30, (3, 200, 1))).astype(np.float32)
    x[0, 5] = 0
    x[1, 7] = 1e-44  # a scale too small for float32
    y = new_session(round_model(kind, None, ["a", "b", "c"]), library, 2).run(None, {"x": x})[0]
    np.testing.assert_array_equal(y, rounded(x, token_scales(x, kind), kind))
    assert not y[0, 5].any()
    x[2, 9, width // 2] = np.nan
    y = new_session(round_model(kind, None, ["a", "b", "c"]), library).run(None, {"x": x})[0]
    assert np.isnan(y[2, 9]).all()
    assert np.isfinite(np.delete(y[2], 9, axis=0)).all()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (0, 3), (1, 2, 3, 4)])
def test_round_any_rank(shape: tuple[int, ...], library: Path) -> None:
    x = np.random.default_rng(8).standard_normal(shape).astype(np.float32)
    scale = np.array(0.1, np.float32)
    y = new_session(round_model(E4M3FN, scale, list(shape)), library).run(None, {"x": x})[0]
    np.testing.assert_array_equal(y, rounded(x, scale, E4M3FN))
    assert y.shape == shape
    if shape:
        y = new_session(round_model(E4M3FN, None, list(shape)), library).run(None, {"x": x})[0]
        assert y.shape == shape


def with_bodies(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the functions that run it where there is no library."""
    functions = ops.functions_for(model.graph.node[0].op_type, 21)
    model.functions.extend(ir.to_proto(function) for function in functions)
    return model


def stock_session(model: onnx.ModelProto) -> ort.InferenceSession:
    return ort.InferenceSession(with_bodies(model).SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("group_size", [32, None])
def test_kernels_are_the_bodies(kind: Kind, group_size: int | None, library: Path) -> None:
    rng = np.random.default_rng(9)
    weight = random_weight(rng, kind, 45, 100, group_size)
    x = rng.standard_normal((5, 100)).astype(np.float32)
    product = matmul_model(weight)
    ours, theirs = new_session(product, library).run(None, {"x": x})[0], stock_session(product).run(None, {"x": x})[0]
    bound = np.abs(x).astype(np.float64) @ np.abs(weight.dequantize()).T
    assert (np.abs(ours - theirs) <= BODY_TOLERANCE * bound).all()
    table, ids = gather_model(weight), {"indices": np.array([[0, 44, -1]])}
    np.testing.assert_array_equal(new_session(table, library).run(None, ids)[0], stock_session(table).run(None, ids)[0])
    values = hard_values(kind)[None]
    for model in (round_model(kind, np.array(0.37, np.float32), ["a", "b"]), round_model(kind, None, ["a", "b"])):
        feed = {"x": values[:, np.isfinite(values[0])]}
        np.testing.assert_array_equal(
            new_session(model, library).run(None, feed)[0], stock_session(model).run(None, feed)[0]
        )


def test_shape_inference_keeps_symbols(library: Path) -> None:
    weight = random_weight(np.random.default_rng(3), E4M3FN, 40, 96, 32)
    session = new_session(matmul_model(weight, x_shape=["batch", 5, 96]), library)
    assert session.get_outputs()[0].shape == ["batch", 5, 40]
    assert new_session(gather_model(weight), library).get_outputs()[0].shape == ["a", "b", 96]
    for scale in (np.array(1, np.float32), None):
        session = new_session(round_model(E4M3FN, scale, ["batch", 5, "width"]), library)
        assert session.get_outputs()[0].shape == ["batch", 5, "width"]


WRONG_ATTRIBUTES = [
    ({"mantissa_bits": 4}, r"mantissa_bits and exponent_bias are 4 and 7, expected one of 3 and 7 \(e4m3fn\), 2 and"),
    ({"exponent_bias": 15}, r"are 3 and 15, expected one of"),
    ({"group_size": 48}, r"group_size is 48, expected a positive multiple of 32, or 96 \(K\)"),
    ({"group_size": 0}, r"group_size is 0"),
    ({"group_size": -32}, r"group_size is -32"),
    ({"group_size": 64}, r"input 2 \(scales\) is float16 \[40, 3\], expected float16 \[40, 2\]"),
    ({"group_size": 2**62}, r"float16 \[40, 3\], expected float16 \[40, 1\] or \[1, 1\] for N = 40, K = 96"),
    ({"layout_version": 2}, r"layout_version is 2.*reads version 1; update onnxq"),
    ({"K": -1}, r"N = 40 and K = -1"),
    ({"K": 2**62}, r"K = 4611686018427387904"),
    ({"N": 0}, r"N = 0"),
    ({"N": 2**31, "K": 2**27}, r"codes\) is uint8 \[40, 96\], expected uint8 \[2147483648, 134217728\]"),
    ({"N": 65}, r"expected uint8 \[65, 96\]"),
    ({"gain": float("nan")}, r"gain is not a finite number"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_ATTRIBUTES)
def test_wrong_attributes_are_refused_at_session_creation(
    wrong: dict[str, object], message: str, library: Path
) -> None:
    weight = random_weight(np.random.default_rng(0), E4M3FN, 40, 96, 32)
    with pytest.raises(Exception, match="Float8MatMul node 'the_node'.*" + message):
        new_session(matmul_model(weight, **wrong), library)
    with pytest.raises(Exception, match="Float8Gather node 'the_table'.*" + message):
        new_session(gather_model(weight, **wrong), library)


WRONG_TENSORS = [
    ("codes", np.zeros((40, 95), np.uint8), r"input 1 \(codes\) is uint8 \[40, 95\], expected uint8 \[40, 96\]"),
    ("codes", np.zeros((40, 96, 1), np.uint8), r"input 1 \(codes\) is uint8 \[40, 96, 1\]"),
    ("codes", np.zeros(40 * 96, np.uint8), r"input 1 \(codes\) is uint8 \[3840\]"),
    ("scales", np.zeros((40, 2), np.float16), r"input 2 \(scales\) is float16 \[40, 2\].*file is damaged"),
    ("scales", np.zeros((1, 1), np.float16), r"\[1, 1\], expected float16 \[40, 3\] for"),
    ("scales", np.zeros((), np.float16), r"input 2 \(scales\) is float16 \[\]"),
    ("bias", np.zeros(39, np.float32), r"input 3 \(bias\) is float32 \[39\], expected float32 \[40\]"),
    ("bias", np.zeros((), np.float32), r"input 3 \(bias\) is float32 \[\]"),
]


@pytest.mark.parametrize(("name", "array", "message"), WRONG_TENSORS)
def test_wrong_tensors_are_refused_at_session_creation(
    name: str, array: np.ndarray, message: str, library: Path
) -> None:
    weight = random_weight(np.random.default_rng(0), E4M3FN, 40, 96, 32)
    with pytest.raises(Exception, match="the_node.*" + message):
        new_session(matmul_model(weight, replace={name: array}), library)


@pytest.mark.parametrize("name", ["mantissa_bits", "exponent_bias", "group_size", "K", "N"])
def test_missing_attribute_is_refused(name: str, library: Path) -> None:
    model = matmul_model(random_weight(np.random.default_rng(0), E4M3FN, 40, 96))
    kept = [attribute for attribute in model.graph.node[0].attribute if attribute.name != name]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)
    with pytest.raises(Exception, match=f"the_node.*integer attribute '{name}' is missing"):
        new_session(model, library)


def test_wrong_width_of_x_is_refused(library: Path) -> None:
    weight = random_weight(np.random.default_rng(0), E4M3FN, 40, 96)
    session = new_session(matmul_model(weight, x_shape=["rows", "width"]), library)
    with pytest.raises(Exception, match=r"input 0 \(x\) is \[2, 95\], expected \[\.\.\., 96\]"):
        session.run(None, {"x": np.zeros((2, 95), np.float32)})


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (0.0, r"0\.0+, expected a finite number above 0; calibrate"),
        (-1.0, r"-1\.0+"),
        (np.inf, "inf"),
        (np.nan, "-?nan"),
    ],
)
def test_wrong_scale_is_refused(scale: float, message: str, library: Path) -> None:
    value = np.array(scale, np.float32)
    with pytest.raises(Exception, match=r"Float8Round node 'the_node'.*input 1 \(scale\) is " + message):
        new_session(round_model(E4M3FN, value, ["n"]), library)
    session = new_session(round_model(E4M3FN, value, ["n"], scale_input=True), library)
    with pytest.raises(Exception, match=r"the_node.*input 1 \(scale\) is " + message):
        session.run(None, {"x": np.ones(3, np.float32), "scale": value})


def test_wrong_rounding_is_refused(library: Path) -> None:
    one = np.array(1, np.float32)
    for scale in (one, None):
        with pytest.raises(Exception, match=r"the_node.*are 3 and 15, expected one of"):
            new_session(round_model(E4M3FN, scale, ["n"], exponent_bias=15), library)
        with pytest.raises(Exception, match=r"the_node.*layout_version is 2"):
            new_session(round_model(E4M3FN, scale, ["n"], layout_version=2), library)
    with pytest.raises(Exception, match=r"input 1 \(scale\) is float32 \[2\], expected float32 \[\] or \[1\]"):
        new_session(round_model(E4M3FN, np.ones(2, np.float32), ["n"]), library)
    with pytest.raises(Exception, match=r"input 0 \(x\) is \[\], expected \[\.\.\., K\]"):
        new_session(round_model(E4M3FN, None, []), library).run(None, {"x": np.array(1, np.float32)})


def test_weight_as_run_time_input_is_checked_at_each_run(library: Path) -> None:
    rng = np.random.default_rng(10)
    weight = random_weight(rng, E4M3FN, 40, 96)
    model = matmul_model(weight)
    kept = [tensor for tensor in model.graph.initializer if tensor.name == "bias"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.input.append(helper.make_tensor_value_info("codes", TensorProto.UINT8, [None] * 2))
    model.graph.input.append(helper.make_tensor_value_info("scales", TensorProto.FLOAT16, [None] * 2))
    session = new_session(model, library)
    x = rng.standard_normal((2, 96)).astype(np.float32)
    feed = {"x": x, **weight.arrays()}
    assert relative_error(session.run(None, feed)[0], x, weight) < FLOAT_TOLERANCE
    with pytest.raises(Exception, match=r"input 1 \(codes\) is uint8 \[39, 96\]"):
        session.run(None, feed | {"codes": weight.codes[:39]})
    with pytest.raises(Exception, match=r"input 2 \(scales\) is float16 \[39, 1\]"):
        session.run(None, feed | {"scales": weight.scales[:39]})


def test_forced_scalar_path_agrees(library: Path) -> None:
    """The agreement tests once more in a process that may use no vector instructions."""
    if os.environ.get("ONNXQ_ISA"):
        pytest.skip("already forced")
    names = ["test_matmul_is_the_dense_product", "test_gather_is_exact", "test_round_is_ml_dtypes", "test_any_rank"]
    tests = [f"{__file__}::{name}" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"ONNXQ_ISA": "scalar", "ONNXQ_LIBRARY": str(library)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
