"""Binary weights in stock ops: what ONNX Runtime makes of them, at every level and opset, against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from onnxq.formats.binary import BinaryEncoding, BinaryFormat
from onnxq.passes.forms import BinaryForm, PlanesForm, Readers, StoredWeight, choose_form
from onnxq.passes.forms.planes import from_plane_rows, plane_rows, planes_cost_bits, planes_nodes
from tests.encodings import random_binary, relative_error
from tests.graph import models
from tests.passes.levels import LEVELS, run_at
from tests.passes.test_binary_forms import rewrite, tied
from tests.passes.test_framed_forms import X, initializers, linear

N, K = 90, 96
FLOAT32_SUMMATION = 2e-6
INT8_ACTIVATIONS = 0.02
NESTED = np.random.default_rng(5).integers(1, 5, N)
SHAPES = {
    "alike": ([3] * N, None, False),
    "one plane": ([1] * N, 32, False),
    "in order": (np.sort(NESTED)[::-1], None, False),
    "by row": (NESTED, None, False),
    "groups": (NESTED, 32, False),
    "ragged groups": (NESTED, 64, False),
    "offsets": (NESTED, None, True),
    "offsets of ragged groups": (NESTED, 64, True),
    "offsets alike": ([2] * N, 96, True),
}


def encoding(name: str, gain: float = 0.5) -> BinaryEncoding:
    planes, group, offset = SHAPES[name]
    return random_binary(planes, K, group, offset=offset, seed=len(name), gain=gain)


def model_of(
    weight: BinaryEncoding, opset: int = 21, *, accuracy_level: int = 1, rank: int = 2, ids_dtype: type = np.int64
) -> onnx.ModelProto:
    """A product and a look-up of one weight; the check of the model is the library's own."""
    form = PlanesForm(accuracy_level)
    n, k = weight.shape
    tensors = initializers(form, weight, "w", {})
    stored = StoredWeight("w", form, weight.shape, form.attributes(weight), tensors)
    lead = tuple("abc"[: rank - 1])
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=(*lead, k))
    ids = ir.val("ids", dtype=ir.DataType.from_numpy(np.dtype(ids_dtype)), shape=("i", "j"))
    tape = ir.tape.Tape()
    bias = ir.tape.Tape.op(tape, "Constant", [], {"value": ir.tensor(np.ones(n, np.float32))})
    y, rows = form.linear(tape, x, stored, bias), form.table(tape, ids, stored)
    for value, shape in ((y, (*lead, n)), (rows, ("i", "j", k))):
        value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(shape)
    graph = ir.Graph(
        [x, ids], [y, rows], nodes=tape.nodes, initializers=list(tensors.values()),
        opset_imports={"": opset, "com.microsoft": 1}, name="g",
    )  # fmt: skip
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def feeds(rank: int = 2) -> dict[str, np.ndarray]:
    ids = np.arange(-N, N).reshape(2, -1)
    return {"x": models.weight(*(2, 3, 4)[: rank - 1], K), "ids": ids}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_level_computes_with_the_decoded_weight(name: str, level: str, tmp_path: Path) -> None:
    weight, fed = encoding(name), feeds()
    (y, rows), operators = run_at(model_of(weight), fed, level, tmp_path)
    decoded = weight.dequantize()
    assert relative_error(y, fed["x"] @ decoded.T + 1) <= FLOAT32_SUMMATION
    np.testing.assert_allclose(rows, decoded[fed["ids"]], rtol=1e-6, atol=1e-6)
    runs = len(list(weight.format.runs()))
    assert operators.count("MatMulNBits") == runs
    if level != "disabled":
        # All that depends on the weight alone is folded: what is left reads activations or indices.
        allowed = {"Concat": runs + 3, "Reshape": 2, "Cast": 6, "Slice": 1, "Shape": 2}
        assert all(operators.count(kind) <= most for kind, most in allowed.items())


