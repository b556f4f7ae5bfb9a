"""MixedBitMatMul of the kernel library through ONNX Runtime, against the format in numpy and the function body."""

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

from onnxq.formats import mixed
from onnxq.formats.mixed import DEEPEST, MixedEncoding
from onnxq.formats.packing import BLOCK_K
from tests.custom_ops import mixed_reference
from tests.custom_ops.layout_reference import quantize_activations
from tests.custom_ops.mixed_reference import MixedWeight, mixed_model, relative_error
from tests.custom_ops.test_kernels import new_session
from tests.encodings import random_mixed
from tests.ops.test_lowbit_bodies import run_stock
from tests.ops.test_mixed_bodies import body_model

ROOT = Path(__file__).resolve().parents[2]

# Largest error over the sum of |x| |largest level| scale: float32 sums of K terms in any order. The round trip through
# int8 is reproduced exactly, so only the order of the sums is left there too.
TOLERANCE = 2e-6
LARGEST_LEVEL = 128
ACTIVATION_BLOCK = 128
ROWS = (0, 1, 2, 7, 33)
SHAPES = [(1, 1, 32), (64, 128, 32), (45, 300, 64), (100, 333, 96), (200, 545, 4096), (260, 96, 128)]
DEPTHS = {"all": range(DEEPEST + 1), "none": [0], **{str(depth): [depth] for depth in range(1, DEEPEST + 1)}}


def as_weight(encoding: MixedEncoding) -> MixedWeight:
    return MixedWeight(
        codes=encoding.codes,
        depths=encoding.format.by_band(),
        columns=encoding.columns,
        scales=encoding.scales,
        order=encoding.format.inputs(),
        tables=mixed.tables(),
        steps=mixed.steps(),
        band=encoding.format.band,
        gain=encoding.gain,
    )


def ready_inputs(encoding: MixedEncoding, x: np.ndarray, m: int, *, int8: bool) -> np.ndarray:
    """The stored inputs that levels of one band are multiplied by, float32 [rows, 32 J]."""
    depth = np.repeat(encoding.format.by_band()[m], BLOCK_K)
    ready = np.zeros((len(x), len(depth)), np.float32)
    ready[:, : x.shape[1]] = x[:, encoding.format.inputs()]
    ready = ready * np.exp2(encoding.columns[m].astype(np.float64) / -8).astype(np.float32) * mixed.steps()[depth]
    if int8:
        for bits in set(depth) - {0}:
            ready[:, depth == bits] = quantize_activations(ready[:, depth == bits], ACTIVATION_BLOCK)
    return ready


def largest_error(encoding: MixedEncoding, y: np.ndarray, x: np.ndarray, bias: np.ndarray, *, int8: bool) -> float:
    """Over the sum of |input made ready| times the largest level and the output's scale."""
    n, k = encoding.shape
    order = encoding.format.inputs()
    weight = encoding.dequantize().astype(np.float64)[:, order]
    scales = encoding.scales.astype(np.float64) * encoding.gain
    found = 0.0
    for m, depths in enumerate(encoding.format.by_band()):
        band = slice(m * encoding.format.band, min((m + 1) * encoding.format.band, n))
        ready = ready_inputs(encoding, x, m, int8=int8).astype(np.float64)[:, :k]
        worth = (np.exp2(encoding.columns[m] / -8.0) * mixed.steps()[np.repeat(depths, BLOCK_K)])[:k]
        levels = weight[band] / np.where(worth == 0, 1, worth)
        expected = ready @ levels.T + bias[band]
        bound = np.abs(ready).sum(axis=1)[:, None] * LARGEST_LEVEL * scales[band] + np.abs(bias[band]) + 1e-12
        found = max(found, float(np.max(np.abs(y[:, band] - expected) / bound, initial=0.0)))
    return found


