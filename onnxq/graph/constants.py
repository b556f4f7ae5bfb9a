"""Which values are constant, where nodes stand, and what view operators do to a constant before a site."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnxq.graph.layout import Layout
from onnxq.graph.load import all_graphs, all_nodes
from onnxq.graph.tensors import WEIGHT_TYPES, constant_tensor, read_array

VIEW_OPS = ("Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast")
"""Operators that a weight is followed through: they move elements or change their type, and compute nothing.
"""


@dataclass(frozen=True)
class Refusal:
    """Why a use of a constant is no site.

    Attributes:
        reason: in words, naming the node.
        generic: nothing is wrong with the use, its operator just is not one that onnxq replaces.
        quantised: the constant belongs to a weight that is quantised already.
    """

    reason: str
    generic: bool = False
    quantised: bool = False


@dataclass(frozen=True)
class Seen:
    """A constant as one node reads it: the layout over its root and the element type at that point."""

    layout: Layout
    dtype: ir.DataType


@dataclass(frozen=True)
class Place:
    """Where a node stands.

    Attributes:
        order: its number in a walk through the main graph with its subgraphs, then the functions.
        scope: "" for the main graph, "/If_0.then_branch" in a subgraph, "domain::Name" in a function.
        graph: the graph or function that holds it.
    """

    order: int
    scope: str
    graph: ir.Graph | ir.Function


def places(model: ir.Model) -> dict[ir.Node, Place]:
    """The place of every node, in walking order."""
    found: dict[ir.Node, Place] = {}

    def enter(graph: ir.Graph | ir.Function, scope: str) -> None:
        for node in graph:
            found[node] = Place(len(found), scope, graph)
            for attribute in node.attributes.values():
                if attribute.is_ref():
                    continue
                here = f"{scope}/{node.name or node.op_type}.{attribute.name}"
                if attribute.type == ir.AttributeType.GRAPH:
                    enter(attribute.as_graph(), here)
                elif attribute.type == ir.AttributeType.GRAPHS:
                    for index, subgraph in enumerate(attribute.as_graphs()):
                        enter(subgraph, f"{here}[{index}]")

    enter(model.graph, "")
    for function in model.functions.values():
        enter(function, f"{function.domain}::{function.name}")
    return found


def stored_constants(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Every initializer and every output of a Constant node, with its tensor."""
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value
    for node in all_nodes(model):
        if node.op_type == "Constant" and node.domain == "":
            tensor = constant_tensor(node.outputs[0])
            if tensor is not None:
                yield node.outputs[0], tensor


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is stored in the model, or a view of such a value."""
    while value is not None:
        if constant_tensor(value) is not None:
            return True
        producer = value.producer()
        if producer is None or producer.domain != "" or producer.op_type not in VIEW_OPS:
            return False
        if not all(v is None or is_constant(v) for v in producer.inputs[1:]):
            return False
        value = producer.inputs[0] if producer.inputs else None
    return False


def int_attribute(node: ir.Node, name: str, default: int) -> int | None:
    """An integer attribute, or None where a function attribute decides it."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    return None if attribute.is_ref() else attribute.as_int()


def follow(node: ir.Node, seen: Seen) -> Seen | Refusal:
    """What comes out of a view operator whose first input is ``seen``.

    1. Identity passes on.
    2. Transpose permutes; its ``perm`` must be written in the node.
    3. Reshape, Squeeze and Unsqueeze need a constant shape or axes.
    4. Cast between float weight types passes on: the encoding is made from the stored, more exact, elements.
    """
    layout, where = seen.layout, f"{node.op_type} '{node.name}'"
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        return Refusal(f"{where} takes an attribute from its function's caller")
    try:
        if node.op_type == "Identity":  # rule 1
            return seen
        if node.op_type == "Transpose":  # rule 2
            perm = node.attributes.get("perm")
            order = perm.as_ints() if perm else tuple(reversed(range(len(layout.shape))))
            return Seen(layout.transposed(tuple(order)), seen.dtype)
        if node.op_type == "Cast":  # rule 4
            to = ir.DataType(node.attributes["to"].as_int())
            if {to, seen.dtype} <= set(WEIGHT_TYPES) or to == seen.dtype:
                return Seen(layout, to)
            return Refusal(f"{where} turns it from {seen.dtype.name} to {to.name}", generic=True)
        shape = _reshaped(node, layout.shape)  # rule 3
    except (ValueError, IndexError, KeyError) as error:
        return Refusal(f"{where} is not valid on shape {list(layout.shape)}: {error}")
    if shape is None:
        return Refusal(f"{where} has a computed shape")
    return Seen(layout.reshaped(shape), seen.dtype)


def _reshaped(node: ir.Node, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The output shape of Reshape, Squeeze or Unsqueeze; None when it is not written in the model."""
    given = _constant_ints(node.inputs[1] if len(node.inputs) > 1 else None)
    if node.op_type == "Reshape":
        return None if given is None else _reshape_target(node, shape, given)
    written = node.attributes.get("axes")  # functions may import an operator set before 13
    if written is not None:
        given = tuple(written.as_ints())
    if given is None:
        computed = len(node.inputs) > 1 and node.inputs[1] is not None
        if computed or node.op_type == "Unsqueeze":
            return None
        given = tuple(axis for axis, d in enumerate(shape) if d == 1)
    rank = len(shape) + (len(given) if node.op_type == "Unsqueeze" else 0)
    axes = {axis % rank for axis in given}
    if node.op_type == "Squeeze":
        if any(shape[axis] != 1 for axis in axes):
            raise ValueError("Squeeze of an axis longer than 1")
        return tuple(d for axis, d in enumerate(shape) if axis not in axes)
    rest = iter(shape)
    return tuple(1 if axis in axes else next(rest) for axis in range(rank))


def _reshape_target(node: ir.Node, shape: tuple[int, ...], target: tuple[int, ...]) -> tuple[int, ...]:
    keep_zero = int_attribute(node, "allowzero", 0) == 1
    dims = [shape[i] if d == 0 and not keep_zero else d for i, d in enumerate(target)]
    if -1 in dims:
        known, total = 1, 1
        for d in dims:
            known *= d if d != -1 else 1
        for d in shape:
            total *= d
        dims[dims.index(-1)] = total // known if known else 0
    return tuple(dims)


def _constant_ints(value: ir.Value | None) -> tuple[int, ...] | None:
    while value is not None and (producer := value.producer()) is not None and producer.op_type == "Identity":
        value = producer.inputs[0]
    tensor = constant_tensor(value)
    return None if tensor is None else tuple(int(i) for i in read_array(tensor).reshape(-1))
