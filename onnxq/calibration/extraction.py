"""Cut a model down to what its tapped tensors need, with the taps as its only outputs.

Works on a copy of the graph that shares every tensor. Rules:
 1. A tap in the main graph becomes an output through Cast (so float16 and bfloat16 arrive as float32).
 2. A tap in an If branch becomes an extra output of the If; the other branch gives an empty tensor there.
 3. A tap in a Loop or Scan body becomes a scan output: one more leading axis, the iterations.
 4. What no tap needs goes: nodes, inputs, initializers, and the outputs of Ifs.
 5. Overridden weights become inputs, to be fed: nothing is copied, and no optimiser can fold the old values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxq.calibration.taps import GraphIndex, Tap, all_graphs, subgraphs
from onnxq.errors import CalibrationError

_PREFIX = "onnxq_tap_"


@dataclasses.dataclass(frozen=True)
class Extraction:
    """A model whose outputs are the taps, and what must be fed beside the user's data.

    Attributes:
        model: The cut model; tensors are shared with the original.
        outputs: Output names, one per tap, in the order of the taps.
        weights: Input name -> array, for overridden weights.
    """

    model: ir.Model
    outputs: tuple[str, ...]
    weights: dict[str, np.ndarray]


def extract(
    model: ir.Model,
    taps: Sequence[Tap],
    overrides: Mapping[str, np.ndarray],
    report: Literal["values", "shapes"],
) -> Extraction:
    """See the module.

    Args:
        model: Not changed.
        taps: What to put out.
        overrides: Initializer name -> the array that stands in for it.
        report: "values": float32 (or int64 for tables); "shapes": only each tap's shape, int64.

    Raises:
        CalibrationError: a tap can't be reached, or an override does not fit.
    """
    copy = model.clone()
    twins = _twins(model.graph, copy.graph)
    index = GraphIndex(copy)
    outputs = []
    for number, tap in enumerate(taps):
        value = twins.get(id(tap.value))
        if value is None:
            raise CalibrationError(f"Tap {tap.describe()} is not a tensor of the model that is calibrated.")
        outputs.append(_Lift(index, number, tap, report).lift(value))
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(outputs)
    weights = _override(copy, overrides)
    _prune(copy)
    for name in [n for n in weights if not any(i.name == n for i in copy.graph.inputs)]:
        del weights[name]
    return Extraction(copy, tuple(str(o.name) for o in outputs), weights)


def _twins(original: ir.Graph, copy: ir.Graph) -> dict[int, ir.Value]:
    """id(value of the original) -> value of the copy, by walking both in step."""
    found: dict[int, ir.Value] = {}

    def walk(left: ir.Graph, right: ir.Graph) -> None:
        for a, b in zip(left.inputs, right.inputs, strict=True):
            found[id(a)] = b
        for name, value in left.initializers.items():
            found[id(value)] = right.initializers[name]
        for m, n in zip(left, right, strict=True):
            for a, b in zip(m.outputs, n.outputs, strict=True):
                found[id(a)] = b
            for (_, inner), (_, twin) in zip(subgraphs(m), subgraphs(n), strict=True):
                walk(inner, twin)

    walk(original, copy)
    return found


class _Lift:
    """Brings one tap up to an output of the main graph (rules 1 to 3)."""

    def __init__(self, index: GraphIndex, number: int, tap: Tap, report: Literal["values", "shapes"]) -> None:
        self.index, self.number, self.tap, self.report = index, number, tap, report
        whole = report == "shapes" or tap.kind == "table"
        self.dtype = ir.DataType.INT64 if whole else ir.DataType.FLOAT
        self.names = 0

    def lift(self, value: ir.Value) -> ir.Value:
        graph = value.graph
        path = self.index.path(value)
        assert isinstance(graph, ir.Graph)
        if self.report == "shapes":
            node = ir.node("Shape", [value])
        else:
            node = ir.node("Cast", [value], attributes={"to": ir.AttrInt64("to", self.dtype.value)})
        rank = 1 if self.report == "shapes" or value.shape is None else len(value.shape)
        found = self._append(graph, node)
        for owner, _ in reversed(path):
            if owner.domain == "" and owner.op_type == "If":
                found = self._through_if(owner, found, rank)
            elif owner.domain == "" and owner.op_type in ("Loop", "Scan"):
                found = self._through_loop(owner, found)
                rank += 1
            else:
                raise CalibrationError(
                    f"Tap {self.tap.describe()} is inside a subgraph of {owner.op_type} node '{owner.name}'; only If, "
                    "Loop and Scan can be looked into. Leave that site out of calibration."
                )
        return found

    def _append(self, graph: ir.Graph, node: ir.Node) -> ir.Value:
        self._name(node.outputs[0])
        node.name = node.outputs[0].name
        graph.append(node)
        return node.outputs[0]

    def _name(self, value: ir.Value) -> ir.Value:
        value.name = f"{_PREFIX}{self.number}_{self.names}"
        value.type = ir.TensorType(self.dtype)
        self.names += 1
        return value

    def _through_if(self, owner: ir.Node, inner: ir.Value, rank: int) -> ir.Value:
        for _, branch in subgraphs(owner):
            if branch is inner.graph:
                branch.outputs.append(inner)
            else:
                empty = ir.tensor(np.zeros((0,) * max(rank, 1), self.dtype.numpy()))
                constant = ir.node("Constant", [], attributes={"value": ir.AttrTensor("value", empty)})
                branch.outputs.append(self._append(branch, constant))
        owner.resize_outputs(len(owner.outputs) + 1)
        return self._name(owner.outputs[-1])

    def _through_loop(self, owner: ir.Node, inner: ir.Value) -> ir.Value:
        body = inner.graph
        assert isinstance(body, ir.Graph)
        body.outputs.append(inner)
        # Scan lists an axis and a direction per scan output where it lists any.
        for name in ("scan_output_axes", "scan_output_directions"):
            if name in owner.attributes:
                listed = [*owner.attributes[name].as_ints(), 0]
                owner.attributes[name] = ir.AttrInt64s(name, listed)
        owner.resize_outputs(len(owner.outputs) + 1)
        return self._name(owner.outputs[-1])


def _prune(model: ir.Model) -> None:
    """Rule 4; repeated, since a dropped If output can free nodes in front of the If."""
    graph = model.graph
    nodes = -1
    while nodes != (nodes := sum(1 for _ in graph.all_nodes())):
        for inner in list(all_graphs(graph)):
            _drop_unused_if_outputs(inner)
        RemoveUnusedNodesPass()(model)
    for value in list(graph.inputs):
        if not value.uses() and not value.is_graph_output():
            graph.inputs.remove(value)
            graph.initializers.pop(str(value.name), None)


def _drop_unused_if_outputs(graph: ir.Graph) -> None:
    for node in list(graph):
        if not (node.domain == "" and node.op_type == "If"):
            continue
        kept = [i for i, o in enumerate(node.outputs) if o.uses() or o.is_graph_output()]
        if len(kept) in (0, len(node.outputs)):
            continue
        old = [node.outputs[i] for i in kept]
        for _, branch in subgraphs(node):
            values = [branch.outputs[i] for i in kept]
            branch.outputs.clear()
            branch.outputs.extend(values)
        slim = ir.Node("", "If", node.inputs, list(node.attributes.values()), num_outputs=len(kept), name=node.name)
        for before, after in zip(old, slim.outputs, strict=True):
            after.name, after.type, after.shape = before.name, before.type, before.shape
        graph.insert_before(node, slim)
        for before, after in zip(old, slim.outputs, strict=True):
            before.replace_all_uses_with(after, replace_graph_outputs=True)
        graph.remove(node, safe=False)


def _override(model: ir.Model, overrides: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rule 5."""
    fed: dict[str, np.ndarray] = {}
    if not overrides:
        return fed
    found: dict[str, list[ir.Value]] = {}
    for value in _constants(model.graph):
        if value.name in overrides:
            found.setdefault(str(value.name), []).append(value)
    for name, array in overrides.items():
        matches = found.get(name, [])
        if len(matches) != 1:
            problem = "is no initializer of the model" if not matches else "names several initializers"
            raise CalibrationError(f"Override '{name}' {problem}, so it can't be put in place. Check the name.")
        input_name = feed_constant(model, matches[0])
        fed[input_name] = _fit(name, matches[0], array)
    return fed