@pytest.mark.parametrize("depths", DEPTHS.values(), ids=DEPTHS)
@pytest.mark.parametrize("accuracy_level", [1, 4])
@pytest.mark.parametrize(("n", "k", "band"), SHAPES)
def test_kernel_agrees_with_the_format(n: int, k: int, band: int, accuracy_level: int, depths, library: Path) -> None:
    encoding = random_mixed(n, k, band, seed=n + k, depths=depths)
    rng = np.random.default_rng(n)
    bias = rng.standard_normal(n).astype(np.float32)
    session = new_session(mixed_model(as_weight(encoding), bias, accuracy_level=accuracy_level), library)
    for rows in ROWS:
        x = rng.standard_normal((rows, k)).astype(np.float32)
        y = session.run(None, {"x": x})[0]
        assert y.shape == (rows, n)
        assert largest_error(encoding, y, x, bias, int8=accuracy_level == 4) <= TOLERANCE


@pytest.mark.parametrize("accuracy_level", [1, 4])
@pytest.mark.parametrize(("n", "k", "rows"), [(100, 96, 1000), (2048, 1536, 200)], ids=["of rows", "of bands and rows"])
def test_turns_agree_with_the_format(n: int, k: int, rows: int, accuracy_level: int, library: Path) -> None:
    """Inputs of many rows, or of many bands, are made ready in turns that share one memory."""
    encoding = random_mixed(n, k, 32, depths=(1, 2, 4, 7))
    x = np.random.default_rng(0).standard_normal((rows, k)).astype(np.float32)
    bias = np.arange(n, dtype=np.float32)
    y = new_session(mixed_model(as_weight(encoding), bias, accuracy_level=accuracy_level), library).run(None, {"x": x})
    assert largest_error(encoding, y[0], x, bias, int8=accuracy_level == 4) <= TOLERANCE


def test_int8_activations_are_close_to_the_weight_itself(library: Path) -> None:
    """Not only to a model of their rounding: 127 steps to the largest of 128 inputs make about 0.6 % of noise."""
    encoding = random_mixed(300, 2048, 128, depths=(1, 2, 3, 4))
    x = np.random.default_rng(0).standard_normal((5, 2048)).astype(np.float32)
    y = new_session(mixed_model(as_weight(encoding)), library).run(None, {"x": x})[0]
    expected = x @ encoding.dequantize().T
    assert np.linalg.norm(y - expected) <= 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("opset", [13, 21, 25])
@pytest.mark.parametrize(("n", "k", "band"), [(100, 96, 64), (45, 100, 32)])
def test_kernel_agrees_with_the_body(n: int, k: int, band: int, opset: int, library: Path) -> None:
    weight = mixed_reference.random_mixed(np.random.default_rng(n), n, k, band, gain=0.5)
    model = body_model(weight, opset, accuracy_level=1)
    x = np.random.default_rng(1).standard_normal((3, k)).astype(np.float32)
    body, kernel = run_stock(model, x), new_session(model, library).run(None, {"x": x})[0]
    assert relative_error(kernel, x, weight) <= TOLERANCE
    assert relative_error(body, x, weight) <= TOLERANCE


@pytest.mark.parametrize("accuracy_level", [1, 4])
def test_threads_agree_with_one_thread(accuracy_level: int, library: Path) -> None:
    model = mixed_model(as_weight(random_mixed(2000, 1000, 160)), accuracy_level=accuracy_level)
    for rows in (1, 33):
        x = np.random.default_rng(1).standard_normal((rows, 1000)).astype(np.float32)
        one = new_session(model, library, 1).run(None, {"x": x})[0]
        two = new_session(model, library, 2).run(None, {"x": x})[0]
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("shape", [(96,), (2, 3, 96), (2, 0, 96)])
def test_any_rank(shape: tuple[int, ...], library: Path) -> None:
    weight = mixed_reference.random_mixed(np.random.default_rng(2), 40, 96, 32)
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    y = new_session(mixed_model(weight, accuracy_level=1, x_shape=list(shape)), library).run(None, {"x": x})[0]
    assert y.shape == (*shape[:-1], 40)
    assert relative_error(y.reshape(-1, 40), x.reshape(-1, 96), weight) <= TOLERANCE


def test_shape_inference_keeps_symbols(library: Path) -> None:
    weight = mixed_reference.random_mixed(np.random.default_rng(3), 40, 96, 32)
    session = new_session(mixed_model(weight, x_shape=["batch", 5, 96]), library)
    assert session.get_outputs()[0].shape == ["batch", 5, 40]


