"""The kernels of binary codes through ONNX Runtime: against numpy, against their bodies, and on bad files."""

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
from tests.custom_ops.binary_reference import (
    INPUTS,
    BinaryWeight,
    binary_model,
    gather_model,
    random_binary,
    relative_error,
)
from tests.custom_ops.test_kernels import new_session

ROOT = Path(__file__).resolve().parents[2]

# Largest error over the sum of |x| times the sum of a row's scales: float32 sums in any order.
FLOAT_TOLERANCE = 1e-6
# Between the kernel and its body, both of which sum in float32.
BODY_TOLERANCE = 2e-6
# The same with int8 tables: half a step of 1/127 of the largest sum of four inputs' magnitudes, which is less than
# twice the mean one here.
TABLE_TOLERANCE = 1 / 127
# Root of the mean squared error over that of y, for normal inputs: less than int8 activations are allowed.
TABLE_NOISE = 1e-2
# A decoded weight: a sum of seven numbers up to 1.
DECODE_TOLERANCE = 1e-6

PLANES = {
    **{f"{planes} of all rows": (70,) * planes for planes in range(1, 7)},
    "nested": (200, 130, 129, 64, 63, 2),
    "few rows": (3, 1, 1),
    "one row": (1,),
}
COLUMNS = [(33, None), (128, 32), (100, 64), (3, None), (300, 96)]


@pytest.mark.parametrize("ordered", [False, True], ids=["natural", "ordered"])
@pytest.mark.parametrize("offset", [False, True], ids=["", "offset"])
@pytest.mark.parametrize(("k", "group_size"), COLUMNS)
@pytest.mark.parametrize("planes", PLANES.values(), ids=PLANES)
def test_matmul_is_the_dense_product(
    planes: tuple[int, ...], k: int, group_size: int | None, offset: bool, ordered: bool, library: Path
) -> None:
    rng = np.random.default_rng(k)
    weight = random_binary(rng, planes, k, group_size, offset=offset, ordered=ordered, gain=0.25)
    bias = rng.standard_normal(weight.n).astype(np.float32)
    parts = [rng.standard_normal((rows, k)).astype(np.float32) for rows in (0, 1, 3, 33)]
    for level, tolerance in ((1, FLOAT_TOLERANCE), (4, TABLE_TOLERANCE)):
        session = new_session(binary_model(weight, bias, accuracy_level=level), library)
        y = np.concatenate([session.run(None, {"x": x})[0] for x in parts])
        assert y.shape == (37, weight.n)
        assert relative_error(y, np.concatenate(parts), weight, bias) < tolerance


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("planes", [1, 2, 3, 4, 6])
def test_noise_of_int8_tables(planes: int, rows: int, library: Path) -> None:
    rng = np.random.default_rng(planes)
    weight = random_binary(rng, (256,) * planes, 512)
    x = rng.standard_normal((rows, 512)).astype(np.float32)
    y = new_session(binary_model(weight), library).run(None, {"x": x})[0]
    expected = x.astype(np.float64) @ weight.dequantize().T
    assert np.sqrt(np.mean((y - expected) ** 2) / np.mean(expected**2)) < TABLE_NOISE


@pytest.mark.parametrize("level", [1, 4])
def test_one_bias(level: int, library: Path) -> None:
    rng = np.random.default_rng(1)
    bias = np.array([0.75], np.float32)
    for ordered in (False, True):
        weight = random_binary(rng, (70, 20), 77, ordered=ordered)
        session = new_session(binary_model(weight, bias, accuracy_level=level), library)
        for rows in (1, 33):
            x = rng.standard_normal((rows, 77)).astype(np.float32)
            assert relative_error(session.run(None, {"x": x})[0], x, weight, bias) < TABLE_TOLERANCE


@pytest.mark.parametrize("level", [1, 4])
@pytest.mark.parametrize(("planes", "ordered"), [((2000, 2000, 2000), False), ((2000, 700, 130, 1), True)])
def test_threads_agree_with_one_thread(planes: tuple[int, ...], ordered: bool, level: int, library: Path) -> None:
    rng = np.random.default_rng(2)
    weight = random_binary(rng, planes, 96, 32, offset=True, ordered=ordered)
    one, two = (new_session(binary_model(weight, accuracy_level=level), library, threads) for threads in (1, 2))
    for rows in (1, 5, 200):
        x = rng.standard_normal((rows, 96)).astype(np.float32)
        np.testing.assert_array_equal(one.run(None, {"x": x})[0], two.run(None, {"x": x})[0])


