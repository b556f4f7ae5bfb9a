"""Inputs made up for models: sizes by name, values that the model takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxq.errors import ModelError
from onnxq.runtime.feeds import random_feed
from tests.graph.models import floats, integers, merged_decoder, model, node, save
from tests.runtime.models import encoder, stock_session


def test_a_model_runs_on_what_was_made_up(tmp_path: Path) -> None:
    path = encoder(tmp_path / "m.onnx", vocabulary=96)
    feed = random_feed(path, batch=2, length=7, seed=1)
    assert feed["input_ids"].shape == (2, 7)
    assert feed["input_ids"].max() < 96
    assert (feed["attention_mask"] == 1).all()
    assert stock_session(path).run(None, feed)[0].shape == (2, 7, 64)


def test_equal_seeds_give_equal_feeds(tmp_path: Path) -> None:
    path = encoder(tmp_path / "m.onnx")
    first, second, other = (random_feed(path, seed=seed)["input_ids"] for seed in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_tables_in_branches_bound_the_ids(tmp_path: Path) -> None:
    path = save(merged_decoder(rows=20), tmp_path / "m.onnx")
    feed = random_feed(path, length=200)
    assert 2 <= feed["ids"].max() < 20
    assert feed["use_cache_branch"].dtype == np.bool_
    stock_session(path).run(None, feed)


def test_sums_of_dimensions_and_the_past(tmp_path: Path) -> None:
    nodes = [
        node("Identity", "past_key", "a"),
        node("Identity", "attention_mask", "b"),
        node("Identity", "position_ids", "c"),
    ]
    inputs = [
        floats("past_key", ["batch_size", 2, "past_sequence_length", 4]),
        integers("attention_mask", ["batch_size", "past_sequence_length + 1"]),
        integers("position_ids", ["batch_size", "sequence_length"]),
    ]
    outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in (("a", 1), ("b", 7), ("c", 7))]
    feed = random_feed(save(model(nodes, inputs, outputs), tmp_path / "m.onnx"), batch=3, length=1, past=5)
    assert feed["past_key"].shape == (3, 2, 5, 4)
    assert feed["attention_mask"].shape == (3, 6)
    assert feed["position_ids"].tolist() == [[5]] * 3


def test_strings_cannot_be_made_up(tmp_path: Path) -> None:
    text = helper.make_tensor_value_info("text", TensorProto.STRING, ["batch"])
    out = helper.make_tensor_value_info("y", TensorProto.STRING, ["batch"])
    path = tmp_path / "m.onnx"
    onnx.save(model([node("Identity", "text", "y")], [text], [out]), path)
    with pytest.raises(ModelError, match="--data"):
        random_feed(path)
