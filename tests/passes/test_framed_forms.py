"""Weights in frames and codebook weights in graphs: every form, on every runtime, against numpy."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxq.formats.codebook import CodebookFormat
from onnxq.formats.framed import FramedFormat
from onnxq.formats.uniform import UniformFormat, ZeroPoint
from onnxq.graph import find_weights
from onnxq.passes.forms import BlockForm, FramedForm, Readers, StoredWeight, choose_form
from onnxq.passes.rewrite import Assignment, RewriteSitesPass, site_refusal
from tests.encodings import random_framed, relative_error
from tests.graph import models

FLOAT32_SUMMATION = 6e-6
"""Transforms, the product and a bias, summed in another order."""
INT8_ACTIVATIONS = 0.03
"""MatMulNBits at accuracy level 4 rounds activations to 8 bits."""

UNIFORM = UniformFormat(2, None, ZeroPoint.MIDRISE)
WHOLE = UniformFormat(4, 32, ZeroPoint.INTEGER)
TRELLIS = CodebookFormat(2, 4)
ONE, WIDE = Fraction(1), Fraction(9, 8)
SIDES = {
    "rotated": (ONE, None),
    "redundant": (Fraction(5, 4), None),
    "two sides": (ONE, ONE),
    "two redundant sides": (WIDE, Fraction(5, 4)),
}
N, K = 80, 96


def initializers(form, encoding, name: str, shared: dict[str, ir.Value]) -> dict[str, ir.Value]:
    def value(key: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=key)
        return ir.Value(name=key, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))

    tensors = {role: value(f"{name}.{role}", array) for role, array in form.arrays(encoding).items()}
    for role, common in form.shared_arrays(encoding).items():
        tensors[role] = shared.setdefault(common.name, value(common.name, common.array))
    return tensors


def rewrite(proto: onnx.ModelProto, format: FramedFormat, *, stock: bool = False, level: int = 1):
    """The rewritten model with random coefficients in it, and the original with what they decode to."""
    onnx.checker.check_model(proto, full_check=True)
    model, reference = ir.from_proto(proto), ir.from_proto(proto)
    twins = {weight.name: weight for weight in find_weights(reference).weights}
    shared: dict[str, ir.Value] = {}
    assignments = []
    for seed, weight in enumerate(find_weights(model).weights):
        assert all(site_refusal(site, weight) is None for site in weight.sites)
        parts, decoded = [], []
        for index in range(weight.batch):
            encoding = random_framed(format, weight.n, weight.k, seed + 10 * index)
            readers = Readers.of(weight.sites)
            opset = model.graph.opset_imports[""]
            form, _ = choose_form(encoding, stock=stock, opset=opset, readers=readers, accuracy_level=level)
            assert isinstance(form, FramedForm)
            assert form.stock is stock
            tensors = initializers(form, encoding, f"{weight.name}.{index}", shared)
            parts.append(StoredWeight(weight.name, form, encoding.shape, form.attributes(encoding), tensors))
            decoded.append(encoding.dequantize())
        assignments.append(Assignment(weight, tuple(parts)))
        for site in twins[weight.name].sites:
            array = np.ascontiguousarray(site.layout.undo(np.concatenate(decoded)))
            site.root.const_value = ir.tensor(array.astype(site.root.const_value.dtype.numpy()), name=site.root.name)
    RewriteSitesPass(assignments)(model)
    written = ir.to_proto(model)
    onnx.checker.check_model(written, full_check=True)
    return written, ir.to_proto(reference), model


def run(proto: onnx.ModelProto, feeds: dict[str, np.ndarray], library: Path | None = None) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)


def check(
    proto: onnx.ModelProto,
    format: FramedFormat,
    feeds: dict[str, np.ndarray],
    *,
    stock: bool = False,
    tolerance: float = FLOAT32_SUMMATION,
    library: Path | None = None,
) -> ir.Model:
    written, reference, model = rewrite(proto, format, stock=stock)
    for got, expected in zip(run(written, feeds, library), run(reference, feeds), strict=True):
        assert got.shape == expected.shape
        assert relative_error(got.astype(np.float32), expected.astype(np.float32)) <= tolerance
    return model


def counts(model: ir.Model) -> dict[str, int]:
    names = [node.op_type for graph in model.graphs() for node in graph]
    return {name: names.count(name) for name in names}


def linear(n: int = N, k: int = K, lead: tuple[int | str, ...] = ("b", "s"), opset: int = 21) -> onnx.ModelProto:
    """x [..., K] -> MatMul -> Add."""
    return models.model(
        [models.node("MatMul", "x w", "h", "fc"), models.node("Add", "h b", "y", "fc/Add")],
        [models.floats("x", [*lead, k])],
        [models.floats("y", [*lead, n])],
        {"w": models.weight(k, n), "b": models.weight(n, seed=1)},
        opset=opset,
    )


def attention(second_input: str = "x") -> onnx.ModelProto:
    """Three projections, the third perhaps of another input, added up."""
    sources = {"q": "x", "k": "x", "v": second_input}
    nodes = [models.node("MatMul", f"{source} w{name}", name, f"{name}_proj") for name, source in sources.items()]
    nodes.append(models.node("Sum", "q k v", "y"))
    return models.model(
        nodes,
        [models.floats("x", ["b", "s", K]), models.floats("z", ["b", "s", K])],
        [models.floats("y", ["b", "s", N])],
        {f"w{name}": models.weight(K, N, seed=seed) for seed, name in enumerate(sources)},
    )


X = models.weight(2, 3, K)


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize(
    "inner", [UNIFORM, TRELLIS, UniformFormat(3, 64, ZeroPoint.PER_GROUP)], ids=lambda f: f.label()
)
@pytest.mark.parametrize("sides", SIDES)
def test_function_bodies_on_stock_onnx_runtime(sides: str, inner, opset: int) -> None:
    model = check(linear(opset=opset), FramedFormat(inner, *SIDES[sides]), {"x": X})
    two = SIDES[sides][1] is not None
    product = "CodebookMatMul" if inner is TRELLIS else "LowBitMatMul"
    expected = {"FrameAnalysis": 1, product: 1} | ({"FrameSynthesis": 1, "Add": 1} if two else {})
    assert {name: count for name, count in counts(model).items() if name != "Constant"} == expected


@pytest.mark.parametrize("inner", [UNIFORM, TRELLIS], ids=lambda f: f.label())
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize(("n", "k"), [(N, K), (50, 33), (40, 521)])
def test_the_kernel_library(sides: str, n: int, k: int, inner, library: Path) -> None:
    check(linear(n, k), FramedFormat(inner, *SIDES[sides]), {"x": models.weight(2, 3, k)}, library=library)


@pytest.mark.parametrize("inner", [UNIFORM, WHOLE, UniformFormat(4, None, ZeroPoint.MIDRISE)], ids=lambda f: f.label())
@pytest.mark.parametrize("sides", SIDES)
def test_stock_forms(sides: str, inner: UniformFormat) -> None:
    model = check(linear(), FramedFormat(inner, *SIDES[sides]), {"x": X}, stock=True, tolerance=INT8_ACTIVATIONS)
    names = counts(model)
    assert not any(node.domain == "onnxq" for graph in model.graphs() for node in graph)
    assert not model.functions
    # The transforms: one product from each side.
    dequantized = "DequantizeLinear" in names
    assert dequantized == (inner is WHOLE)
    assert names["MatMul"] == (4 if SIDES[sides][1] is not None else 2) + dequantized


def test_stock_transforms_are_exact() -> None:
    """With activations in float32 nothing is left but the order of sums."""
    encoding = FramedFormat(WHOLE, WIDE, Fraction(5, 4))
    model = check(linear(), encoding, {"x": X}, stock=True)
    assert "DequantizeLinear" in counts(model)


@pytest.mark.parametrize("bits", [2, 4])
def test_levels_about_zero_are_whole_ones_and_half_a_step(bits: int) -> None:
    """MatMulNBits has whole zero points; the half step is the sum of all inputs times it."""
    proto, format = linear(), FramedFormat(UniformFormat(bits, None, ZeroPoint.MIDRISE), WIDE)
    written, reference, model = rewrite(proto, format, stock=True)
    assert "w.0.half_steps" in model.graph.initializers
    assert counts(model)["ReduceSum"] == 1
    exact = onnx.ModelProto.FromString(written.SerializeToString())
    (node,) = [node for node in exact.graph.node if node.op_type == "MatMulNBits"]
    next(item for item in node.attribute if item.name == "accuracy_level").i = 1
    (got,), (expected,) = run(exact, {"x": X}), run(reference, {"x": X})
    assert relative_error(got, expected) <= FLOAT32_SUMMATION
    assert isinstance(
        choose_form(random_framed(format, N, K), stock=True, opset=21, readers=Readers(1, 0, False), accuracy_level=4)[
            0
        ].inner,
        BlockForm,
    )


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("lead", [(), ("s",), ("b", "s"), (2, "b", "s")], ids=len)
@pytest.mark.parametrize(("k", "ratio"), [(K, ONE), (33, WIDE), (100, WIDE), (521, ONE)])
def test_any_rank_and_padded_inputs(k: int, ratio: Fraction, lead: tuple[int | str, ...], stock: bool) -> None:
    x = models.weight(*(2, 3, 4)[: len(lead)], k)
    tolerance = INT8_ACTIVATIONS if stock else FLOAT32_SUMMATION
    check(linear(50, k, lead), FramedFormat(UNIFORM, ratio), {"x": x}, stock=stock, tolerance=tolerance)


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize(("n", "outputs"), [(50, WIDE), (521, ONE)])
def test_padded_outputs_are_cut_off(n: int, outputs: Fraction, stock: bool) -> None:
    tolerance = INT8_ACTIVATIONS if stock else FLOAT32_SUMMATION
    check(linear(n, 64), FramedFormat(UNIFORM, ONE, outputs), {"x": X[..., :64]}, stock=stock, tolerance=tolerance)


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize(("k", "ratio"), [(K, ONE), (100, WIDE), (521, ONE)])
def test_inputs_of_unknown_rank(k: int, ratio: Fraction, stock: bool) -> None:
    proto = models.model(
        [
            models.node("Reshape", "x shape", "r"),
            models.node("MatMul", "r w", "h"),
            models.node("Add", "h b", "a"),
            models.node("Shape", "a", "last"),
            models.node("Reshape", "a rows", "y"),
        ],
        [models.floats("x", ["m"]), models.integers("shape", ["rank"])],
        [models.floats("y", ["rows", N]), models.integers("last", ["rank"])],
        {"w": models.weight(k, N), "b": models.weight(N, seed=1), "rows": np.array([-1, N])},
    )
    tolerance = INT8_ACTIVATIONS if stock else FLOAT32_SUMMATION
    for shape in ((3, k), (2, 3, k), (2, 1, 3, k)):
        feeds = {"x": models.weight(*shape).ravel(), "shape": np.array(shape)}
        check(proto, FramedFormat(UNIFORM, ratio), feeds, stock=stock, tolerance=tolerance)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("stock", [False, True])
def test_no_row_and_one(rows: int, stock: bool) -> None:
    written, _, _ = rewrite(linear(50, 100, ("s",)), FramedFormat(UNIFORM, WIDE), stock=stock)
    (y,) = run(written, {"x": models.weight(1, 100)[:rows]})
    assert y.shape == (rows, 50)


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("ratio", [ONE, WIDE])
@pytest.mark.parametrize("k", [64, 100])
def test_a_table_tied_to_a_product(k: int, ratio: Fraction, stock: bool) -> None:
    """One stored matrix: rows come back by synthesis, the product's input is analysed."""
    proto = models.tied_embedding(stored_twice=False, rows=96, width=k)
    inner = WHOLE if stock and k % 32 == 0 else UniformFormat(4, 32, ZeroPoint.PER_GROUP)
    tolerance = INT8_ACTIVATIONS if stock else FLOAT32_SUMMATION
    feeds = {"ids": np.array([[0, 95, -1], [5, 5, 7]])}
    model = check(proto, FramedFormat(inner, ratio), feeds, stock=stock, tolerance=tolerance)
    names = counts(model)
    if not stock:
        assert (names["LowBitGather"], names["FrameSynthesis"]) == (1, 1)
        assert (names["LowBitMatMul"], names["FrameAnalysis"]) == (1, 1)
    codes = [name for name in model.graph.initializers if name.endswith((".packed", ".codes"))]
    assert len(codes) == 1


