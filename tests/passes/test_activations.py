"""Rounding in front of products: right on stock ONNX Runtime at every optimisation level, shared, and in its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import pytest

from onnxq.calibration.clipping import FLOAT8, ActivationScale, round_tokens, round_with
from onnxq.errors import ModelError
from onnxq.formats.float8 import Float8Format
from onnxq.formats.framed import FramedEncoding, FramedFormat
from onnxq.formats.uniform import UniformFormat, ZeroPoint
from onnxq.graph import find_weights
from onnxq.passes.activations import Rounding, round_activation
from onnxq.passes.forms import DequantizeForm, Readers, StoredWeight, choose_form
from onnxq.passes.forms.int8 import Int8StaticForm
from onnxq.passes.rewrite import WEIGHT_PROPERTY, Assignment, RewriteSitesPass
from onnxq.solvers.float8 import float8_nearest
from onnxq.solvers.nearest import nearest
from tests.encodings import random_framed, relative_error
from tests.passes.levels import LEVELS, run_at
from tests.passes.test_rewrite import K, N, make_model, op_types, weight

FLOAT32_SUMMATION = 2e-6
TYPES = {
    "e4m3fn": onnx.TensorProto.FLOAT8E4M3FN,
    "e5m2": onnx.TensorProto.FLOAT8E5M2,
    "e4m3fnuz": onnx.TensorProto.FLOAT8E4M3FNUZ,
}
SCALES = {
    "e4m3fn": ActivationScale("e4m3fn", 2.0**-7 * 1.25),
    "e5m2": ActivationScale("e5m2", 2.0**-14 * 1.25),
    "uint8": ActivationScale("uint8", 2.0**-5 * 1.25, 101),
    "int8": ActivationScale("int8", 2.0**-5 * 1.25, 0),
}
WHOLE = UniformFormat(8, None, ZeroPoint.INTEGER)


def rounding_model(rounding: Rounding, *, opset: int = 21, dtype: ir.DataType = ir.DataType.FLOAT) -> onnx.ModelProto:
    """X [a, b, 8] -> rounding -> y."""
    x = ir.val("x", dtype=dtype, shape=("a", "b", 8))
    tape = ir.tape.Tape()
    y = round_activation(tape, x, rounding)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    graph = ir.Graph([x], [y], nodes=tape.nodes, opset_imports={"": opset, "onnxq": 1}, name="g")
    return ir.to_proto(ir.Model(graph, ir_version=10))


def tokens() -> np.ndarray:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4, 5, 8)) * np.exp2(rng.uniform(-6, 3, (4, 5, 1)))).astype(np.float32)
    x[1, 2] = 0
    return x


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", SCALES)
def test_static_rounding_is_numpys_at_every_level(kind: str, level: str, tmp_path: Path) -> None:
    proto = rounding_model(Rounding(kind, SCALES[kind], stock=True))  # type: ignore[arg-type]
    onnx.checker.check_model(proto, full_check=True)
    (got,), operators = run_at(proto, {"x": tokens()}, level, tmp_path)
    np.testing.assert_array_equal(got, round_with(tokens(), SCALES[kind]))
    assert operators[-2:] == ["QuantizeLinear", "DequantizeLinear"]


@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize("opset", [13, 21])
def test_integers_without_a_pair_are_the_same(opset: int, kind: str, tmp_path: Path) -> None:
    proto = rounding_model(Rounding(kind, SCALES[kind]), opset=opset)  # type: ignore[arg-type]
    onnx.checker.check_model(proto, full_check=True)
    (got,), operators = run_at(proto, {"x": tokens()}, "all", tmp_path)
    np.testing.assert_array_equal(got, round_with(tokens(), SCALES[kind]))
    assert operators == ["Div", "Round", "Clip", "Mul"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", FLOAT8)
@pytest.mark.parametrize("opset", [19, 21])
def test_rounding_by_token_is_numpys_at_every_level(opset: int, kind: str, level: str, tmp_path: Path) -> None:
    proto = rounding_model(Rounding(kind, None, stock=True), opset=opset)  # type: ignore[arg-type]
    onnx.checker.check_model(proto, full_check=True)
    (got,), _ = run_at(proto, {"x": tokens()}, level, tmp_path)
    np.testing.assert_array_equal(got, round_tokens(tokens(), kind))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_are_rounded_in_float32(dtype: type, tmp_path: Path) -> None:
    rounding = Rounding("e4m3fn", SCALES["e4m3fn"], stock=True)
    proto = rounding_model(rounding, dtype=ir.DataType.from_numpy(np.dtype(dtype)))
    x = tokens().astype(dtype)
    (got,), _ = run_at(proto, {"x": x}, "all", tmp_path)
    np.testing.assert_array_equal(got, round_with(x.astype(np.float32), SCALES["e4m3fn"]).astype(dtype))


def relu_mlp(kind: str, *, zero_point: bool) -> onnx.ModelProto:
    """X -> MatMul -> Relu -> QuantizeLinear -> DequantizeLinear -> MatMul."""
    rng = np.random.default_rng(0)
    matrices = {name: rng.standard_normal((16, 16)).astype(np.float32) for name in ("w1", "w2")}
    initializers = [onnx.numpy_helper.from_array(matrix, name) for name, matrix in matrices.items()]
    initializers.append(oh.make_tensor("s", 1, [], [0.05]))
    if zero_point:
        initializers.append(oh.make_tensor("z", TYPES[kind], [], b"\0", raw=True))
        quantize = oh.make_node("QuantizeLinear", ["r", "s", "z"], ["q"])
    else:
        quantize = oh.make_node("QuantizeLinear", ["r", "s"], ["q"], output_dtype=TYPES[kind], saturate=1)
    nodes = [
        oh.make_node("MatMul", ["x", "w1"], ["h"]),
        oh.make_node("Relu", ["h"], ["r"]),
        quantize,
        oh.make_node("DequantizeLinear", ["q", "s"], ["d"]),
        oh.make_node("MatMul", ["d", "w2"], ["y"]),
    ]
    ends = [oh.make_tensor_value_info(name, 1, ["m", 16]) for name in ("x", "y")]
    graph = oh.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10)


X = np.random.default_rng(1).standard_normal((20, 16)).astype(np.float32)


@pytest.mark.parametrize("kind", TYPES)
def test_without_a_zero_point_a_relu_in_front_stays(kind: str, tmp_path: Path) -> None:
    proto = relu_mlp(kind, zero_point=False)
    (plain,), _ = run_at(proto, {"x": X}, "disabled", tmp_path)
    for level in LEVELS:
        (got,), operators = run_at(proto, {"x": X}, level, tmp_path)
        np.testing.assert_array_equal(got, plain)
        assert "Relu" in operators


@pytest.mark.parametrize("kind", TYPES)
def test_with_a_zero_point_onnx_runtime_drops_the_relu(kind: str, tmp_path: Path) -> None:
    """When this fails, ONNX Runtime has mended its Relu and QuantizeLinear rewrite, and the docs can say since when."""
    proto = relu_mlp(kind, zero_point=True)
    (plain,), _ = run_at(proto, {"x": X}, "disabled", tmp_path)
    (wrong,), operators = run_at(proto, {"x": X}, "all", tmp_path)
    assert "Relu" not in operators
    assert relative_error(wrong, plain) > 0.1


def test_the_float8_form_has_no_zero_point() -> None:
    proto = rounding_model(Rounding("e4m3fn", SCALES["e4m3fn"], stock=True))
    quantize, dequantize = (n for n in proto.graph.node if n.op_type.endswith("Linear"))
    assert len(quantize.input) == len(dequantize.input) == 2
    assert {a.name: a.i for a in quantize.attribute} == {"output_dtype": TYPES["e4m3fn"], "saturate": 1}


@pytest.mark.parametrize("kind", ["e4m3fn", "e5m2"])
def test_the_kernels_ops_say_their_kind(kind: str) -> None:
    static = rounding_model(Rounding(kind, SCALES[kind])).graph.node[-1]  # type: ignore[arg-type]
    token = rounding_model(Rounding(kind, None)).graph.node[-1]  # type: ignore[arg-type]
    bits = {"e4m3fn": (3, 7), "e5m2": (2, 15)}[kind]
    for node, op_type, inputs in ((static, "Float8Round", 2), (token, "Float8RoundTokens", 1)):
        assert (node.op_type, node.domain, len(node.input)) == (op_type, "onnxq", inputs)
        attributes = {a.name: a.i for a in node.attribute}
        assert attributes == {"mantissa_bits": bits[0], "exponent_bias": bits[1], "layout_version": 1}


def mlp(opset: int = 21) -> onnx.ModelProto:
    """X [s, K] into three products and, behind a Relu, one more."""
    rng = np.random.default_rng(5)
    shapes = {"q": (K, N), "k": (K, N), "v": (K, N), "o": (N, K), "b": (N,)}
    initializers = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        *(oh.make_node("MatMul", ["x", name], [f"{name}_y"], name=f"{name}_proj") for name in ("q", "k", "v")),
        oh.make_node("Add", ["q_y", "b"], ["q_b"]),
        oh.make_node("Add", ["q_b", "k_y"], ["qk"]),
        oh.make_node("Add", ["qk", "v_y"], ["sum"]),
        oh.make_node("Relu", ["sum"], ["h"]),
        oh.make_node("MatMul", ["h", "o"], ["y"], name="o_proj"),
    ]
    return make_model(nodes, {"x": ["a", "s", K]}, {"y": ["a", "s", K]}, initializers, opset)


def rewritten(
    proto: onnx.ModelProto,
    rounding: Rounding,
    *,
    stock: bool,
    int8: bool = False,
    format: UniformFormat | Float8Format = WHOLE,
) -> tuple[onnx.ModelProto, ir.Model, dict[str, np.ndarray]]:
    """The model with all weights stored and all inputs of products rounded, and what the weights decode to."""
    model = ir.from_proto(proto)
    assignments, decoded = [], {}
    for found in find_weights(model).weights:
        solve = float8_nearest if isinstance(format, Float8Format) else nearest
        encoding = solve(found.matrix(), format)  # type: ignore[operator]
        opset = model.graph.opset_imports[""]
        form, _ = choose_form(encoding, stock=stock, opset=opset, readers=Readers.of(found.sites), accuracy_level=1)
        form = Int8StaticForm() if int8 else form
        tensors = {
            role: ir.Value(name=f"{found.name}.{role}", const_value=ir.tensor(array))
            for role, array in form.arrays(encoding).items()
        }
        part = StoredWeight(found.name, form, encoding.shape, form.attributes(encoding), tensors)
        assignments.append(Assignment(found, (part,), rounding))
        decoded[found.name] = encoding.dequantize().T
    RewriteSitesPass(assignments)(model)
    return ir.to_proto(model), model, decoded


def bias_of(proto: onnx.ModelProto) -> np.ndarray:
    return next(onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer if tensor.name == "b")


def mlp_in_numpy(x: np.ndarray, weights: dict[str, np.ndarray], bias: np.ndarray, rounding: Rounding) -> np.ndarray:
    def turn(values: np.ndarray) -> np.ndarray:
        static = rounding.static
        return round_tokens(values, rounding.kind) if static is None else round_with(values, static)

    x = turn(x)
    return turn(np.maximum(x @ weights["q"] + bias + x @ weights["k"] + x @ weights["v"], 0)) @ weights["o"]


STEPS = 5e-3
"""A tenth of what rounding changes: sums differ in their last bits, and a value may then go to the other neighbour."""


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("rounding", "weights_as"),
    [
        (Rounding("e4m3fn", ActivationScale("e4m3fn", 0.125), stock=True), "float8"),
        (Rounding("e4m3fn", None, stock=True), "float8"),
        (Rounding("e4m3fn", ActivationScale("e4m3fn", 0.125), stock=True), "blocks"),
        (Rounding("e5m2", None, stock=True), "blocks"),
        (Rounding("e4m3fn", None, stock=True), "int8"),
        (Rounding("uint8", ActivationScale("uint8", 0.25, 100), stock=True), "int8"),
    ],
    ids=lambda value: value.name if isinstance(value, Rounding) else value,
)
def test_products_of_one_input_share_its_rounding_at_every_level(
    rounding: Rounding, weights_as: str, level: str, tmp_path: Path
) -> None:
    proto = mlp()
    format = Float8Format() if weights_as == "float8" else WHOLE
    after, model, weights = rewritten(proto, rounding, stock=True, int8=weights_as == "int8", format=format)
    onnx.checker.check_model(after, full_check=True)
    name = "ReduceMax" if rounding.static is None else "QuantizeLinear"
    assert op_types(model).count(name) == 2
    x = np.random.default_rng(3).standard_normal((2, 6, K)).astype(np.float32)
    (got,), operators = run_at(after, {"x": x}, level, tmp_path)
    assert relative_error(got, mlp_in_numpy(x, weights, bias_of(proto), rounding)) <= STEPS
    if rounding.kind == "uint8" and level in ("extended", "all"):
        assert operators.count("MatMulIntegerToFloat") == 4


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize("format", [WHOLE, UniformFormat(8, 32, ZeroPoint.INTEGER), UniformFormat(4, 32)], ids=str)
def test_integers_go_with_every_form(format: UniformFormat, kind: str, stock: bool, tmp_path: Path) -> None:
    """The bodies of our ops and DequantizeForm hold a DequantizeLinear of their own: a pair must not meet it."""
    proto = mlp()
    rounding = Rounding(kind, ActivationScale(kind, 0.25, 0), stock)  # type: ignore[arg-type]
    after, model, weights = rewritten(proto, rounding, stock=stock, format=format)
    assert "QuantizeLinear" not in op_types(model)
    assert op_types(model).count("Round") == 2
    x = np.random.default_rng(3).standard_normal((2, 6, K)).astype(np.float32)
    for level in LEVELS:
        (got,), _ = run_at(after, {"x": x}, level, tmp_path)
        assert relative_error(got, mlp_in_numpy(x, weights, bias_of(proto), rounding)) <= STEPS


@pytest.mark.parametrize(("kind", "bits"), [("e4m3fn", 4), ("e4m3fn", 8), ("uint8", 4), ("uint8", 8)])
def test_onnx_runtime_fuses_no_blocked_weights_behind_a_pair(kind: str, bits: int, tmp_path: Path) -> None:
    """The weight is dequantised at every call; or, of 8-bit blocks behind uint8, the fused product fails.

    When this fails, ONNX Runtime has mended it, and `DequantizeForm` can stand behind a pair.
    """
    encoding = nearest(weight(N, 128), UniformFormat(bits, 32, ZeroPoint.INTEGER))
    form = DequantizeForm()
    tensors = {role: ir.Value(name=role, const_value=ir.tensor(array)) for role, array in form.arrays(encoding).items()}
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=("a", "s", 128))
    tape = ir.tape.Tape()
    rounded = round_activation(tape, x, Rounding(kind, SCALES[kind], stock=True))  # type: ignore[arg-type]
    stored = StoredWeight("w", form, encoding.shape, form.attributes(encoding), tensors)
    y = form.linear(tape, rounded, stored, None)
    y.dtype, y.shape = ir.DataType.FLOAT, ir.Shape(("a", "s", N))
    graph = ir.Graph([x], [y], nodes=tape.nodes, initializers=tensors.values(), opset_imports={"": 21}, name="g")
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    feeds = {"x": weight(1, 3, 128)}
    if (kind, bits) == ("uint8", 8):
        with pytest.raises(Exception, match="MatMulIntegerToFloat"):
            run_at(proto, feeds, "all", tmp_path)
    else:
        _, operators = run_at(proto, feeds, "all", tmp_path)
        assert sorted(operators) == ["DequantizeLinear", "DequantizeLinear", "MatMul", "QuantizeLinear"]


@pytest.mark.parametrize("by_token", [False, True])
def test_the_kernel_form_carries_its_bodies(by_token: bool, tmp_path: Path) -> None:
    proto = mlp()
    rounding = Rounding("e4m3fn", None if by_token else ActivationScale("e4m3fn", 0.125))
    after, model, weights = rewritten(proto, rounding, stock=False)
    onnx.checker.check_model(after, full_check=True)
    name = "Float8RoundTokens" if by_token else "Float8Round"
    assert op_types(model).count(name) == 2
    assert ("onnxq", name, "") in model.functions
    x = np.random.default_rng(3).standard_normal((2, 6, K)).astype(np.float32)
    (got,), _ = run_at(after, {"x": x}, "all", tmp_path)
    assert relative_error(got, mlp_in_numpy(x, weights, bias_of(proto), rounding)) <= STEPS


def test_products_keep_their_names_and_weights() -> None:
    _, model, _ = rewritten(mlp(), Rounding("e4m3fn", SCALES["e4m3fn"]), stock=False)
    products = {node.name: node for node in model.graph if node.op_type == "LowBitMatMul"}
    assert set(products) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert products["k_proj"].metadata_props[WEIGHT_PROPERTY] == "k"


def test_rounding_comes_before_a_frames_analysis() -> None:
    proto = make_model(
        [oh.make_node("MatMul", ["x", "w"], ["y"])], {"x": ["s", 64]}, {"y": ["s", N]}, {"w": weight(64, N)}
    )
    model = ir.from_proto(proto)
    (found,) = find_weights(model).weights
    encoding = random_framed(FramedFormat(UniformFormat(4, 32, ZeroPoint.INTEGER), 1.0), N, 64)
    assert isinstance(encoding, FramedEncoding)
    form, _ = choose_form(encoding, stock=False, opset=21, readers=Readers.of(found.sites), accuracy_level=1)
    arrays = {**form.arrays(encoding), **{r: s.array for r, s in form.shared_arrays(encoding).items()}}
    tensors = {role: ir.Value(name=role, const_value=ir.tensor(array)) for role, array in arrays.items()}
    part = StoredWeight("w", form, encoding.shape, form.attributes(encoding), tensors)
    RewriteSitesPass([Assignment(found, (part,), Rounding("e4m3fn", SCALES["e4m3fn"]))])(model)
    assert [name for name in op_types(model) if name.startswith(("F", "L"))][:3] == [
        "Float8Round", "FrameAnalysis", "LowBitMatMul",
    ]  # fmt: skip


@pytest.mark.parametrize(("op", "attributes"), [("MatMul", {}), ("Gemm", {}), ("Gemm", {"transB": 1})])
def test_left_products_are_rounded_along_what_is_summed(op: str, attributes: dict[str, int], tmp_path: Path) -> None:
    """Scales by token of W x are one for each column of x."""
    x = np.random.default_rng(0).standard_normal((K, 3)).astype(np.float32) * np.float32([1, 100, 1e-3])
    stored = x.T.copy() if attributes else x
    proto = make_model(
        [oh.make_node(op, ["w", "x"], ["y"], **attributes)],
        {"x": list(stored.shape)},
        {"y": [N, 3]},
        {"w": weight(N, K)},
    )
    for stock in (False, True):
        rounding = Rounding("e4m3fn", None, stock=stock)
        after, _, weights = rewritten(proto, rounding, stock=stock)
        (got,), _ = run_at(after, {"x": stored}, "disabled", tmp_path)
        expected = weights["w"].T @ round_tokens(x.T, "e4m3fn").T
        for column in range(3):
            assert relative_error(got[:, column], expected[:, column]) <= FLOAT32_SUMMATION


def test_an_opset_that_is_too_old_says_the_way_out() -> None:
    for rounding, oldest in ((Rounding("e4m3fn", SCALES["e4m3fn"], True), 21), (Rounding("e5m2", None, True), 19)):
        with pytest.raises(ModelError, match=f"opset 17 is too old: .* needs opset {oldest} or newer. Export"):
            rewritten(mlp(opset=17), rounding, stock=True)
    rewritten(mlp(opset=17), Rounding("uint8", SCALES["uint8"], True), stock=True)


def test_the_ir_version_knows_float8() -> None:
    proto = mlp()
    proto.ir_version = 8
    _, model, _ = rewritten(proto, Rounding("e4m3fn", SCALES["e4m3fn"], True), stock=True)
    assert model.ir_version == 9


def test_roundings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="does not round to"):
        Rounding("e5m2", SCALES["e4m3fn"])
    with pytest.raises(ValueError, match="int8 needs a static scale"):
        Rounding("int8", None)