@pytest.mark.parametrize("accuracy_level", [0, 1, 4])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_inputs_that_are_no_numbers_show_in_their_row_alone(bad: float, accuracy_level: int, library: Path) -> None:
    weight = as_weight(random_mixed(70, 200, 32, depths=(2, 5, 8)))
    x = np.random.default_rng(3).standard_normal((3, 200)).astype(np.float32)
    x[1, 77] = bad
    y = new_session(mixed_model(weight, accuracy_level=accuracy_level), library).run(None, {"x": x})[0]
    assert not np.isfinite(y[1]).any()
    assert np.isfinite(y[[0, 2]]).all()


def test_one_bias_for_all(library: Path) -> None:
    weight = mixed_reference.random_mixed(np.random.default_rng(3), 70, 96, 32, depths=(0, 2))
    x = np.random.default_rng(3).standard_normal((3, 96)).astype(np.float32)
    for rows in (1, 3):
        session = new_session(mixed_model(weight, np.array([2.5], np.float32), accuracy_level=1), library)
        assert relative_error(session.run(None, {"x": x[:rows]})[0], x[:rows], weight, 2.5) <= TOLERANCE


def small_weight(**changes: object) -> MixedWeight:
    """N = 40, K = 70 in bands of 32: depths [[1, 2, 8], [0, 5, 1]], 17 rows of 128 bytes."""
    values = mixed_reference.random_mixed(np.random.default_rng(0), 40, 70, 32).__dict__ | {
        "depths": np.array([[1, 2, 8], [0, 5, 1]], np.uint8),
        "order": np.random.default_rng(1).permutation(70).astype(np.uint16),
    }
    codes = np.random.default_rng(2).integers(0, 256, (64, 96), dtype=np.uint8)
    depth = np.repeat(np.repeat(values["depths"], 32, axis=0), 32, axis=1)
    values["codes"] = codes & ((1 << depth.astype(np.int64)) - 1).astype(np.uint8)
    return MixedWeight(**(values | changes))


WRONG_ATTRIBUTES = [
    ({"K": 0}, r"N = 40 and K = 0 must be at least 1 and at most 2\*\*31 and 2\*\*16"),
    ({"K": 65537}, r"N = 40 and K = 65537"),
    ({"K": 2**62}, r"K = 4611686018427387904"),
    ({"K": 64}, r"input 2 \(depths\) is uint8 \[2, 3\], expected uint8 \[2, 2\] for N = 40, K = 64, band = 32"),
    ({"K": 69}, r"input 5 \(order\) is uint16 \[70\], expected uint16 \[69\]"),
    ({"N": -5}, r"N = -5 and K = 70"),
    ({"N": 2**31 + 1}, r"N = 2147483649"),
    ({"N": 2**31}, r"input 2 \(depths\).*expected uint8 \[67108864, 3\]"),
    ({"N": 65}, r"input 2 \(depths\) is uint8 \[2, 3\], expected uint8 \[3, 3\]"),
    ({"N": 41}, None),
    ({"band": 0}, r"band is 0, expected a positive multiple of 32"),
    ({"band": -32}, r"band is -32, expected"),
    ({"band": 48}, r"band is 48, expected"),
    ({"band": 64}, r"input 2 \(depths\) is uint8 \[2, 3\], expected uint8 \[1, 3\] for N = 40, K = 70, band = 64"),
    ({"band": 2**63 - 32}, r"expected uint8 \[1, 3\]"),
    ({"gain": float("nan")}, r"gain is not a finite number"),
    ({"accuracy_level": 2}, r"accuracy_level is 2, expected 1 .* or 4"),
    ({"layout_version": 2}, r"layout_version is 2.*reads version 1; update onnxq"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_ATTRIBUTES)
def test_wrong_attributes_are_refused_at_session_creation(
    wrong: dict[str, object], message: str | None, library: Path
) -> None:
    model = mixed_model(small_weight(), **wrong)
    if message is None:  # as many tiles: nothing shows that it is wrong
        new_session(model, library).run(None, {"x": np.ones((1, 70), np.float32)})
        return
    with pytest.raises(Exception, match="MixedBitMatMul node 'the_node'.*" + message):
        new_session(model, library)


@pytest.mark.parametrize("name", ["K", "N", "band"])
def test_missing_attributes_are_refused(name: str, library: Path) -> None:
    model = mixed_model(small_weight())
    kept = [a for a in model.graph.node[0].attribute if a.name != name]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)
    with pytest.raises(Exception, match=f"integer attribute '{name}' is missing"):
        new_session(model, library)