@pytest.mark.parametrize("stock", [False, True])
def test_products_of_one_input_share_its_analysis(stock: bool) -> None:
    for ratio in (ONE, WIDE):
        format = FramedFormat(UNIFORM, ratio)
        tolerance = INT8_ACTIVATIONS if stock else FLOAT32_SUMMATION
        model = check(attention(), format, {"x": X, "z": X}, stock=stock, tolerance=tolerance)
        names = counts(model)
        assert names["MatMul" if stock else "FrameAnalysis"] == (2 if stock else 1)
        assert names["MatMulNBits" if stock else "LowBitMatMul"] == 3
        assert sum(name.startswith("onnxq.frame.") for name in model.graph.initializers) == (3 if stock else 2)


def test_padding_is_shared_too() -> None:
    nodes = [models.node("MatMul", f"x w{name}", name) for name in "qkv"]
    proto = models.model(
        [*nodes, models.node("Sum", "q k v", "y")],
        [models.floats("x", ["b", "s", 100])],
        [models.floats("y", ["b", "s", N])],
        {f"w{name}": models.weight(100, N, seed=seed) for seed, name in enumerate("qkv")},
    )
    names = counts(check(proto, FramedFormat(UNIFORM, Fraction(3, 2)), {"x": models.weight(2, 3, 100)}))
    assert names["FrameAnalysis"] == 1
    assert names.get("Pad", 0) <= 1