def feed_constant(model: ir.Model, value: ir.Value) -> str:
    """Turn an initializer (or the output of a Constant) into an input of the main graph; gives its name."""
    graph = value.graph
    assert isinstance(graph, ir.Graph)
    name = str(value.name)
    if value.is_initializer():
        graph.initializers.pop(name)
    if graph is model.graph and value.is_graph_input():
        return name
    if graph is not model.graph or value.producer() is not None:
        # A name from a branch may occur in the other branch too.
        name = f"onnxq_weight_{len(model.graph.inputs)}_{name}"
    constant = value.const_value
    assert constant is not None
    fresh = ir.Value(name=name, type=ir.TensorType(constant.dtype), shape=ir.Shape(constant.shape.numpy()))
    value.replace_all_uses_with(fresh)
    model.graph.inputs.append(fresh)
    return name


def _constants(graph: ir.Graph) -> Iterator[ir.Value]:
    for inner in all_graphs(graph):
        yield from inner.initializers.values()
        for node in inner:
            if node.domain == "" and node.op_type == "Constant" and "value" in node.attributes:
                if node.outputs[0].const_value is None:
                    node.outputs[0].const_value = node.attributes["value"].as_tensor()
                yield node.outputs[0]


def _fit(name: str, value: ir.Value, array: np.ndarray) -> np.ndarray:
    tensor = value.const_value
    assert tensor is not None
    shape = tuple(tensor.shape.numpy())
    if tuple(array.shape) != shape:
        raise CalibrationError(
            f"Override '{name}' has shape {list(array.shape)}, the initializer has {list(shape)}. Give the weight in "
            "the initializer's own layout (transposed back where the site holds a transposed one)."
        )
    dtype: np.dtype[Any] = np.dtype(tensor.dtype.numpy())
    return np.ascontiguousarray(array) if array.dtype == dtype else array.astype(dtype)
