"""Reads back what ONNX Runtime made of a model and says which nodes are fast, slow or folded, and the cure.

The rules are in `onnxq.runtime.rules`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import onnx_ir as ir

from onnxq import ops
from onnxq.errors import ModelError
from onnxq.graph.load import find_model_file
from onnxq.passes.rewrite import WEIGHT_PROPERTY
from onnxq.runtime import cures
from onnxq.runtime.optimized import initializer, nodes_of, optimized_graph, read_graph
from onnxq.runtime.provenance import Source, elements, stored_bytes
from onnxq.runtime.rules import Subject, Verdict, judge

_LARGE = 1024
"""Smaller constants (biases, scales, shapes) are not worth a line, in elements."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One node of the optimised graph that reads a stored weight.

    Attributes:
        node: the name of the node of the model that it comes from.
        op: its type in the optimised graph.
        weight: the weight it reads, as the model names it.
        verdict: see `Verdict`.
        what: what happens there.
        cure: the way out; empty where nothing is wrong.
        file_bytes: what the weight takes in the file.
        memory_bytes: what the optimised graph holds of it, without copies that kernels make for themselves.
    """

    node: str
    op: str
    weight: str
    verdict: Verdict
    what: str
    cure: str
    file_bytes: int
    memory_bytes: int


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """A model as one session runs it.

    Attributes:
        path: the model.
        library: whether the kernel library was registered.
        findings: one per node that reads a weight.
        file_bytes: all stored tensors of the file.
        memory_bytes: all stored tensors of the optimised graph.
        broken: why no session could be made, with the way out; empty when one could.
    """

    path: str
    library: bool
    findings: tuple[Finding, ...]
    file_bytes: int
    memory_bytes: int
    broken: str

    @property
    def counts(self) -> dict[str, int]:
        """Number of findings by verdict."""
        counted = Counter(finding.verdict.value for finding in self.findings)
        return {verdict.value: counted[verdict.value] for verdict in Verdict}


def diagnose(path: str | Path, *, library: bool, threads: int | None = None) -> Diagnosis:
    """Opens a session on a model and reads back the graph that it runs.

    Args:
        path: the .onnx file.
        library: register the kernel library.
        threads: of the session.

    Raises:
        ModelError: the file can't be read. (That ONNX Runtime refuses it is a finding, not an error.)
        LibraryError: the library was asked for and is missing.
    """
    file = find_model_file(Path(path))
    model = read_graph(file)
    file_bytes = _tensor_bytes(model)
    try:
        optimized = optimized_graph(file, library=library, threads=threads)
    except ModelError as error:
        return Diagnosis(str(file), library, (), file_bytes, 0, cures.for_refusal(str(error)))
    source = Source(model)
    findings = [finding for node in nodes_of(optimized) if (finding := _examine(node, source)) is not None]
    return Diagnosis(str(file), library, tuple(findings), file_bytes, _tensor_bytes(optimized), "")


def has_own_nodes(path: str | Path) -> bool:
    """Whether a model has nodes of the domain onnxq, which run differently without the library."""
    return any(node.domain == ops.DOMAIN for node in nodes_of(read_graph(path)))


def _tensor_bytes(model: ir.Model) -> int:
    return sum(stored_bytes(list(graph.initializers.values())) for graph in model.graphs())


def _examine(node: ir.Node, source: Source) -> Finding | None:
    """The finding of one node of the optimised graph."""
    read = [value for value in node.inputs if value is not None and initializer(value) is not None]
    weights = [value for value in read if elements(value) >= _LARGE]
    if node.op_type == "Constant" or (not weights and node.domain != ops.DOMAIN):
        return None
    origin = source.origin(node)
    subject = Subject(node, weights, stored_bytes(read), origin, source.cone(origin, weights), source)
    decision = judge(subject)
    if decision is None:
        return None
    held = weights if decision.verdict is Verdict.FLOAT else subject.cone or read
    return Finding(
        node=(origin.name if origin is not None else "") or node.name or node.op_type,
        op=node.op_type,
        weight=_weight_name(origin, held),
        verdict=decision.verdict,
        what=decision.what,
        cure=decision.cure,
        file_bytes=stored_bytes(held),
        memory_bytes=subject.memory_bytes,
    )


def _weight_name(origin: ir.Node | None, held: list[ir.Value]) -> str:
    if origin is not None and WEIGHT_PROPERTY in origin.metadata_props:
        return str(origin.metadata_props[WEIGHT_PROPERTY])
    largest = max(held, key=lambda value: stored_bytes([value]), default=None)
    return (largest.name or "") if largest is not None else ""