@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 3, 96), (2, 0, 96), (1, 1, 1, 96)])
def test_any_rank(shape: tuple[int, ...], library: Path) -> None:
    rng = np.random.default_rng(3)
    weight = random_binary(rng, (40, 9), 96, 32)
    x = rng.standard_normal(shape).astype(np.float32)
    y = new_session(binary_model(weight, x_shape=list(shape)), library).run(None, {"x": x})[0]
    assert y.shape == (*shape[:-1], 40)
    assert relative_error(y.reshape(-1, 40), x.reshape(-1, 96), weight) < TABLE_TOLERANCE


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("level", [1, 4])
def test_not_a_number_stays_in_its_row(bad: float, rows: int, level: int, library: Path) -> None:
    weight = random_binary(np.random.default_rng(4), (40, 40, 3), 97)
    x = np.ones((rows, 97), np.float32)
    x[1, 96] = bad
    y = new_session(binary_model(weight, accuracy_level=level), library).run(None, {"x": x})[0]
    assert np.isfinite(np.delete(y, 1, axis=0)).all()
    assert not np.isfinite(y[1]).any()


def test_what_is_stored_and_does_not_count(library: Path) -> None:
    """Bits, scales and offsets of rows and inputs that are not there."""
    weight = random_binary(np.random.default_rng(0), (70, 5), 33, offset=True)
    arrays = weight.pack()
    codes, scales, offsets = (arrays[name].copy() for name in ("codes", "scales", "offsets"))
    planes = codes[: 2 * 16 * 32].reshape(2, 16, 32), codes[2 * 16 * 32 :].reshape(1, 16, 32)
    planes[0][1, :, 6:] = planes[1][0, :, 5:] = 255
    planes[0][:, 9:] = 255
    planes[0][0, 8] |= 0xEE
    scales[70:128] = scales[128 + 5 :] = offsets[1, :, 6:] = np.nan
    replaced = {"codes": codes, "scales": scales, "offsets": offsets}
    for level in (1, 4):
        sound = new_session(binary_model(weight, accuracy_level=level), library)
        other = new_session(binary_model(weight, accuracy_level=level, replace=replaced), library)
        for rows in (1, 40):
            x = np.random.default_rng(1).standard_normal((rows, 33)).astype(np.float32)
            np.testing.assert_array_equal(other.run(None, {"x": x})[0], sound.run(None, {"x": x})[0])


@pytest.mark.parametrize("planes", PLANES.values(), ids=PLANES)
@pytest.mark.parametrize(("k", "group_size"), COLUMNS)
@pytest.mark.parametrize("index_type", [TensorProto.INT64, TensorProto.INT32])
def test_gather_is_the_row(
    planes: tuple[int, ...], k: int, group_size: int | None, index_type: int, library: Path
) -> None:
    rng = np.random.default_rng(5)
    for extras in (False, True):
        weight = random_binary(rng, planes, k, group_size, offset=extras, ordered=extras, gain=2.0)
        indices = rng.integers(-weight.n, weight.n, (3, 5)).astype(helper.tensor_dtype_to_np_dtype(index_type))
        y = new_session(gather_model(weight, index_type), library, 2).run(None, {"x": indices})[0]
        np.testing.assert_allclose(y, weight.dequantize()[indices], atol=2 * DECODE_TOLERANCE)


@pytest.mark.parametrize("index", [75, -76, 2**40])
def test_gather_refuses_index_out_of_range(index: int, library: Path) -> None:
    session = new_session(gather_model(random_binary(np.random.default_rng(0), (75, 3), 100)), library)
    with pytest.raises(Exception, match=rf"holds {index} at position 1, expected -75 to 74"):
        session.run(None, {"x": np.array([[0, index]], np.int64)})
    assert session.run(None, {"x": np.zeros((0, 4), np.int64)})[0].shape == (0, 4, 100)


