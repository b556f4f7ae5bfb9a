"""Which biases and norm parameters are found."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from onnxq.distillation.vectors import layer_biases, norm_parameters
from tests.distillation.models import linear_weights, network, opened
from tests.graph import models


@pytest.mark.parametrize("written_out", [False, True])
def test_gains_and_biases(written_out: bool, tmp_path: Path) -> None:
    loaded = opened(network(written_out=written_out), tmp_path)
    sites = [site for found in linear_weights(loaded) for site in found.sites]
    assert [value.name for value in layer_biases(sites)] == ["up.bias", "down.bias"]
    assert [value.name for value in norm_parameters(loaded.model)] == ["norm.gain", "norm.bias"]


def test_a_product_that_is_no_norm_has_no_gain() -> None:
    nodes = [
        models.node("ReduceMean", "x", "m", keepdims=1),
        models.node("Div", "x m", "q"),  # no root: a share, not a norm
        models.node("Mul", "q v", "y"),
    ]
    proto = models.model(nodes, [models.floats("x", [2, 8])], [models.floats("y", [2, 8])], {"v": models.weight(8)})
    assert norm_parameters(models.as_ir(proto)) == []


def test_vectors_that_a_caller_may_replace_are_left_alone() -> None:
    proto = models.model(
        [models.node("LayerNormalization", "x g b", "y")],
        [models.floats("x", [2, 8]), models.floats("g", [8])],
        [models.floats("y", [2, 8])],
        {"g": models.weight(8), "b": models.weight(8, seed=1)},
    )
    assert [value.name for value in norm_parameters(models.as_ir(proto))] == ["b"]
