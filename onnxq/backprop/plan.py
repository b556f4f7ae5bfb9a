"""What to run of a graph for the tensors that are wanted, and when to let go of each tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxq.backprop.registry import subgraphs

Operand = tuple[ir.Node, int]
"""One input of one node."""


@dataclass(frozen=True)
class Wanted:
    """What one kind of run asks for; equal requests share a plan.

    Attributes:
        outputs: names of the main graph's outputs to compute.
        watched: tensors to keep, in any graph.
        given: tensors that the caller puts in place; nothing is run for them alone.
        operands: inputs of single nodes that the caller puts in place.
    """

    outputs: frozenset[str]
    watched: frozenset[ir.Value]
    given: frozenset[ir.Value]
    operands: frozenset[Operand]


@dataclass(frozen=True, eq=False)
class Step:
    """One node.

    Attributes:
        node: what to run.
        free: tensors that nothing reads after it.
        bodies: the plans of its subgraphs, by attribute name.
    """

    node: ir.Node
    free: tuple[ir.Value, ...]
    bodies: Mapping[str, Plan] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Plan:
    """A graph's steps in order.

    Attributes:
        graph: what is run.
        outputs: the outputs to hand over, in the graph's order; None for one that nobody reads.
        steps: the nodes that these and the watched tensors need.
    """

    graph: ir.Graph | ir.Function
    outputs: tuple[ir.Value | None, ...]
    steps: tuple[Step, ...]


def plan_graph(graph: ir.Graph | ir.Function, used: Collection[int], wanted: Wanted) -> Plan:
    """The plan of a graph.

    1. A node runs when something needs one of its outputs that is not given, or watches a tensor in its subgraphs.
    2. A branch of an If computes those of its outputs that are needed. A Loop's body computes all of them.
    3. A tensor goes after its last reader, in the graph that made it; subgraphs read at the node that holds them.
       Outputs and watched tensors stay.

    Args:
        used: which of the graph's outputs are needed, by position.
    """
    outputs = tuple(value if index in used else None for index, value in enumerate(graph.outputs))
    needed = {value for value in outputs if value is not None} | wanted.watched
    kept = set(needed)
    own = {*graph.inputs, *(value for node in graph for value in node.outputs)}
    steps: list[Step] = []
    for node in reversed(list(graph)):
        read = [i for i, value in enumerate(node.outputs) if value in needed and value not in wanted.given]
        if not read and not any(value in wanted.watched for value in _inside(node)):  # rule 1
            continue
        bodies = {}
        for name, body in subgraphs(node):
            if_branch = node.domain == "" and node.op_type == "If"
            bodies[name] = plan_graph(body, read if if_branch else range(len(body.outputs)), wanted)  # rule 2
        sources = {v for i, v in enumerate(node.inputs) if v is not None and (node, i) not in wanted.operands}
        for body_plan in bodies.values():
            sources |= _captured(body_plan, wanted)
        last_read = sources - needed  # walking backwards: no later node reads them
        unread = {value for value in node.outputs if value not in needed}
        free = ((last_read | unread) & own) - kept  # rule 3
        steps.append(Step(node, tuple(free), bodies))
        needed |= sources
    return Plan(graph, outputs, tuple(reversed(steps)))


def _inside(node: ir.Node) -> Iterator[ir.Value]:
    """Every tensor that the subgraphs of a node compute."""
    for _, body in subgraphs(node):
        for inner in body:
            yield from inner.outputs
            yield from _inside(inner)


def _captured(plan: Plan, wanted: Wanted) -> set[ir.Value]:
    """What a subgraph reads of the graphs around it."""
    read: set[ir.Value] = {value for value in plan.outputs if value is not None}
    own: set[ir.Value] = set(plan.graph.inputs)
    for step in plan.steps:
        read |= {v for i, v in enumerate(step.node.inputs) if v is not None and (step.node, i) not in wanted.operands}
        own |= set(step.node.outputs)
        for body in step.bodies.values():
            read |= _captured(body, wanted)
    return read - own