@pytest.mark.parametrize("stock", [False, True])
def test_products_of_different_inputs_do_not(stock: bool) -> None:
    feeds = {"x": X, "z": models.weight(2, 3, K, seed=5)}
    tolerance = INT8_ACTIVATIONS if stock else FLOAT32_SUMMATION
    model = check(attention("z"), FramedFormat(UNIFORM, WIDE), feeds, stock=stock, tolerance=tolerance)
    assert counts(model)["MatMul" if stock else "FrameAnalysis"] == (4 if stock else 2)


def test_different_seeds_are_different_frames() -> None:
    names = [
        {array.name for array in FramedForm(BlockForm()).shared_arrays(random_framed(format, N, K)).values()}
        for format in (FramedFormat(UNIFORM, WIDE, seed=seed) for seed in (0, 1))
    ]
    assert len(names[0] & names[1]) == 1  # the block alone is the same


@pytest.mark.parametrize("stock", [False, True])
def test_a_branch_does_not_borrow(stock: bool) -> None:
    def branch(name: str, op: str) -> onnx.GraphProto:
        nodes = [models.node("MatMul", f"x w{name}", f"{name}_h"), models.node(op, f"{name}_h", f"{name}_y")]
        return models.graph(nodes, [], [models.floats(f"{name}_y", ["s", N])], name=name)

    flag = oh.make_tensor_value_info("flag", onnx.TensorProto.BOOL, [])
    proto = models.model(
        [
            models.node("If", "flag", "chosen", then_branch=branch("a", "Relu"), else_branch=branch("b", "Neg")),
            models.node("MatMul", "x wc", "outer"),
            models.node("Add", "outer chosen", "y"),
        ],
        [models.floats("x", ["s", K]), flag],
        [models.floats("y", ["s", N])],
        {f"w{name}": models.weight(K, N, seed=seed) for seed, name in enumerate("abc")},
    )
    for value in (True, False):
        tolerance = INT8_ACTIVATIONS if stock else FLOAT32_SUMMATION
        feeds = {"x": X[0], "flag": np.array(value)}
        model = check(proto, FramedFormat(UNIFORM, WIDE), feeds, stock=stock, tolerance=tolerance)
        assert counts(model)["MatMul" if stock else "FrameAnalysis"] == (6 if stock else 3)


