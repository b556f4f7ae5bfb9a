"""Which products of two activations are attention's, how calibration looks at them, and rounding what enters them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from onnxq.calibration import RangeStatistics, collect, model_inputs, open_data
from onnxq.calibration.clipping import ActivationScale, choose_clip, round_tokens, round_with
from onnxq.errors import ModelError
from onnxq.passes.activations import Rounding
from onnxq.passes.attention import RoundAttentionPass, attention_products
from tests.calibration.models import Loaded, weight
from tests.encodings import relative_error
from tests.passes.levels import LEVELS, run_at

HEADS, D = 2, 4
WIDTH = HEADS * D
VOCABULARY = 11
STEPS = 2e-3
"""Less than rounding changes: sums differ in their last bits, and a value may then go to the other neighbour."""


def attention(opset: int = 21, softmax: str = "p = Softmax <axis = -1> (masked)") -> Loaded:
    """Tokens through one layer of attention with two heads, a mask, rotary angles and a product that is none."""
    text = f"""<ir_version: 10, opset_import: ["" : {opset}]>
    m (int64[B, S] input_ids, int64[B, S] attention_mask) => (float[B, S, 8] y) {{
        x = Gather (table, input_ids)
        q_y = MatMul (x, wq)
        k_y = MatMul (x, wk)
        v_y = MatMul (x, wv)
        heads = Constant <value_ints = [0, 0, 2, 4]> ()
        q_h = Reshape (q_y, heads)
        k_h = Reshape (k_y, heads)
        v_h = Reshape (v_y, heads)
        q_t = Transpose <perm = [0, 2, 1, 3]> (q_h)
        k_t = Transpose <perm = [0, 2, 3, 1]> (k_h)
        v_t = Transpose <perm = [0, 2, 1, 3]> (v_h)
        axes = Constant <value_ints = [1]> ()
        last = Constant <value_ints = [2]> ()
        mask = Cast <to = 1> (attention_mask)
        positions = Unsqueeze (mask, axes)
        column = Unsqueeze (mask, last)
        angles = MatMul (column, positions)
        turned = Cos (angles)
        turned_h = Unsqueeze (turned, axes)
        scores = MatMul (q_t, k_t)
        half = Constant <value_float = 0.5> ()
        scaled = Mul (scores, half)
        some = Add (scaled, turned_h)
        one = Constant <value_float = 1.0> ()
        far = Constant <value_float = -1000.0> ()
        away = Sub (one, positions)
        bias = Mul (away, far)
        bias_h = Unsqueeze (bias, axes)
        masked = Add (some, bias_h)
        {softmax}
        c = MatMul (p, v_t)
        c_t = Transpose <perm = [0, 2, 1, 3]> (c)
        flat = Constant <value_ints = [0, 0, 8]> ()
        y = Reshape (c_t, flat)
    }}"""
    proto = onnx.parser.parse_model(text)
    arrays = {"table": weight("table", VOCABULARY, WIDTH), **{f"w{n}": weight(f"w{n}", WIDTH, WIDTH) for n in "qkv"}}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    for node in proto.graph.node:
        if node.op_type == "MatMul":
            node.name = f"{node.output[0]}_product"
    inferred = onnx.shape_inference.infer_shapes(proto)
    return Loaded(ir.from_proto(inferred))


FEEDS = [
    {"input_ids": np.array([[1, 2, 3], [4, 5, 6]]), "attention_mask": np.array([[1, 1, 0], [1, 1, 1]])},
    {"input_ids": np.array([[7, 8, 9, 10, 0]]), "attention_mask": np.array([[1, 1, 1, 0, 0]])},
]


def in_numpy(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs of both products, [B, heads, ...], and a function's worth of the rest."""
    x = weight("table", VOCABULARY, WIDTH)[feed["input_ids"]]
    q, k, v = ((x @ weight(f"w{n}", WIDTH, WIDTH)).reshape(*x.shape[:2], HEADS, D).transpose(0, 2, 1, 3) for n in "qkv")
    return {"q": q, "k": k, "v": v, "mask": feed["attention_mask"].astype(np.float32)}


def output(feed: dict[str, np.ndarray], roundings: dict[str, Rounding]) -> np.ndarray:
    def turn(name: str, values: np.ndarray) -> np.ndarray:
        if name not in roundings:
            return values
        rounding = roundings[name]
        if rounding.static is not None:
            return round_with(values, rounding.static)
        if name.endswith("left"):
            return round_tokens(values, rounding.kind)
        return round_tokens(values.swapaxes(-1, -2), rounding.kind).swapaxes(-1, -2)

    t = in_numpy(feed)
    mask = t["mask"]
    scores = turn("scores_product/left", t["q"]) @ turn("scores_product/right", t["k"].swapaxes(-1, -2)) * 0.5
    scores = scores + np.cos(mask[:, :, None] * mask[:, None])[:, None] - 1000 * (1 - mask)[:, None, None]
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    c = turn("c_product/left", p) @ turn("c_product/right", t["v"])
    return c.transpose(0, 2, 1, 3).reshape(*feed["input_ids"].shape, WIDTH)


def test_both_products_are_found_and_rotary_angles_are_not() -> None:
    found = attention_products(attention().model)
    assert [(product.name, product.role) for product in found] == [
        ("scores_product", "scores"),
        ("c_product", "values"),
    ]
    requests = [request for product in found for request in product.requests()]
    assert [(r.site_name, r.value.name, r.side, r.level) for r in requests] == [
        ("scores_product/left", "q_t", "right", "ranges"),
        ("scores_product/right", "k_t", "left", "ranges"),
        ("c_product/left", "p", "right", "ranges"),
        ("c_product/right", "v_t", "right", "ranges"),
    ]


