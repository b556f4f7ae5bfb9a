from __future__ import annotations

from onnxq.graph.load import all_graphs
from onnxq.graph.rewrite_utils import RemoveDeadPass
from tests.graph import models


def _stored(model) -> set[str]:
    return {name for graph in all_graphs(model) for name in graph.initializers}


def test_dead_initializers_go_from_subgraphs_too() -> None:
    model = models.as_ir(models.loop())
    (body,) = list(model.graph.subgraphs())
    inner, outer, add = (body.node(f"/body/{name}") for name in ("inner/MatMul", "outer/MatMul", "Add"))
    body.outputs[1] = outer.outputs[0]
    result = RemoveDeadPass()(model)
    assert result.modified
    assert result.model is model
    assert _stored(model) == {"trips", "always", "W_outer"}
    assert add.graph is None
    assert inner.graph is None
    assert not RemoveDeadPass()(model).modified


def test_a_table_read_only_inside_branches_stays() -> None:
    model = models.as_ir(models.merged_decoder())
    assert not RemoveDeadPass()(model).modified
    assert _stored(model) == {"embed.weight_merged_0", "onnx::MatMul_713_merged_0"}