@pytest.mark.parametrize("stock", [False, True])
def test_half_precision_shares_the_cast_as_well(stock: bool) -> None:
    proto = models.model(
        [*(models.node("MatMul", f"x w{name}", name) for name in "qkv"), models.node("Sum", "q k v", "y")],
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT16, ["s", K])],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, ["s", N])],
        {f"w{name}": models.weight(K, N, seed=seed, dtype=np.float16) for seed, name in enumerate("qkv")},
    )
    _, _, model = rewrite(proto, FramedFormat(UNIFORM, WIDE), stock=stock)
    names = counts(model)
    assert names["MatMul" if stock else "FrameAnalysis"] == (2 if stock else 1)


def test_half_precision_and_stacks_and_left_factors() -> None:
    half = models.model(
        [models.node("MatMul", "x w", "y")],
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT16, ["s", K])],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, ["s", N])],
        {"w": models.weight(K, N, dtype=np.float16)},
    )
    float16 = 2e-3
    check(half, FramedFormat(UNIFORM, WIDE), {"x": X[0].astype(np.float16)}, tolerance=float16)
    stack = models.model(
        [models.node("MatMul", "x w", "y")],
        [models.floats("x", [2, "s", K])],
        [models.floats("y", [2, "s", N])],
        {"w": models.weight(2, K, N)},
    )
    check(stack, FramedFormat(UNIFORM, WIDE), {"x": X})
    left = models.model(
        [models.node("MatMul", "w x", "y")],
        [models.floats("x", ["b", 100, 3])],
        [models.floats("y", ["b", N, 3])],
        {"w": models.weight(N, 100)},
    )
    check(left, FramedFormat(UNIFORM, Fraction(3, 2)), {"x": models.weight(2, 100, 3)})


def test_codebooks_have_no_stock_form_and_say_so() -> None:
    encoding = random_framed(FramedFormat(TRELLIS, ONE), N, K)
    form, note = choose_form(encoding, stock=True, opset=21, readers=Readers(1, 0, False), accuracy_level=4)
    assert form.name == "CodebookMatMul in a frame"
    assert "no levels from tables" in note
    encoding = random_framed(FramedFormat(dataclasses.replace(UNIFORM, group_size=32), ONE), N, K)
    _, note = choose_form(encoding, stock=True, opset=21, readers=Readers(1, 0, False), accuracy_level=4)
    assert "midrise ones and one group a row" in note
