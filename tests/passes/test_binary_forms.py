"""Binary weights in graphs, on stock ONNX Runtime, against numpy."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxq.formats.binary import BinaryEncoding
from onnxq.graph import find_weights
from onnxq.graph.weights import Weight
from onnxq.passes.forms import BinaryForm, PlanesForm, Readers, StoredWeight, choose_form
from onnxq.passes.rewrite import Assignment, RewriteSitesPass, site_refusal
from tests.encodings import random_binary, relative_error
from tests.graph import models
from tests.passes.test_framed_forms import K, N, X, counts, initializers, linear, run

FLOAT32_SUMMATION = 2e-6
GROUP = 32


def by_row(weight: Weight, seed: int) -> BinaryEncoding:
    planes = np.random.default_rng(seed).integers(1, 5, weight.n)
    return random_binary(planes, weight.k, GROUP, offset=True, seed=seed)


def rewrite(
    proto: onnx.ModelProto, encode=by_row, *, stock: bool = False, opset: int = 21
) -> tuple[ir.Model, ir.Model]:
    """The model with random binary weights in it, and the original with what they decode to."""
    model, reference = ir.from_proto(proto), ir.from_proto(proto)
    twins = {weight.name: weight for weight in find_weights(reference).weights}
    assignments, shared = [], {}
    for seed, weight in enumerate(find_weights(model).weights):
        assert all(site_refusal(site, weight) is None for site in weight.sites)
        encoding = encode(weight, seed)
        readers = Readers.of(weight.sites)
        form, note = choose_form(encoding, stock=stock, opset=opset, readers=readers, accuracy_level=4)
        refused = stock and weight.k % 32 != 0
        assert isinstance(form, PlanesForm if stock and not refused else BinaryForm)
        assert ("are not whole blocks of 32" in note) == refused
        tensors = initializers(form, encoding, weight.name, shared)
        part = StoredWeight(weight.name, form, encoding.shape, form.attributes(encoding), tensors)
        assignments.append(Assignment(weight, (part,)))
        for site in twins[weight.name].sites:
            array = np.ascontiguousarray(site.layout.undo(encoding.dequantize()))
            site.root.const_value = ir.tensor(array.astype(site.root.const_value.dtype.numpy()), name=site.root.name)
    RewriteSitesPass(assignments)(model)
    return model, reference


def check(
    proto: onnx.ModelProto,
    feeds: dict[str, np.ndarray],
    encode=by_row,
    *,
    stock: bool = False,
    tolerance: float = FLOAT32_SUMMATION,
) -> ir.Model:
    model, reference = rewrite(proto, encode, stock=stock)
    written = ir.to_proto(model)
    onnx.checker.check_model(written, full_check=True)
    for got, expected in zip(run(written, feeds), run(ir.to_proto(reference), feeds), strict=True):
        assert got.shape == expected.shape
        assert relative_error(got.astype(np.float32), expected.astype(np.float32)) <= tolerance
    return model


def tied(vocabulary: int = 150, width: int = 40) -> onnx.ModelProto:
    """One table read by a look-up, and through a Transpose by the output projection."""
    return models.model(
        [
            models.node("Gather", "e ids", "h", "embed"),
            models.node("Transpose", "e", "et", perm=[1, 0]),
            models.node("MatMul", "h et", "y", "lm_head"),
        ],
        [models.integers("ids", ["b", "s"])],
        [models.floats("y", ["b", "s", vocabulary]), models.floats("h", ["b", "s", width])],
        {"e": models.weight(vocabulary, width)},
    )


@pytest.mark.parametrize("opset", [13, 21])
def test_a_product_takes_its_bias_along(opset: int) -> None:
    model = check(linear(opset=opset), {"x": X})
    (node,) = [node for node in model.graph if node.op_type != "Constant"]
    assert (node.domain, node.op_type, node.name) == ("onnxq", "BinaryCodeMatMul", "fc")
    assert [value.name for value in node.inputs] == ["x", "w.codes", "w.scales", "w.offsets", "w.rank", "b"]
    assert [node.attributes.get_int(name, 0) for name in ("K", "N", "group_size", "accuracy_level")] == [K, N, GROUP, 4]
    assert node.attributes.get_ints("plane_rows", [])[0] == N


@pytest.mark.parametrize("lead", [(), ("s",), (2, "b", "s")], ids=len)
@pytest.mark.parametrize("stock", [False, True])
def test_any_rank_and_ragged_sizes(lead: tuple[int | str, ...], stock: bool) -> None:
    check(linear(50, 33, lead), {"x": models.weight(*(2, 3, 4)[: len(lead)], 33)}, stock=stock)


def test_a_plain_weight_stores_no_offsets_and_no_order() -> None:
    def plain(weight: Weight, seed: int) -> BinaryEncoding:
        return random_binary([2] * weight.n, weight.k, seed=seed)

    model = check(linear(), {"x": X}, plain)
    stored = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    np.testing.assert_array_equal(stored["w.offsets"], [0])
    np.testing.assert_array_equal(stored["w.rank"], [-1])


@pytest.mark.parametrize("stock", [False, True])
def test_a_tied_table_is_stored_once_and_read_by_both_ops(stock: bool) -> None:
    ids = np.random.default_rng(0).integers(0, 150, (2, 5))
    model = check(tied(), {"ids": ids}, stock=stock)
    found = counts(model)
    assert (found["MixedBitGather"], found["BinaryCodeMatMul"]) == (1, 1)
    assert "Transpose" not in found
    assert set(model.graph.initializers) == {"e.codes", "e.scales", "e.offsets", "e.rank"}
    gather, product = (
        next(node for node in model.graph if node.op_type == name) for name in ("MixedBitGather", "BinaryCodeMatMul")
    )
    assert list(gather.inputs[1:]) == list(product.inputs[1:5])
    assert "accuracy_level" not in gather.attributes


def test_half_precision() -> None:
    half = models.model(
        [models.node("MatMul", "x w", "y")],
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT16, ["s", K])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, ["s", N])],
        {"w": models.weight(K, N, dtype=np.float16)},
    )
    float16 = 2e-3
    check(half, {"x": X[0].astype(np.float16)}, tolerance=float16)