ORDER = np.arange(70, dtype=np.uint16)
STEPS = mixed.steps()
WRONG_TENSORS = [
    ("packed", np.zeros(17 * 128 - 1, np.uint8), r"input 1 \(packed\) is uint8 \[2175\], expected uint8 \[2176\]"),
    ("packed", np.zeros(17 * 128 + 1, np.uint8), r"\(packed\) is uint8 \[2177\].*as many bytes as the depths call for"),
    ("packed", np.zeros((17, 128), np.uint8), r"\(packed\) is uint8 \[17, 128\]"),
    ("packed", np.zeros(0, np.uint8), r"\(packed\) is uint8 \[0\]"),
    ("depths", np.array([[1, 2, 8], [0, 5, 2]], np.uint8), r"\(packed\) is uint8 \[2176\], expected uint8 \[2304\]"),
    ("depths", np.array([[1, 2, 8], [0, 9, 1]], np.uint8), r"\(depths\) holds 9 at position 4, expected .* 0 to 8"),
    ("depths", np.array([[1, 2, 8]], np.uint8), r"input 2 \(depths\) is uint8 \[1, 3\]"),
    ("depths", np.array([1, 2, 8, 0, 5, 1], np.uint8), r"input 2 \(depths\) is uint8 \[6\], expected uint8 \[2, 3\]"),
    ("columns", np.zeros((2, 70), np.uint8), r"input 3 \(columns\) is uint8 \[2, 70\], expected uint8 \[2, 96\]"),
    ("columns", np.zeros((1, 96), np.uint8), r"input 3 \(columns\) is uint8 \[1, 96\]"),
    ("scales", np.zeros((1, 1, 32), np.float16), r"input 4 \(scales\).*expected float16 \[2, 1, 32\]"),
    ("scales", np.zeros((2, 32), np.float16), r"input 4 \(scales\) is float16 \[2, 32\]"),
    ("order", ORDER[:69], r"input 5 \(order\) is uint16 \[69\], expected uint16 \[70\]"),
    ("order", np.where(ORDER == 7, 70, ORDER).astype(np.uint16), r"holds 70 at position 7, expected each of 0 to 69"),
    ("order", np.where(ORDER == 7, 65535, ORDER).astype(np.uint16), r"\(order\) holds 65535 at position 7"),
    ("order", np.where(ORDER == 7, 3, ORDER).astype(np.uint16), r"\(order\) holds 3 again at position 7"),
    ("tables", np.zeros(159, np.uint8), r"input 6 \(tables\) is uint8 \[159\], expected uint8 \[160\]"),
    ("tables", np.where(np.arange(160) == 99, 128, 5).astype(np.uint8), r"holds 128 at position 99, expected .* 127"),
    ("steps", STEPS[:8], r"input 7 \(steps\) is float32 \[8\], expected float32 \[9\]"),
    ("steps", np.where(np.arange(9) == 3, np.inf, STEPS).astype(np.float32), r"position 3 that is not a finite number"),
    ("bias", np.zeros(39, np.float32), r"input 8 \(bias\) is float32 \[39\], expected float32 \[40\]"),
]


@pytest.mark.parametrize(("name", "array", "message"), WRONG_TENSORS)
def test_wrong_tensors_are_refused_at_session_creation(
    name: str, array: np.ndarray, message: str, library: Path
) -> None:
    with pytest.raises(Exception, match="the_node.*" + message):
        new_session(mixed_model(small_weight(), replace={name: array}), library)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("packed", np.zeros(17 * 128, np.int8)),
        ("depths", np.zeros((2, 3), np.int32)),
        ("scales", np.zeros((2, 1, 32), np.float32)),
        ("order", ORDER.astype(np.int64)),
        ("steps", STEPS.astype(np.float64)),
    ],
)
def test_wrong_types_are_refused(name: str, array: np.ndarray, library: Path) -> None:
    with pytest.raises(Exception, match=r"(?s)[Tt]ype.*the_node"):
        new_session(mixed_model(small_weight(), replace={name: array}), library)


