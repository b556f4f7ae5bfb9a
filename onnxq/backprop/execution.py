"""Runs plans: node after node, subgraphs and functions by recursion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from onnxq.backprop.call import Call
from onnxq.backprop.convert import from_numpy, torch_type, widened
from onnxq.backprop.definitions import DEFINED, Definitions, defaults
from onnxq.backprop.plan import Operand, Plan, Step, Wanted, plan_graph
from onnxq.backprop.registry import OPS, is_known, op_name, too_old
from onnxq.errors import ModelError
from onnxq.graph.tensors import read_array

_NOTHING = Wanted(frozenset(), frozenset(), frozenset(), frozenset())


@dataclass(frozen=True)
class _Scope:
    """What the nodes of a graph, or of one call of a function, see.

    Attributes:
        opset: version of the standard operators.
        attributes: of the function's caller, for attributes that refer to them.
        computed: tensors so far; subgraphs share it with the graph around them. None: an optional input left out.
        given: tensors that stand for others.
        operands: likewise, for one reader.
        watched: tensors to keep, with their names.
        tracked: tensors that must require a gradient.
        found: what was kept.
    """

    opset: int
    attributes: Mapping[str, ir.Attr]
    computed: dict[ir.Value, Tensor | None]
    given: Mapping[ir.Value, Tensor]
    operands: Mapping[Operand, Tensor]
    watched: Mapping[ir.Value, str]
    tracked: frozenset[ir.Value]
    found: dict[str, Tensor]


class Execution:
    """Runs plans of one model.

    Args:
        model: for its functions and operator sets.
        constant: gives the data of an initializer.
    """

    def __init__(self, model: ir.Model, constant: Callable[[ir.Value], Tensor]) -> None:
        self._model = model
        self._constant = constant
        self._definitions = Definitions()
        self._plans: dict[ir.Function, Plan] = {}
        self._attributes: dict[ir.Node, Mapping[str, Any]] = {}

    def run(
        self,
        plan: Plan,
        fed: Mapping[ir.Value, Tensor],
        *,
        given: Mapping[ir.Value, Tensor],
        operands: Mapping[Operand, Tensor],
        watched: Mapping[ir.Value, str],
        tracked: set[ir.Value],
    ) -> dict[str, Tensor]:
        """The main graph's outputs and the watched tensors by name; see `onnxq.backprop.graph.TorchGraph.run`."""
        found: dict[str, Tensor] = {}
        opset = self._model.graph.opset_imports.get("", 0)
        given = {value: _leaf(tensor) if value in tracked else tensor for value, tensor in given.items()}
        scope = _Scope(opset, {}, dict(fed), given, operands, watched, frozenset(tracked), found)
        for value, name in watched.items():
            if value in given:
                found[name] = given[value]
            elif value.is_graph_input() or value.is_initializer():
                self._assign(value, self._read(value, scope), scope)
        outputs = self._run_plan(plan, scope)
        for output, tensor in zip(plan.outputs, outputs, strict=True):
            if output is not None and tensor is not None:
                found[str(output.name)] = tensor
        return found

    def _run_plan(self, plan: Plan, scope: _Scope) -> list[Tensor | None]:
        for step in plan.steps:
            node = step.node
            inputs = [self._operand(node, index, value, scope) for index, value in enumerate(node.inputs)]
            outputs = self._run_step(step, inputs, scope)
            del inputs
            for value, tensor in zip(node.outputs, outputs, strict=False):
                self._assign(value, tensor, scope)
            del outputs
            for value in step.free:
                scope.computed.pop(value, None)
        return [None if value is None else self._read(value, scope) for value in plan.outputs]

    def _assign(self, value: ir.Value, tensor: Tensor | None, scope: _Scope) -> None:
        if tensor is not None and value in scope.watched and value not in scope.given:
            tensor = _leaf(tensor) if value in scope.tracked else tensor
            scope.found[scope.watched[value]] = tensor
        scope.computed[value] = tensor

    def _operand(self, node: ir.Node, index: int, value: ir.Value | None, scope: _Scope) -> Tensor | None:
        if (node, index) in scope.operands:
            return scope.operands[node, index]
        return None if value is None else self._read(value, scope)

    def _read(self, value: ir.Value, scope: _Scope) -> Tensor | None:
        if value in scope.given:
            return scope.given[value]
        if value in scope.computed:
            return scope.computed[value]
        if value.is_initializer():
            return self._constant(value)
        if value.is_graph_input():
            raise ModelError(f"The model's input '{value.name}' is needed and was not fed.")
        raise ModelError(f"The tensor '{value.name}' is read before it is computed: the graph is out of order.")

    def _run_step(self, step: Step, inputs: list[Tensor | None], scope: _Scope) -> Sequence[Tensor | None]:
        node = step.node
        function = self._model.functions.get(node.op_identifier())
        if function is not None:
            return self._run_function(function, node, inputs, scope)
        if not is_known(self._model, node):
            raise ModelError(
                f"{_where(node)} can't be run with gradients: the operator {op_name(node)} is not known here. "
                "onnxq.backprop.missing_ops lists all such operators of a model."
            )
        if too_old(scope.opset):
            raise ModelError(f"{_where(node)} is of operator set {scope.opset}; gradients need 13 or later.")
        if node.op_type == "If":
            return self._run_if(step, inputs, scope)
        if node.op_type == "Loop":
            return self._run_loop(step, inputs, scope)
        if node.op_type in DEFINED:
            body = self._definitions.body(node, scope.opset, inputs)
            return self._run_function(body, node, inputs, scope, defaults(node, scope.opset))
        call = Call(node.op_type, scope.opset, len(node.outputs), self._attributes_of(node, scope))
        try:
            result = OPS[node.op_type](call, *inputs)
        except (ModelError, RuntimeError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"{_where(node)} failed on inputs ({_describe(inputs)}): {error}") from error
        return (result,) if isinstance(result, Tensor) else result

    def _attributes_of(self, node: ir.Node, scope: _Scope) -> Mapping[str, Any]:
        if node in self._attributes:
            return self._attributes[node]
        resolved = _resolve(node, scope)
        plain = {name: _plain(attribute) for name, attribute in resolved.items() if not _is_graph(attribute)}
        if not any(attribute.is_ref() for attribute in node.attributes.values()):
            self._attributes[node] = plain
        return plain

    def _run_function(
        self,
        function: ir.Function,
        node: ir.Node,
        inputs: list[Tensor | None],
        scope: _Scope,
        standard: Mapping[str, ir.Attr] | None = None,
    ) -> list[Tensor | None]:
        if function not in self._plans:
            self._plans[function] = plan_graph(function, range(len(function.outputs)), _NOTHING)
        written = {name: a for name, a in function.attributes.items() if a.value is not None}
        attributes = {**(standard or {}), **written, **_resolve(node, scope)}
        padded = [*inputs, *[None] * (len(function.inputs) - len(inputs))]
        inner = replace(
            scope,
            opset=function.opset_imports.get("", scope.opset),
            attributes=attributes,
            computed=dict(zip(function.inputs, padded, strict=True)),
            given={},
            watched={},
        )
        return self._run_plan(self._plans[function], inner)

    def _run_if(self, step: Step, inputs: list[Tensor | None], scope: _Scope) -> list[Tensor | None]:
        condition = inputs[0]
        if condition is None or condition.numel() != 1:
            raise ModelError(f"{_where(step.node)} needs one truth value, not ({_describe(inputs)}).")
        return self._run_plan(step.bodies["then_branch" if bool(condition) else "else_branch"], scope)

    def _run_loop(self, step: Step, inputs: list[Tensor | None], scope: _Scope) -> list[Tensor | None]:
        body = step.bodies["body"]
        limit = None if inputs[0] is None else int(inputs[0])
        going = inputs[1] if len(inputs) > 1 and inputs[1] is not None else torch.tensor(True)
        state = list(inputs[2:])
        collected: list[list[Tensor]] = [[] for _ in range(len(body.outputs) - 1 - len(state))]
        trip = 0
        while (limit is None or trip < limit) and bool(going):
            scope.computed.update(zip(body.graph.inputs, [torch.tensor(trip), going, *state], strict=True))
            again, *rest = self._run_plan(body, scope)
            going = torch.tensor(True) if again is None else again
            state = rest[: len(state)]
            for kept, part in zip(collected, rest[len(state) :], strict=True):
                assert part is not None, "a plan of a Loop computes every output"
                kept.append(part)
            trip += 1
        scans = [_stacked(parts, value) for parts, value in zip(collected, body.outputs[1 + len(state) :], strict=True)]
        return [*state, *scans]