def test_zeros_for_rows_that_are_all_masked_are_looked_through() -> None:
    softmax = """raw = Softmax <axis = -1> (masked)
        nan = IsNaN (raw)
        none = Constant <value_float = 0.0> ()
        p = Where (nan, none, raw)"""
    assert [product.role for product in attention_products(attention(softmax=softmax).model)] == ["scores", "values"]


def test_a_classifiers_product_in_front_of_softmax_is_none() -> None:
    """With its weight as it was exported, and as stock forms store it."""
    loaded = Loaded(
        ir.from_proto(
            onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21]>
            m (float[B, S, 8] x, float[8, 3] w) => (float[B, S, 3] y, float[B, S, 3] z)
            <int8[8, 3] codes = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6},
             float s = {0.5}> {
                d = DequantizeLinear (codes, s)
                t = Transpose <perm = [0, 1]> (d)
                h = MatMul (x, t)
                y = Softmax (h)
                f = MatMul (x, w)
                z = Softmax (f)
            }""")
        )
    )
    assert attention_products(loaded.model) == []


def collected(loaded: Loaded) -> dict[str, RangeStatistics]:
    requests = [request for product in attention_products(loaded.model) for request in product.requests()]
    found = collect(loaded, requests, open_data(FEEDS, model_inputs(loaded.model)))
    assert found.notes == ()
    statistics = {request.site_name: found.site(request.site_name) for request in requests}
    assert all(isinstance(item, RangeStatistics) for item in statistics.values())
    return statistics  # type: ignore[return-value]


def test_calibration_sees_tokens_without_padding() -> None:
    found = collected(attention())
    tensors = [in_numpy(feed) for feed in FEEDS]
    for name, letter in (("scores_product/left", "q"), ("scores_product/right", "k"), ("c_product/right", "v")):
        rows = np.concatenate([t[letter].transpose(0, 2, 1, 3)[t["mask"] != 0].reshape(-1, D) for t in tensors])
        assert found[name].count == rows.shape[0] == HEADS * 8
        assert found[name].maximum == pytest.approx(rows.max(), rel=1e-5)
        assert found[name].minimum == pytest.approx(rows.min(), rel=1e-5)
        assert found[name].rows.shape == (HEADS * 8, D)
    shares = found["c_product/left"]
    assert (shares.count, shares.rows.shape) == (HEADS * 8, (HEADS * 8, 5))
    np.testing.assert_allclose(shares.rows.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize(("kind", "by_token"), [("e4m3fn", False), ("e4m3fn", True), ("uint8", False)])
def test_what_enters_the_products_is_rounded(
    kind: str, by_token: bool, stock: bool, level: str, tmp_path: Path
) -> None:
    loaded = attention()
    roundings = {
        name: Rounding(kind, None if by_token else choose_clip(item, kind), stock)  # type: ignore[arg-type]
        for name, item in collected(loaded).items()
    }
    assert RoundAttentionPass(roundings)(loaded.model).modified
    after = ir.to_proto(loaded.model)
    onnx.checker.check_model(after, full_check=True)
    for feed in FEEDS:
        (got,), _ = run_at(after, feed, level, tmp_path)
        keep = feed["attention_mask"] != 0
        assert relative_error(got[keep], output(feed, roundings)[keep]) <= STEPS
        assert relative_error(got[keep], output(feed, {})[keep]) > STEPS
    if not stock and kind == "e4m3fn":
        name = "Float8RoundTokens" if by_token else "Float8Round"
    else:
        name = "ReduceMax" if by_token else "QuantizeLinear" if stock else "Round"
    assert [node.op_type for node in after.graph.node].count(name) == 4


def test_inputs_without_a_rounding_stay(tmp_path: Path) -> None:
    loaded = attention()
    roundings = {"c_product/left": Rounding("e5m2", ActivationScale("e5m2", 2.0**-16), stock=True)}
    RoundAttentionPass(roundings)(loaded.model)
    (got,), _ = run_at(ir.to_proto(loaded.model), FEEDS[0], "disabled", tmp_path)
    keep = FEEDS[0]["attention_mask"] != 0
    assert relative_error(got[keep], output(FEEDS[0], roundings)[keep]) <= STEPS
    assert [node.op_type for node in loaded.model.graph].count("QuantizeLinear") == 1


def test_what_is_no_input_of_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="no product of attention has the input angles_product/left"):
        RoundAttentionPass({"angles_product/left": Rounding("e4m3fn", None)})(attention().model)


def test_models_that_cannot_be_rounded_say_the_way_out() -> None:
    scale = ActivationScale("e4m3fn", 1.0)
    with pytest.raises(ModelError, match="opset 17 is too old"):
        RoundAttentionPass({"scores_product/left": Rounding("e4m3fn", scale, stock=True)})(attention(opset=17).model)
    RoundAttentionPass({"scores_product/left": Rounding("e4m3fn", scale)})(attention(opset=17).model)
    loaded = attention()
    product = attention_products(loaded.model)[0]
    turned = product.requests()[1].value
    hidden = ir.node("Neg", [turned])
    loaded.model.graph.insert_before(product.node, hidden)
    product.node.replace_input_with(1, hidden.outputs[0])
    with pytest.raises(ModelError, match="no known rank"):
        RoundAttentionPass({"scores_product/right": Rounding("e4m3fn", None)})(loaded.model)


def test_a_rank_may_be_known_from_a_transpose_alone() -> None:
    loaded = attention()
    for node in loaded.model.graph:
        for output in node.outputs:
            output.shape = None
    products = attention_products(loaded.model)
    assert [product.role for product in products] == ["scores", "values"]
    roundings = {request.site_name: Rounding("e4m3fn", None) for p in products for request in p.requests()}
    assert RoundAttentionPass(roundings)(loaded.model).modified
