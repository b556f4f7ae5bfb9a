from __future__ import annotations

import numpy as np

from onnxq.calibration import collect, model_inputs, open_data
from tests.calibration.models import HEADER, H, K, Loaded, assert_moments, parse, tap, weight

MASK = np.array([[1, 1, 0], [1, 0, 0]], np.int64)


def run(loaded: Loaded, feed: dict[str, np.ndarray], *names: str):  # type: ignore[no-untyped-def]
    data = open_data([feed], model_inputs(loaded.model))
    return collect(loaded, [tap(loaded, n) for n in names], data)


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape[0]).standard_normal(shape).astype(np.float32)


def test_flattened_and_per_head_shapes_match_the_mask() -> None:
    loaded = parse(
        HEADER
        + """m (float[B, S, 6] x, int64[B, S] attention_mask) => (float[N, 6] flat, float[B, H, S, 3] heads) {
            shape = Constant <value_ints = [-1, 6]> ()
            flat = Reshape (x, shape)
            split = Constant <value_ints = [0, 0, 2, 3]> ()
            inner = Reshape (x, split)
            heads = Transpose <perm = [0, 2, 1, 3]> (inner)
        }"""
    )
    x = floats(2, 3, K)
    found = run(loaded, {"x": x, "attention_mask": MASK}, "flat", "inner", "heads")
    kept = x[MASK != 0]
    assert_moments(found["flat"], kept)
    assert_moments(found["inner"], kept.reshape(-1, 3))
    assert_moments(found["heads"], kept.reshape(-1, 3))
    assert found.notes == ()


def test_a_pooled_tensor_matches_no_mask_and_is_reported() -> None:
    loaded = parse(
        HEADER
        + """m (float[B, S, 6] x, int64[B, S] attention_mask) => (float[B, 6] p) {
            first = Constant <value_int = 0> ()
            p = Gather <axis = 1> (x, first)
        }"""
    )
    x = floats(2, 3, K)
    found = run(loaded, {"x": x, "attention_mask": MASK}, "p")
    assert_moments(found["p"], x[:, 0])
    assert len(found.notes) == 1
    assert "match no mask" in found.notes[0]


DECODER = """m (int64[B, T] input_ids, float[B, S, 6] encoder_hidden_states, int64[B, S] encoder_attention_mask)
    => (float[B, T, 5] d, float[B, S, 5] e) {
    x = Gather (table, input_ids)
    d = MatMul (x, w)
    k = Neg (encoder_hidden_states)
    e = MatMul (k, w)
}"""


def test_the_encoders_mask_is_not_taken_for_decoder_rows() -> None:
    loaded = parse(HEADER + DECODER, table=weight("table", 9, K), w=weight("w", K, H))
    ids, states = np.arange(6).reshape(2, 3), floats(2, 3, K)
    feed = {"input_ids": ids, "encoder_hidden_states": states, "encoder_attention_mask": MASK}
    found = run(loaded, feed, "x", "k")
    assert_moments(found["x"], weight("table", 9, K)[ids].reshape(-1, K))  # equal lengths, and still all rows
    assert_moments(found["k"], -states[MASK != 0])


def test_one_graph_with_both_masks() -> None:
    loaded = parse(
        HEADER
        + """m (int64[B, S] input_ids, int64[B, S] attention_mask, int64[B, T] decoder_input_ids,
               int64[B, T] decoder_attention_mask) => (float[B, S, 6] e, float[B, T, 6] d) {
            e0 = Gather (table, input_ids)
            e = Neg (e0)
            d0 = Gather (table, decoder_input_ids)
            axes = Constant <value_ints = [1]> ()
            pool = ReduceMean (e, axes)
            d = Add (d0, pool)
        }""",
        table=weight("table", 9, K),
    )
    table, ids, decoder = weight("table", 9, K), np.arange(6).reshape(2, 3), np.arange(6).reshape(2, 3) + 2
    other = np.array([[1, 0, 0], [1, 1, 1]], np.int64)
    feed = {
        "input_ids": ids,
        "attention_mask": MASK,
        "decoder_input_ids": decoder,
        "decoder_attention_mask": other,
    }
    found = run(loaded, feed, "e", "d")
    assert_moments(found["e"], -table[ids][MASK != 0])
    d = table[decoder] - table[ids].mean(1, keepdims=True)
    assert_moments(found["d"], d[other != 0])


def test_with_cached_keys_the_last_columns_of_the_mask_count() -> None:
    loaded = parse(
        HEADER
        + """m (int64[B, S] input_ids, int64[B, L] attention_mask, float[B, P, 6] past_key_values) =>
            (float[B, S, 6] y, float[B, P, 6] z) {
            x = Gather (table, input_ids)
            y = Neg (x)
            z = Neg (past_key_values)
        }""",
        table=weight("table", 9, K),
    )
    ids = np.arange(4).reshape(2, 2)
    mask = np.array([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]], np.int64)
    feed = {"input_ids": ids, "attention_mask": mask, "past_key_values": floats(2, 3, K)}
    found = run(loaded, feed, "x")
    assert_moments(found["x"], weight("table", 9, K)[ids][mask[:, 3:] != 0])
