"""Which operators the interpreter knows, and what a model uses beyond them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnxq.backprop import elementwise, indexing, linear, normalisation, reductions, shapes
from onnxq.backprop.call import Op
from onnxq.backprop.definitions import DEFINED
from onnxq.graph.load import OLDEST_OPSET, all_nodes

OPS: dict[str, Op] = {
    **elementwise.OPS,
    **indexing.OPS,
    **linear.OPS,
    **normalisation.OPS,
    **reductions.OPS,
    **shapes.OPS,
}
"""Standard operators by name. All of them mean the same in every operator set from 13 on, save where they say so."""

CONTROL = ("If", "Loop")
"""Operators that run subgraphs; see `onnxq.backprop.graph`."""


@dataclass(frozen=True)
class MissingOp:
    """An operator that a model uses and the interpreter does not know.

    Attributes:
        op: "Resize", or "domain::Name".
        nodes: names of the nodes.
    """

    op: str
    nodes: tuple[str, ...]


def missing_ops(model: ir.Model) -> tuple[MissingOp, ...]:
    """Operators of a model that `TorchGraph` can't run, in all its graphs and functions, sorted by name."""
    found: dict[str, list[str]] = {}
    for node in all_nodes(model):
        if not is_known(model, node):
            found.setdefault(op_name(node), []).append(node.name or "")
    return tuple(MissingOp(op, tuple(nodes)) for op, nodes in sorted(found.items()))


def is_known(model: ir.Model, node: ir.Node) -> bool:
    """Whether the interpreter can run a node: a standard operator of ours, or a call of a model-local function."""
    if node.op_identifier() in model.functions:
        return True
    if node.domain != "":
        return False
    return node.op_type in OPS or node.op_type in CONTROL or node.op_type in DEFINED


def op_name(node: ir.Node) -> str:
    """The operator, with its domain where that is not the standard one."""
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def too_old(opset: int) -> bool:
    """Whether a graph or function imports an operator set whose operators mean something else here and there."""
    return opset < OLDEST_OPSET


def subgraphs(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """(attribute name, graph) of the graphs that a node holds."""
    for attribute in node.attributes.values():
        if not attribute.is_ref() and attribute.type == ir.AttributeType.GRAPH:
            yield attribute.name, attribute.as_graph()