def stock_session(model: onnx.ModelProto) -> ort.InferenceSession:
    """Without the library, on the functions that run the ops then."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    model.functions.extend(ir.to_proto(f) for f in ops.functions_for(model.graph.node[0].op_type, 21))
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("planes", [(70, 70, 70), (150, 101, 64, 63, 2)])
@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("extras", [False, True])
def test_kernels_are_the_bodies(planes: tuple[int, ...], group_size: int | None, extras: bool, library: Path) -> None:
    rng = np.random.default_rng(9)
    weight = random_binary(rng, planes, 100, group_size, offset=extras, ordered=extras)
    reach = np.abs(weight.scales.astype(np.float64)).sum((0, 2)).max() + 1
    for level, tolerance in ((1, BODY_TOLERANCE), (4, TABLE_TOLERANCE)):
        product = binary_model(weight, accuracy_level=level)
        for rows in (1, 5, 40):
            x = rng.standard_normal((rows, 100)).astype(np.float32)
            ours, theirs = (s.run(None, {"x": x})[0] for s in (new_session(product, library), stock_session(product)))
            assert (np.abs(ours - theirs) <= tolerance * np.abs(x).sum(1, keepdims=True) * reach).all()
    table, ids = gather_model(weight), {"x": np.arange(-weight.n, weight.n)[None]}
    np.testing.assert_array_equal(new_session(table, library).run(None, ids)[0], stock_session(table).run(None, ids)[0])


def test_shape_inference_keeps_symbols(library: Path) -> None:
    weight = random_binary(np.random.default_rng(3), (40, 7), 96, 32)
    session = new_session(binary_model(weight, x_shape=["batch", 5, 96]), library)
    assert session.get_outputs()[0].shape == ["batch", 5, 40]
    assert new_session(gather_model(weight, shape=["a", "b"]), library).get_outputs()[0].shape == ["a", "b", 96]


WRONG_ATTRIBUTES = [
    ({"plane_rows": [70, 71]}, r"plane_rows is \[70, 71\], expected numbers of rows that don't rise, down to 1"),
    ({"plane_rows": [70, 0]}, r"plane_rows is \[70, 0\]"),
    ({"plane_rows": [70, -1]}, r"plane_rows is \[70, -1\]"),
    ({"plane_rows": [70, -(2**62)]}, r"plane_rows is \[70, -4611"),
    ({"plane_rows": [64, 5]}, r"plane_rows is \[64, 5\], expected 70 \(N\) first"),
    ({"plane_rows": [2**62, 5]}, r"expected 70 \(N\) first"),
    ({"plane_rows": [70] * 7}, r"expected 1 to 6 numbers of rows"),
    ({"plane_rows": 70}, r"plane_rows is \[\], expected 1 to 6 numbers of rows"),
    ({"plane_rows": [70, 65]}, r"input 1 \(codes\) is uint8 \[2304\], expected uint8 \[3072\] for N = 70, K = 96"),
    ({"plane_rows": [70]}, r"input 1 \(codes\) is uint8 \[2304\], expected uint8 \[1536\]"),
    ({"group_size": 48}, r"group_size is 48, expected a positive multiple of 32"),
    ({"group_size": 0}, r"group_size is 0"),
    ({"group_size": -32}, r"group_size is -32"),
    ({"group_size": 64}, r"input 2 \(scales\) is float16 \[576\], expected float16 \[384\]"),
    ({"group_size": 2**62}, r"input 2 \(scales\) is float16 \[576\], expected float16 \[192\]"),
    ({"layout_version": 2}, r"layout_version is 2.*reads version 1; update onnxq"),
    ({"K": -1}, r"N = 70 and K = -1"),
    ({"K": 2**62}, r"K = 4611686018427387904"),
    ({"K": 97}, r"input 1 \(codes\) is uint8 \[2304\], expected uint8 \[3072\]"),
    ({"N": 0}, r"N = 0"),
    ({"N": 2**31, "K": 2**27, "plane_rows": [2**31] * 6}, r"expected uint8 \[216172782113783808\]"),
    ({"gain": float("nan")}, r"gain is not a finite number"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_ATTRIBUTES)
def test_wrong_attributes_are_refused_at_session_creation(
    wrong: dict[str, object], message: str, library: Path
) -> None:
    weight = random_binary(np.random.default_rng(0), (70, 5), 96, 32)
    with pytest.raises(Exception, match="BinaryCodeMatMul node 'the_node'.*" + message):
        new_session(binary_model(weight, **wrong), library)
    with pytest.raises(Exception, match="MixedBitGather node.*" + message):
        new_session(gather_model(weight, **wrong), library)


def test_wrong_accuracy_level_is_refused(library: Path) -> None:
    with pytest.raises(Exception, match=r"the_node.*accuracy_level is 3"):
        new_session(binary_model(random_binary(np.random.default_rng(0), (9,), 32), accuracy_level=3), library)


WRONG_TENSORS = [
    ("codes", np.zeros(2303, np.uint8), r"input 1 \(codes\) is uint8 \[2303\], expected uint8 \[2304\]"),
    ("codes", np.zeros((2304, 1), np.uint8), r"input 1 \(codes\) is uint8 \[2304, 1\]"),
    ("scales", np.zeros(575, np.float16), r"input 2 \(scales\) is float16 \[575\].*file is damaged"),
    ("scales", np.zeros((9, 64), np.float16), r"input 2 \(scales\) is float16 \[9, 64\]"),
    ("offsets", np.zeros((2, 2, 64), np.float16), r"input 3 \(offsets\) is float16 \[2, 2, 64\], expected"),
    ("offsets", np.zeros((1, 3, 64), np.float16), r"expected float16 \[2, 3, 64\], or \[1\] for none"),
    ("offsets", np.zeros((), np.float16), r"input 3 \(offsets\) is float16 \[\]"),
    ("offsets", np.ones(1, np.float16), r"input 3 \(offsets\) is one value that is not zero"),
    ("rank", np.zeros(69, np.int32), r"input 4 \(rank\) is int32 \[69\], expected int32 \[70\], or \[1\]"),
    ("rank", np.zeros((70, 1), np.int32), r"input 4 \(rank\) is int32 \[70, 1\]"),
    ("rank", np.zeros(0, np.int32), r"input 4 \(rank\) is int32 \[0\]"),
    ("rank", np.zeros(1, np.int32), r"input 4 \(rank\) is \[1\] and holds 0, expected -1"),
    ("rank", np.full(70, 70, np.int32), r"input 4 \(rank\) holds 70 at position 0, expected 0 to 69"),
    ("rank", np.arange(-1, 69, dtype=np.int32), r"input 4 \(rank\) holds -1 at position 0"),
    ("rank", np.append(np.arange(69), -(2**31)).astype(np.int32), r"holds -2147483648 at position 69"),
]


@pytest.mark.parametrize(("name", "array", "message"), WRONG_TENSORS)
def test_wrong_tensors_are_refused_at_session_creation(
    name: str, array: np.ndarray, message: str, library: Path
) -> None:
    weight = random_binary(np.random.default_rng(0), (70, 5), 96, 32)
    with pytest.raises(Exception, match="the_node.*" + message):
        new_session(binary_model(weight, replace={name: array}), library)
    with pytest.raises(Exception, match="MixedBitGather node.*" + message):
        new_session(gather_model(weight, replace={name: array}), library)


@pytest.mark.parametrize("name", ["plane_rows", "group_size", "K", "N"])
def test_missing_attribute_is_refused(name: str, library: Path) -> None:
    model = binary_model(random_binary(np.random.default_rng(0), (40,), 96))
    kept = [attribute for attribute in model.graph.node[0].attribute if attribute.name != name]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)
    with pytest.raises(Exception, match=f"the_node.*attribute '{name}'.* is missing"):
        new_session(model, library)


def test_weight_as_run_time_input_is_checked_at_each_run(library: Path) -> None:
    rng = np.random.default_rng(10)
    weight = random_binary(rng, (70, 5), 96, 32, offset=True, ordered=True)
    model = binary_model(weight)
    arrays = weight.pack()
    kept = [tensor for tensor in model.graph.initializer if tensor.name == "bias"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for name in INPUTS:
        kind = helper.np_dtype_to_tensor_dtype(arrays[name].dtype)
        model.graph.input.append(helper.make_tensor_value_info(name, kind, None))
    session = new_session(model, library)
    feed = {"x": rng.standard_normal((2, 96)).astype(np.float32), **arrays}
    assert relative_error(session.run(None, feed)[0], feed["x"], weight) < TABLE_TOLERANCE
    with pytest.raises(Exception, match=r"input 1 \(codes\) is uint8 \[2303\]"):
        session.run(None, feed | {"codes": arrays["codes"][:-1]})
    with pytest.raises(Exception, match=r"input 4 \(rank\) holds 70"):
        session.run(None, feed | {"rank": arrays["rank"] + 1})
    plain: BinaryWeight = random_binary(rng, (70, 5), 96, 32)
    y = session.run(None, {"x": feed["x"], **plain.pack()})[0]
    assert relative_error(y, feed["x"], plain) < TABLE_TOLERANCE


def test_forced_scalar_path_agrees(library: Path) -> None:
    """The agreement tests once more in a process that may use no vector instructions."""
    if os.environ.get("ONNXQ_ISA"):
        pytest.skip("already forced")
    names = ["test_matmul_is_the_dense_product", "test_any_rank", "test_not_a_number_stays_in_its_row"]
    tests = [f"{__file__}::{name}" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"ONNXQ_ISA": "scalar", "ONNXQ_LIBRARY": str(library)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
