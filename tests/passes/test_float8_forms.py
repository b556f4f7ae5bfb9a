"""Float8 weights in graphs, on stock ONNX Runtime, against numpy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxq.formats.float8 import Float8Encoding, Float8Format, Float8Kind
from onnxq.graph import find_weights
from onnxq.passes.forms import Float8Form, Float8QdqForm, Readers, StoredWeight, choose_form
from onnxq.passes.rewrite import Assignment, RewriteSitesPass, site_refusal
from tests.encodings import random_float8, relative_error
from tests.graph import models
from tests.passes.test_framed_forms import K, N, X, attention, counts, initializers, linear

FLOAT32_SUMMATION = 2e-6
FORMAT = Float8Format()
FORMATS = [
    FORMAT,
    Float8Format(Float8Kind.E5M2, 32),
    Float8Format(Float8Kind.E4M3FNUZ, 64),
    Float8Format(Float8Kind.E5M2FNUZ, one_scale=True),
    Float8Format(group_size=96),
    Float8Format(one_scale=True, powers_of_two=True),
]
LEVELS = [
    ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
]


def rewrite(
    proto: onnx.ModelProto, format: Float8Format = FORMAT, *, stock: bool = False
) -> tuple[ir.Model, ir.Model, list[str]]:
    """The model with random float8 weights in it, the original with what they decode to, and notes on forms."""
    model, reference = ir.from_proto(proto), ir.from_proto(proto)
    twins = {weight.name: weight for weight in find_weights(reference).weights}
    assignments, notes = [], []
    for seed, weight in enumerate(find_weights(model).weights):
        assert all(site_refusal(site, weight) is None for site in weight.sites)
        parts, decoded = [], []
        for index in range(weight.batch):
            encoding = random_float8(format, weight.n, weight.k, seed + 10 * index)
            opset, readers = model.graph.opset_imports[""], Readers.of(weight.sites)
            form, note = choose_form(encoding, stock=stock, opset=opset, readers=readers, accuracy_level=4)
            prefix = weight.name if weight.batch == 1 else f"{weight.name}.{index}"
            tensors = initializers(form, encoding, prefix, {})
            parts.append(StoredWeight(prefix, form, encoding.shape, form.attributes(encoding), tensors))
            decoded.append(encoding.dequantize())
            notes.append(note)
        assignments.append(Assignment(weight, tuple(parts)))
        for site in twins[weight.name].sites:
            array = np.ascontiguousarray(site.layout.undo(np.concatenate(decoded)))
            site.root.const_value = ir.tensor(array.astype(site.root.const_value.dtype.numpy()), name=site.root.name)
    RewriteSitesPass(assignments)(model)
    return model, reference, notes


def run(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray], level=LEVELS[-1]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = level
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)


def check(
    proto: onnx.ModelProto,
    feeds: Mapping[str, np.ndarray],
    format: Float8Format = FORMAT,
    *,
    stock: bool = False,
    tolerance: float = FLOAT32_SUMMATION,
) -> ir.Model:
    """At every optimisation level."""
    model, reference, _ = rewrite(proto, format, stock=stock)
    written = ir.to_proto(model)
    onnx.checker.check_model(written, full_check=True)
    expected = run(ir.to_proto(reference), feeds)
    for level in LEVELS:
        for got, wanted in zip(run(written, feeds, level), expected, strict=True):
            assert got.shape == wanted.shape
            assert relative_error(got.astype(np.float32), wanted.astype(np.float32)) <= tolerance
    return model


def tied(opset: int = 21) -> onnx.ModelProto:
    """ids -> rows of a table, and x times its transpose."""
    nodes = [
        models.node("Gather", "w ids", "rows", "embed"),
        models.node("Transpose", "w", "t", perm=[1, 0]),
        models.node("MatMul", "x t", "y", "head"),
    ]
    inputs = [models.integers("ids", ["a"]), models.floats("x", ["b", K])]
    outputs = [models.floats("rows", ["a", K]), models.floats("y", ["b", N])]
    return models.model(nodes, inputs, outputs, {"w": models.weight(N, K)}, opset=opset)


TIED = {"ids": np.array([0, N - 1, -1]), "x": X[0]}


@pytest.mark.parametrize("format", FORMATS, ids=Float8Format.label)
@pytest.mark.parametrize("opset", [13, 21])
def test_a_product_takes_its_bias_along(opset: int, format: Float8Format) -> None:
    model = check(linear(opset=opset), {"x": X}, format)
    (node,) = [node for node in model.graph if node.op_type != "Constant"]
    assert (node.domain, node.op_type, node.name) == ("onnxq", "Float8MatMul", "fc")
    assert [value.name for value in node.inputs] == ["x", "w.codes", "w.scales", "b"]
    assert model.graph.initializers["w.codes"].const_value.nbytes == N * K


@pytest.mark.parametrize("format", FORMATS, ids=Float8Format.label)
def test_stock_models_have_float8_types_and_no_zero_point(format: Float8Format) -> None:
    model = check(linear(), {"x": X}, format, stock=True)
    assert counts(model) == {"DequantizeLinear": 1, "MatMul": 1, "Add": 1}
    dequantize = next(node for node in model.graph if node.op_type == "DequantizeLinear")
    assert [value.name for value in dequantize.inputs] == ["w.codes", "w.scales"]
    codes = model.graph.initializers["w.codes"]
    assert codes.dtype.name.lower() == f"float8{format.kind.value}"
    assert list(codes.shape) == [K, N]
    assert not model.functions
    assert model.ir_version >= 9


@pytest.mark.parametrize("stock", [False, True])
def test_onnx_runtime_folds_our_op_and_not_float8_types(stock: bool, tmp_path) -> None:
    """When this fails for the stock form, ONNX Runtime has mended it: see docs/stock_onnxruntime.md."""
    model, _, _ = rewrite(linear(), stock=stock)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    left = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert ("DequantizeLinear" in left) == stock
    assert not any(name.startswith(("Float8", "Gather")) for name in left)


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("lead", [(), ("s",), (2, "b", "s")], ids=len)
def test_any_rank_and_ragged_sizes(lead: tuple[int | str, ...], stock: bool) -> None:
    format = Float8Format(group_size=32)
    check(linear(50, 33, lead), {"x": models.weight(*(2, 3, 4)[: len(lead)], 33)}, format, stock=stock)


@pytest.mark.parametrize("format", FORMATS, ids=Float8Format.label)
@pytest.mark.parametrize("opset", [13, 21])
def test_tied_tables_share_their_codes(opset: int, format: Float8Format) -> None:
    model = check(tied(opset), TIED, format)
    assert {"Float8Gather", "Float8MatMul"} <= set(counts(model))
    assert set(model.graph.initializers) == {"w.codes", "w.scales"}


def test_look_ups_stay_functions_on_stock() -> None:
    """GatherBlockQuantized takes float8 from ONNX Runtime 1.31 on only; models would not load on older ones."""
    model, _, notes = rewrite(tied(), stock=True)
    assert counts(model)["Float8Gather"] == counts(model)["Float8MatMul"] == 1
    assert "from 1.31 on" in notes[0]
    check(tied(), TIED, stock=True)
    with pytest.raises(NotImplementedError, match="Float8Form"):
        Float8QdqForm().table(None, None, StoredWeight("w", Float8QdqForm(), (N, K), {}, {}))


def test_an_opset_without_blocks_stays_a_function_and_says_why() -> None:
    model, _, notes = rewrite(linear(opset=19), stock=True)
    assert "Float8MatMul" in counts(model)
    assert notes == [
        "left as a function: DequantizeLinear of float8 weights needs opset 21: export again with --opset 21"
    ]


def test_no_note_where_the_kernel_is_asked_for() -> None:
    encoding = random_float8(FORMAT, N, K)
    for opset, readers in [(13, Readers(1, 0, False)), (21, Readers(1, 1, True))]:
        form, note = choose_form(encoding, stock=False, opset=opset, readers=readers, accuracy_level=4)
        assert (form, note) == (Float8Form(), "")


@pytest.mark.parametrize("stock", [False, True])
def test_several_products_of_one_input(stock: bool) -> None:
    model = check(attention(), {"x": X, "z": X}, stock=stock)
    assert counts(model)["DequantizeLinear" if stock else "Float8MatMul"] == 3


@pytest.mark.parametrize("stock", [False, True])
def test_half_precision_stacks_and_left_factors(stock: bool) -> None:
    half = models.model(
        [models.node("MatMul", "x w", "y")],
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT16, ["s", K])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, ["s", N])],
        {"w": models.weight(K, N, dtype=np.float16)},
    )
    float16 = 2e-3
    check(half, {"x": X[0].astype(np.float16)}, stock=stock, tolerance=float16)
    stack = models.model(
        [models.node("MatMul", "x w", "y")],
        [models.floats("x", [2, "s", K])],
        [models.floats("y", [2, "s", N])],
        {"w": models.weight(2, K, N)},
    )
    check(stack, {"x": X}, stock=stock)
    left = models.model(
        [models.node("MatMul", "w x", "y")],
        [models.floats("x", ["b", 100, 3])],
        [models.floats("y", ["b", N, 3])],
        {"w": models.weight(N, 100)},
    )
    check(left, {"x": models.weight(2, 100, 3)}, stock=stock)


@pytest.mark.parametrize("form", [Float8Form(), Float8QdqForm()], ids=lambda form: form.name)
@pytest.mark.parametrize("format", FORMATS, ids=Float8Format.label)
def test_arrays_cost_what_the_format_says(form, format: Float8Format) -> None:
    encoding: Float8Encoding = random_float8(format, N, 200)
    arrays = form.arrays(encoding)
    assert arrays["codes"].nbytes == encoding.codes.nbytes
    gain, scale_bits = 32, 16 if isinstance(form, Float8Form) else 32
    assert encoding.cost_bits() == 8 * N * 200 + 16 * arrays["scales"].size + gain
    assert arrays["scales"].nbytes * 8 == scale_bits * encoding.scales.size