def _leaf(tensor: Tensor) -> Tensor:
    """The tensor, as the start of a gradient where it is not part of one and can be."""
    if tensor.requires_grad or not tensor.is_floating_point():
        return tensor
    return tensor.detach().requires_grad_()


def _stacked(parts: list[Tensor], value: ir.Value | None) -> Tensor:
    """The scan output of a Loop; without a single trip its other axes are as declared, 0 where not."""
    if parts:
        return torch.stack(parts)
    shape = () if value is None or value.shape is None else tuple(d if isinstance(d, int) else 0 for d in value.shape)
    dtype = torch.float32 if value is None or value.dtype is None else torch_type(value.dtype)
    return torch.zeros((0, *shape), dtype=dtype)


def _resolve(node: ir.Node, scope: _Scope) -> dict[str, ir.Attr]:
    """A node's attributes; one that refers to the caller's is absent where the caller has none."""
    resolved = {}
    for name, attribute in node.attributes.items():
        if not attribute.is_ref():
            resolved[name] = attribute
        elif attribute.ref_attr_name in scope.attributes:
            resolved[name] = scope.attributes[str(attribute.ref_attr_name)]
    return resolved


def _is_graph(attribute: ir.Attr) -> bool:
    return attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _plain(attribute: ir.Attr) -> Any:
    """An attribute as a number, a string, a tuple of them, or a tensor."""
    if attribute.type == ir.AttributeType.TENSOR:
        return widened(from_numpy(read_array(attribute.as_tensor())))
    return attribute.value


def _where(node: ir.Node) -> str:
    return f"{op_name(node)} '{node.name}'" if node.name else f"{op_name(node)} (writes '{node.outputs[0].name}')"


def _describe(inputs: Sequence[Tensor | None]) -> str:
    return ", ".join("none" if t is None else f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in inputs)