TYPES = {"order": TensorProto.UINT16, "scales": TensorProto.FLOAT16}
FLOATS = ("steps", "bias")


def with_inputs(model: onnx.ModelProto, *names: str) -> onnx.ModelProto:
    """The model with some initializers made inputs, of any shape."""
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in names]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for name in names:
        kind = TensorProto.FLOAT if name in FLOATS else TYPES.get(name, TensorProto.UINT8)
        model.graph.input.append(helper.make_tensor_value_info(name, kind, None))
    return model


@pytest.mark.parametrize("accuracy_level", [1, 4])
def test_everything_as_run_time_input(accuracy_level: int, library: Path) -> None:
    weight = small_weight()
    session = new_session(
        with_inputs(mixed_model(weight, accuracy_level=accuracy_level), *mixed_reference.INPUTS), library
    )
    constant = new_session(mixed_model(weight, accuracy_level=accuracy_level), library)
    arrays = weight.pack() | {"bias": np.zeros(1, np.float32)}
    x = np.random.default_rng(1).standard_normal((3, 70)).astype(np.float32)
    expected = constant.run(None, {"x": x})[0]
    np.testing.assert_array_equal(session.run(None, {"x": x, **arrays})[0], expected)
    # Bit 7 of an entry is not looked at.
    masked = session.run(None, {"x": x, **arrays, "tables": arrays["tables"] | 128})[0]
    np.testing.assert_array_equal(masked, expected)


@pytest.mark.parametrize(("name", "array", "message"), [w for w in WRONG_TENSORS if "holds 128" not in w[2]])
def test_wrong_tensors_are_refused_at_each_run(name: str, array: np.ndarray, message: str, library: Path) -> None:
    weight = small_weight()
    arrays = weight.pack() | {"bias": np.zeros(1, np.float32)}
    x = np.zeros((1, 70), np.float32)
    for inputs in (mixed_reference.INPUTS, [name]):
        session = new_session(with_inputs(mixed_model(weight), *inputs), library)
        good = {key: arrays[key] for key in inputs}
        session.run(None, {"x": x, **good})
        with pytest.raises(Exception, match="the_node.*" + message):
            session.run(None, {"x": x, **good, name: array})


def test_depths_as_run_time_input_decide_the_weight(library: Path) -> None:
    weights = [small_weight(), small_weight(depths=np.zeros((2, 3), np.uint8))]
    session = new_session(with_inputs(mixed_model(weights[0], accuracy_level=1), "depths", "packed"), library)
    x = np.random.default_rng(1).standard_normal((2, 70)).astype(np.float32)
    for weight in (*weights, weights[0]):
        arrays = weight.pack()
        y = session.run(None, {"x": x, "depths": arrays["depths"], "packed": arrays["packed"]})[0]
        assert relative_error(y, x, weight) <= TOLERANCE


def test_x_of_another_width_is_refused(library: Path) -> None:
    session = new_session(mixed_model(small_weight(), x_shape=["rows", None]), library)
    with pytest.raises(Exception, match=r"input 0 \(x\) is \[1, 71\], expected \[\.\.\., 70\]; feed inputs as wide"):
        session.run(None, {"x": np.zeros((1, 71), np.float32)})


def test_external_data(tmp_path: Path, library: Path) -> None:
    weight = mixed_reference.random_mixed(np.random.default_rng(7), 64, 512, 32)
    path = tmp_path / "m.onnx"
    onnx.save(mixed_model(weight, accuracy_level=1), path, save_as_external_data=True, size_threshold=0)
    x = np.random.default_rng(1).standard_normal((2, 512)).astype(np.float32)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    y = ort.InferenceSession(str(path), options).run(None, {"x": x})[0]
    assert relative_error(y, x, weight) <= TOLERANCE


def test_forced_scalar_path_agrees(library: Path) -> None:
    """The agreement test of some shapes once more in a process that may use no vector instructions."""
    if os.environ.get("ONNXQ_ISA"):
        pytest.skip("already forced")
    tests = [f"{__file__}::test_kernel_agrees_with_the_format"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "all", *tests]
    environment = os.environ | {"ONNXQ_ISA": "scalar", "ONNXQ_LIBRARY": str(library)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
