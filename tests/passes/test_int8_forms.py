"""The products of 8-bit weights and 8-bit activations that FP8 is compared with: fused by ONNX Runtime, and right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxq.calibration.clipping import ActivationScale, round_with
from onnxq.formats.uniform import UniformEncoding, UniformFormat, ZeroPoint
from onnxq.graph import find_weights
from onnxq.passes.activations import Rounding
from onnxq.passes.forms import StoredWeight
from onnxq.passes.forms.int8 import Int8DynamicForm, Int8StaticForm, int8_refusal
from onnxq.passes.rewrite import Assignment, RewriteSitesPass
from onnxq.solvers.nearest import nearest
from tests.encodings import random_encoding, relative_error
from tests.passes.levels import LEVELS, run_at
from tests.passes.test_rewrite import make_model, weight

FLOAT32_SUMMATION = 2e-6
WHOLE = UniformFormat(8, None, ZeroPoint.INTEGER)
K, N = 96, 40
SCALE = ActivationScale("uint8", 2.0**-5, 117)
X = np.random.default_rng(0).standard_normal((2, 5, K)).astype(np.float32)
FORMS = [Int8StaticForm(), Int8DynamicForm(), Int8StaticForm(signed=True), Int8DynamicForm(signed=True)]


def name_of(form: object) -> str:
    return f"{type(form).__name__}{'-signed' if form.signed else ''}"  # type: ignore[attr-defined]


def encoded(matrix: np.ndarray, *, one_scale: bool = False, reduced: bool = False) -> UniformEncoding:
    """Rounded to nearest; reduced: to codes of 7 bits, whose pairs of products fit 16 bits."""
    found = nearest(matrix, WHOLE)
    if one_scale:
        found = UniformEncoding(
            WHOLE, found.codes, np.full_like(found.scales, found.scales.max()), found.zero_points, found.gain
        )
    if reduced:
        codes = ((found.codes.astype(np.int16) - 128) // 2 + 128).astype(np.uint8)
        found = UniformEncoding(WHOLE, codes, found.scales, found.zero_points, found.gain)
    return found


def stored(
    form: Int8StaticForm | Int8DynamicForm, proto: onnx.ModelProto, **options: bool
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """All products in the form, and what their weights decode to, [K, N]."""
    model = ir.from_proto(proto)
    rounding = Rounding("uint8", SCALE, stock=True) if isinstance(form, Int8StaticForm) else None
    assignments, decoded = [], {}
    for found in find_weights(model).weights:
        encoding = encoded(found.matrix(), **options)
        tensors = {
            role: ir.Value(name=f"{found.name}.{role}", const_value=ir.tensor(array))
            for role, array in form.arrays(encoding).items()
        }
        part = StoredWeight(found.name, form, encoding.shape, form.attributes(encoding), tensors)
        assignments.append(Assignment(found, (part,), rounding))
        decoded[found.name] = encoding.dequantize().T
    RewriteSitesPass(assignments)(model)
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    return after, decoded


def dynamic(x: np.ndarray) -> np.ndarray:
    """DynamicQuantizeLinear and back."""
    low, high = np.float32(min(x.min(), 0)), np.float32(max(x.max(), 0))
    step = (high - low) / np.float32(255)
    zero = np.clip(np.rint(-low / step), 0, 255).astype(np.float32)
    return (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step


def rounded_by(form: Int8StaticForm | Int8DynamicForm, x: np.ndarray) -> np.ndarray:
    return round_with(x, SCALE) if isinstance(form, Int8StaticForm) else dynamic(x)


def biased(rank: int) -> onnx.ModelProto:
    nodes = [oh.make_node("MatMul", ["x", "w"], ["h"], name="fc"), oh.make_node("Add", ["h", "b"], ["y"])]
    shape = ["a", "s"][: rank - 1]
    initializers = {"w": weight(K, N), "b": weight(N)}
    return make_model(nodes, {"x": [*shape, K]}, {"y": [*shape, N]}, initializers)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_products_are_numpys_at_every_level_and_fused(
    form: Int8StaticForm | Int8DynamicForm, one_scale: bool, rank: int, level: str, tmp_path: Path
) -> None:
    proto = biased(rank)
    after, decoded = stored(form, proto, one_scale=one_scale, reduced=form.signed)
    bias = onnx.numpy_helper.to_array(proto.graph.initializer[1])
    x = X if rank == 3 else X[0]
    (got,), operators = run_at(after, {"x": x}, level, tmp_path)
    assert relative_error(got, rounded_by(form, x) @ decoded["w"] + bias) <= FLOAT32_SUMMATION
    if isinstance(form, Int8DynamicForm):
        if level in ("extended", "all"):
            assert operators == ["DynamicQuantizeMatMul"]
    elif level in ("extended", "all"):
        assert operators == ["QuantizeLinear", "MatMulIntegerToFloat", "Add" if rank == 3 else "Sum"]


@pytest.mark.parametrize("form", FORMS[:2], ids=name_of)
def test_products_of_one_input_share_its_rounding_and_are_all_fused(
    form: Int8StaticForm | Int8DynamicForm, tmp_path: Path
) -> None:
    nodes = [oh.make_node("MatMul", ["x", name], [f"{name}_y"]) for name in ("q", "k", "v")]
    nodes.append(oh.make_node("Concat", ["q_y", "k_y", "v_y"], ["y"], axis=-1))
    initializers = {name: weight(K, N) for name in ("q", "k", "v")}
    proto = make_model(nodes, {"x": ["a", "s", K]}, {"y": ["a", "s", 3 * N]}, initializers)
    after, decoded = stored(form, proto)
    assert [node.op_type for node in after.graph.node].count("DynamicQuantizeLinear") <= 1
    (got,), operators = run_at(after, {"x": X}, "all", tmp_path)
    expected = rounded_by(form, X) @ np.concatenate([decoded[name] for name in ("q", "k", "v")], axis=1)
    assert relative_error(got, expected) <= FLOAT32_SUMMATION
    assert sorted(operators) == sorted(
        ["QuantizeLinear", "Concat"] + ["MatMulIntegerToFloat"] * 3
        if isinstance(form, Int8StaticForm)
        else ["DynamicQuantizeLinear", "Concat"] + ["MatMulIntegerToFloat"] * 3
    )


def test_the_matrix_product_with_an_add_is_not_fused(tmp_path: Path) -> None:
    """Why the bias of a matrix stands in a Sum. When this fails, ONNX Runtime fuses it and an Add will do."""
    after, _ = stored(Int8StaticForm(), biased(2))
    (total,) = (node for node in after.graph.node if node.op_type == "Sum")
    total.op_type = "Add"
    _, operators = run_at(after, {"x": X[0]}, "all", tmp_path)
    assert operators.count("Gemm") == 1
    assert operators.count("DequantizeLinear") == 2


def integer_product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """MatMulInteger on ONNX Runtime."""
    types = {np.dtype(np.uint8): onnx.TensorProto.UINT8, np.dtype(np.int8): onnx.TensorProto.INT8}
    node = oh.make_node("MatMulInteger", ["x", "w"], ["y"])
    x = oh.make_tensor_value_info("x", types[left.dtype], ["m", left.shape[1]])
    y = oh.make_tensor_value_info("y", onnx.TensorProto.INT32, ["m", right.shape[1]])
    graph = oh.make_graph([node], "g", [x], [y], [onnx.numpy_helper.from_array(right, "w")])
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10)
    return ort.InferenceSession(model.SerializeToString()).run(None, {"x": left})[0]


@pytest.mark.parametrize("m", [1, 5, 40])
def test_unsigned_codes_are_exact_on_every_processor(m: int) -> None:
    """Extremes: 255 * 255 in every pair, where uint8 times int8 saturates on processors without VNNI."""
    extreme = np.full((m, 256), 255, np.uint8), np.full((256, 48), 255, np.uint8)
    rng = np.random.default_rng(0)
    any_codes = rng.integers(0, 256, (m, 256)).astype(np.uint8), rng.integers(0, 256, (256, 48)).astype(np.uint8)
    for left, right in (extreme, any_codes):
        np.testing.assert_array_equal(integer_product(left, right), left.astype(np.int32) @ right.astype(np.int32))


def test_signed_codes_are_exact_where_pairs_fit_16_bits() -> None:
    rng = np.random.default_rng(0)
    left = rng.integers(0, 256, (5, 256)).astype(np.uint8)
    right = rng.integers(-64, 64, (256, 48)).astype(np.int8)
    np.testing.assert_array_equal(integer_product(left, right), left.astype(np.int32) @ right.astype(np.int32))


def test_what_is_stored() -> None:
    encoding = encoded(weight(N, K))
    for form in FORMS:
        arrays = form.arrays(encoding)
        assert arrays["codes"].shape == (K, N)
        assert arrays["codes"].dtype == (np.int8 if form.signed else np.uint8)
        zero = 0 if form.signed else 128
        decoded = (arrays["codes"].astype(np.float32) - zero) * arrays["scales"].astype(np.float32)
        np.testing.assert_array_equal(decoded, encoding.dequantize().T)
    assert Int8StaticForm().arrays(encoded(weight(N, K), one_scale=True))["scales"].shape == ()


@pytest.mark.parametrize(
    ("format", "reason"),
    [
        (UniformFormat(4, None, ZeroPoint.INTEGER), "8-bit weights, not 4-bit"),
        (UniformFormat(8, 32, ZeroPoint.INTEGER), "one scale a column"),
        (UniformFormat(8, None, ZeroPoint.PER_GROUP), "zero at level 128, not per-group"),
    ],
)
def test_what_has_no_such_form_says_why(format: UniformFormat, reason: str) -> None:
    encoding = random_encoding(format, N, K)
    assert reason in (int8_refusal(encoding) or "")
    with pytest.raises(ValueError, match=reason):
        Int8StaticForm().arrays(encoding)