@pytest.mark.parametrize("opset", range(13, 26))
def test_every_opset_has_the_ops(opset: int, tmp_path: Path) -> None:
    weight, fed = encoding("offsets of ragged groups"), feeds()
    (y, rows), _ = run_at(model_of(weight, opset), fed, "all", tmp_path)
    assert relative_error(y, fed["x"] @ weight.dequantize().T + 1) <= FLOAT32_SUMMATION
    np.testing.assert_allclose(rows, weight.dequantize()[fed["ids"]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["by row", "offsets of ragged groups"])
def test_int8_activations_are_near(name: str, tmp_path: Path) -> None:
    weight, fed = encoding(name), feeds()
    (y, _), _ = run_at(model_of(weight, accuracy_level=4), fed, "all", tmp_path)
    error = relative_error(y, fed["x"] @ weight.dequantize().T + 1)
    assert FLOAT32_SUMMATION < error <= INT8_ACTIVATIONS


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_any_rank(rank: int, tmp_path: Path) -> None:
    weight, fed = encoding("offsets"), feeds(rank)
    fed["ids"] = fed["ids"].astype(np.int32)
    (y, rows), _ = run_at(model_of(weight, rank=rank, ids_dtype=np.int32), fed, "all", tmp_path)
    assert y.shape == (*fed["x"].shape[:-1], N)
    assert relative_error(y, fed["x"] @ weight.dequantize().T + 1) <= FLOAT32_SUMMATION
    assert rows.shape == (2, N, K)


@pytest.mark.parametrize("gain", [2.0**-30, 2.0**20])
def test_a_gain_that_float16_has_no_room_for(gain: float, tmp_path: Path) -> None:
    weight, fed = encoding("offsets", gain), feeds()
    assert PlanesForm().attributes(weight)["gain"] == gain
    assert PlanesForm().attributes(encoding("offsets"))["gain"] == 1
    fed["x"] /= np.float32(gain)
    (y, rows), _ = run_at(model_of(weight), fed, "all", tmp_path)
    assert relative_error(y, fed["x"] @ weight.dequantize().T + 1) <= FLOAT32_SUMMATION
    np.testing.assert_allclose(rows, weight.dequantize()[fed["ids"]], rtol=1e-5, atol=1e-6 * gain)


def test_signs_by_hand() -> None:
    """Rows of 2, 1 and 1 planes, of which the second of the weight has two: 5 = 1 + 4 is plus, minus, plus."""
    format = BinaryFormat((3, 1), None, ordered=True)
    codes = np.zeros((3, 32), np.uint8)
    codes[0, :4] = [1, 2, 3, 0]
    codes[1, [0, 2]] = 1
    scales = np.array([[[4.0], [2], [1]], [[0.5], [0], [0]]], np.float16)
    weight = BinaryEncoding(format, codes, scales, None, np.array([1, 0, 2], np.int32))
    signs, levels = plane_rows(weight)
    np.testing.assert_array_equal(signs[:, 0], [0b101, 0b110, 0b101, 0])
    np.testing.assert_array_equal(signs[:, 1:], 0)
    np.testing.assert_array_equal(levels[:, 0], [4, 0.5, 2, 1])
    tables = PlanesForm().shared_arrays(weight)
    assert tables["spread.table"].array[0b0000_0101].tolist() == [0b01_11_01_11, 0b01_01_01_01]
    assert tables["signs.table"].array[0b0000_0101].tolist() == [1, -1, 1, -1, -1, -1, -1, -1]


@pytest.mark.parametrize("name", SHAPES)
def test_arrays_lead_back_and_take_what_they_are_priced_at(name: str) -> None:
    weight = encoding(name)
    arrays = PlanesForm().arrays(weight)
    assert 8 * sum(array.nbytes for array in arrays.values()) == planes_cost_bits(weight.format, N, K)
    assert planes_cost_bits(weight.format, N, K) <= weight.cost_bits()
    sides = [arrays["scales"][:, :, 0], arrays["offsets"][:, :, 0] if "offsets" in arrays else None]
    back = from_plane_rows(arrays["signs"], *sides, arrays.get("rank"), weight.format, 1.0)
    np.testing.assert_array_equal(back.dequantize(), weight.dequantize())
    np.testing.assert_array_equal(back.codes, weight.codes)


@pytest.mark.parametrize("name", SHAPES)
def test_nodes_are_as_many_as_budgets_expect(name: str) -> None:
    weight = encoding(name)
    expected = planes_nodes(weight.format, products=1, look_ups=1)
    bias_and_sum = 2
    assert 0.6 * expected < len(model_of(weight).graph.node) - bias_and_sum <= expected


def test_what_has_no_stock_form_says_why() -> None:
    ragged, whole = random_binary([2] * 5, 40), random_binary([2] * 5, 64)
    for weight, opset, why in ((ragged, 21, "rows of 40 inputs are not whole blocks of 32"), (whole, 12, "opset 13")):
        form, note = choose_form(weight, stock=True, opset=opset, readers=Readers(1, 0, False), accuracy_level=4)
        assert isinstance(form, BinaryForm)
        assert note.startswith("left as a function: ")
        assert why in note
    for rounded, level in ((None, 4), ("uint8", 1), ("float8", 1)):
        form, note = choose_form(
            whole, stock=True, opset=21, readers=Readers(1, 1, True), accuracy_level=4, rounded=rounded
        )
        assert form == PlanesForm(level)
        assert not note


def by_row(weight, seed: int) -> BinaryEncoding:
    planes = np.random.default_rng(seed).integers(1, 5, weight.n)
    return random_binary(planes, weight.k, 32, offset=True, seed=seed)


def check(proto: onnx.ModelProto, fed: dict[str, np.ndarray]) -> ir.Model:
    model, reference = rewrite(proto, by_row, stock=True)
    written = ir.to_proto(model)
    onnx.checker.check_model(written, full_check=True)
    assert not [node for node in model.graph if node.domain == "onnxq"]
    for got, expected in zip(models.run(written, fed), models.run(ir.to_proto(reference), fed), strict=True):
        assert got.shape == expected.shape
        assert relative_error(got, expected) <= INT8_ACTIVATIONS
    return model


def test_a_product_keeps_its_bias_and_its_name() -> None:
    model = check(linear(), {"x": X})
    assert "fc" in {node.name for node in model.graph if node.op_type == "MatMulNBits"}
    assert len({node.name for node in model.graph}) == len([node.name for node in model.graph])


def test_a_tied_table_shares_all_bytes() -> None:
    ids = np.random.default_rng(0).integers(0, 150, (2, 5))
    model = check(tied(150, 64), {"ids": ids})
    own = {"e.signs", "e.scales", "e.offsets", "e.rank"}
    assert set(model.graph.initializers) == own | {"onnxq.planes.spread", "onnxq.planes.signs"}


def test_weights_of_branches(tmp_path: Path) -> None:
    """One table for both branches, its codes folded in each."""
    fed = {"ids": np.arange(20).reshape(2, 10)}
    for past in (True, False):
        model = check(models.merged_decoder(20, 32), {**fed, "use_cache_branch": np.array([past])})
    run_at(ir.to_proto(model), {**fed, "use_cache_branch": np.array([True])}, "basic", tmp_path)
    (choice,) = onnx.load(tmp_path / "optimized.onnx").graph.node
    for branch in (attribute.g for attribute in choice.attribute):
        made = {name for node in branch.node for name in node.output}
        products = [node for node in branch.node if node.op_type == "MatMulNBits"]
        assert len(products) > 2
        assert all(node.input[1] not in made and node.input[2] not in made for node in products)


def test_half_precision() -> None:
    half = models.model(
        [models.node("MatMul", "x w", "y", "fc")],
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT16, ["s", K])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, ["s", N])],
        {"w": models.weight(K, N, dtype=np.float16)},
    )
    check(half, {"x": models.weight(3, K).astype(np.float16)})
