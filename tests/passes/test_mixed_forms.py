"""Mixed weights in graphs, on stock ONNX Runtime, against numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxq.formats.mixed import MixedEncoding, MixedFormat
from onnxq.graph import find_weights
from onnxq.graph.weights import Weight
from onnxq.passes.forms import MixedForm, Readers, StoredWeight, choose_form
from onnxq.passes.rewrite import Assignment, RewriteSitesPass, site_refusal
from tests.encodings import random_mixed, relative_error
from tests.graph import models
from tests.passes.test_framed_forms import K, N, X, attention, counts, initializers, linear, run

FLOAT32_SUMMATION = 2e-6
BAND = 32

Encode = Callable[[Weight, int], MixedEncoding]


def random_order(weight: Weight, seed: int) -> MixedEncoding:
    return random_mixed(weight.n, weight.k, BAND, seed)


def one_order(weight: Weight, seed: int) -> MixedEncoding:
    """That of the weights that read the same tensor."""
    encoding = random_order(weight, seed)
    order = np.random.default_rng(0).permutation(weight.k)
    return dataclasses.replace(encoding, format=MixedFormat.of(BAND, order, encoding.format.by_band()))


def rewrite(
    proto: onnx.ModelProto, encode: Encode = random_order, *, stock: bool = False, level: int = 4
) -> tuple[ir.Model, ir.Model]:
    """The model with random mixed weights in it, and the original with what they decode to."""
    model, reference = ir.from_proto(proto), ir.from_proto(proto)
    twins = {weight.name: weight for weight in find_weights(reference).weights}
    shared: dict[str, ir.Value] = {}
    assignments = []
    for seed, weight in enumerate(find_weights(model).weights):
        assert all(site_refusal(site, weight) is None for site in weight.sites)
        parts, decoded = [], []
        for index in range(weight.batch):
            encoding = encode(weight, seed + 10 * index)
            readers = Readers.of(weight.sites)
            form, note = choose_form(encoding, stock=stock, opset=21, readers=readers, accuracy_level=level)
            assert isinstance(form, MixedForm)
            assert ("no mixed depths" in note) == stock
            prefix = weight.name if weight.batch == 1 else f"{weight.name}.{index}"
            tensors = initializers(form, encoding, prefix, shared)
            parts.append(StoredWeight(prefix, form, encoding.shape, form.attributes(encoding), tensors))
            decoded.append(encoding.dequantize())
        assignments.append(Assignment(weight, tuple(parts)))
        for site in twins[weight.name].sites:
            array = np.ascontiguousarray(site.layout.undo(np.concatenate(decoded)))
            site.root.const_value = ir.tensor(array.astype(site.root.const_value.dtype.numpy()), name=site.root.name)
    RewriteSitesPass(assignments)(model)
    return model, reference


def check(
    proto: onnx.ModelProto,
    feeds: dict[str, np.ndarray],
    encode: Encode = random_order,
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


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("opset", [13, 21])
def test_a_product_takes_its_bias_along(opset: int, stock: bool) -> None:
    model = check(linear(opset=opset), {"x": X}, stock=stock)
    (node,) = [node for node in model.graph if node.op_type != "Constant"]
    assert (node.domain, node.op_type, node.name) == ("onnxq", "MixedBitMatMul", "fc")
    assert [value.name for value in node.inputs[:5]] == ["x", "w.packed", "w.depths", "w.columns", "w.scales"]
    assert [node.attributes.get_int(name, 0) for name in ("K", "N", "band", "accuracy_level")] == [K, N, BAND, 4]


@pytest.mark.parametrize("lead", [(), ("s",), (2, "b", "s")], ids=len)
def test_any_rank_and_ragged_sizes(lead: tuple[int | str, ...]) -> None:
    check(linear(50, 33, lead), {"x": models.weight(*(2, 3, 4)[: len(lead)], 33)})


def test_weights_of_one_input_share_their_order() -> None:
    model = check(attention(), {"x": X, "z": X}, one_order)
    assert counts(model)["MixedBitMatMul"] == 3
    names = list(model.graph.initializers)
    assert sum(name.startswith("onnxq.order.") for name in names) == 1
    assert {"onnxq.mixed.tables", "onnxq.mixed.steps"} <= set(names)
    assert len(names) == 3 * 4 + 3


def test_other_orders_have_other_names() -> None:
    model = check(attention("z"), {"x": X, "z": models.weight(2, 3, K, seed=5)})
    assert sum(name.startswith("onnxq.order.") for name in model.graph.initializers) == 3


def test_no_depth_but_0() -> None:
    model = check(linear(), {"x": X}, lambda weight, seed: random_mixed(weight.n, weight.k, BAND, depths=[0]))
    assert model.graph.initializers["w.packed"].const_value.size == 0


def test_half_precision_stacks_and_left_factors() -> None:
    half = models.model(
        [models.node("MatMul", "x w", "y")],
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT16, ["s", K])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, ["s", N])],
        {"w": models.weight(K, N, dtype=np.float16)},
    )
    float16 = 2e-3
    check(half, {"x": X[0].astype(np.float16)}, tolerance=float16)
    stack = models.model(
        [models.node("MatMul", "x w", "y")],
        [models.floats("x", [2, "s", K])],
        [models.floats("y", [2, "s", N])],
        {"w": models.weight(2, K, N)},
    )
    check(stack, {"x": X})
    left = models.model(
        [models.node("MatMul", "w x", "y")],
        [models.floats("x", ["b", 100, 3])],
        [models.floats("y", ["b", N, 3])],
        {"w": models.weight(N, 100)},
    )
    check(left, {"x": models.weight(2, 100, 3)})


def test_a_look_up_has_no_form() -> None:
    form, _ = choose_form(random_mixed(N, K), stock=False, opset=21, readers=Readers(0, 1, False), accuracy_level=4)
    weight = StoredWeight("w", form, (N, K), {}, {})
    with pytest.raises(NotImplementedError, match="look-ups"):
        form.table(None, None, weight)
