"""What every exported graph goes through: the wanted opset, weights named and stored once, no stack traces.

1. **Opset.** The tracing exporter knows opsets up to 20; later ones are reached by conversion, never by
   changing the number alone.
2. **Names.** Constant folding turns `lm_head.weight` into `onnx::MatMul_802`, transposed. A weight with the
   values of a parameter, as they are or transposed, gets the parameter's name back.
3. **Sharing.** Weights with equal values are stored once. Where one is the transpose of another (a tied
   output layer), it becomes a Transpose of the one that is looked up in a Gather, so that a tied matrix stays
   one weight.
4. **Metadata.** Stack traces that the exporter puts into nodes are removed.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnxscript import version_converter

from onnxq.errors import ExportError

LARGEST_SINGLE_FILE = 1_800_000_000
"""Bytes of weights up to which one `.onnx` file holds them; protobuf ends at 2 GiB."""

SMALLEST_SHARED = 1024
"""Elements from which on equal 2-D weights are worth sharing."""

_ANONYMOUS = re.compile(r"^onnx::|_merged_\d+$|^val_\d+$")
_TRACES = "pkg."

Key = tuple[tuple[int, ...], str, bytes]


@dataclass(frozen=True)
class Finished:
    """What became of one graph; see `ExportedGraph`."""

    opset: int
    nodes: int
    operators: dict[str, int]
    bytes: int
    shared: tuple[str, ...]


def finish_graph(model: ir.Model, path: Path, opset: int, parameters: Mapping[str, np.ndarray]) -> Finished:
    """Bring `model` to its final form and write it.

    Args:
        model: Changed in place.
        path: The `.onnx` file to write; weights beyond `LARGEST_SINGLE_FILE` go to `<path>.data`.
        opset: The wanted version of the standard operator set.
        parameters: The torch model's parameters by name, float32.

    Raises:
        ExportError: The graph cannot be converted to `opset`.
    """
    convert_opset(model, opset)
    name_weights(model, parameters)
    shared = share_weights(model)
    drop_traces(model)
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    external = f"{path.name}.data" if size > LARGEST_SINGLE_FILE else None
    ir.save(model, path, external_data=external)
    operators = Counter(node.op_type for node in model.graph.all_nodes())
    return Finished(
        opset=opset,
        nodes=sum(operators.values()),
        operators=dict(operators.most_common()),
        bytes=path.stat().st_size + (path.with_name(external).stat().st_size if external else 0),
        shared=shared,
    )


def convert_opset(model: ir.Model, opset: int) -> None:
    """Convert `model` to `opset` where it has another one.

    Raises:
        ExportError: No conversion from here to there.
    """
    now = model.opset_imports[""]
    if now == opset:
        return
    try:
        version_converter.convert_version(model, opset)
    except Exception as error:
        raise ExportError(
            f"the graph cannot be converted from opset {now} to {opset}: {error}; export with opset {now}"
        ) from error
    reached = model.opset_imports[""]
    if reached != opset:
        raise ExportError(
            f"the graph was converted from opset {now} to {reached} only, not to {opset}: export with opset {reached}"
        )


def key_of(array: np.ndarray) -> Key:
    """Shape, type and a hash of the values: equal for equal arrays."""
    values = np.ascontiguousarray(array).view(np.uint8).data
    return array.shape, str(array.dtype), hashlib.blake2b(values, digest_size=16).digest()


def name_weights(model: ir.Model, parameters: Mapping[str, np.ndarray]) -> int:
    """Give anonymous initializers the names of the parameters whose values they hold.

    Returns how many were named.
    """
    weights = [v for v in _matrices(model) if v.name and _ANONYMOUS.search(v.name)]
    if not weights:
        return 0
    names: dict[Key, str] = {}
    for name, array in parameters.items():
        if array.ndim == 2:
            names.setdefault(key_of(array), name)
            names.setdefault(key_of(array.T), name)
    taken = {value.name for graph in model.graphs() for value in _values(graph)}
    named = 0
    for value in weights:
        assert value.const_value is not None
        found = names.get(key_of(value.const_value.numpy()))
        if found is not None and found not in taken:
            value.name = found
            taken.add(found)
            named += 1
    return named


def share_weights(model: ir.Model) -> tuple[str, ...]:
    """Store equal matrices of the main graph once; returns what was shared, as `kept <- other, other`."""
    alike: dict[Key, list[tuple[ir.Value, bool]]] = {}
    for value in _matrices(model):
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.size < SMALLEST_SHARED:
            continue
        straight, turned = key_of(array), key_of(array.T)
        if straight not in alike and turned in alike:
            alike[turned].append((value, True))
        else:
            alike.setdefault(straight, []).append((value, False))
    return tuple(_share(model.graph, group) for group in alike.values() if len(group) > 1)


def _share(graph: ir.Graph, group: list[tuple[ir.Value, bool]]) -> str:
    """Keep the first member that is looked up, else the first.

    The others become uses of it, or of one Transpose of it.
    """
    kept, kept_turned = next(((v, t) for v, t in group if _is_table(v)), group[0])
    others = [(v, t != kept_turned) for v, t in group if v is not kept]
    transposed: ir.Value | None = None
    for other, turned in others:
        if turned and transposed is None:
            node = ir.node("Transpose", [kept], {"perm": [1, 0]}, name=f"{kept.name}/Transpose")
            transposed = node.outputs[0]
            transposed.name = f"{kept.name}_transposed"
            transposed.type, transposed.shape = other.type, other.shape
            graph.insert_before(graph[0], node)
        target = transposed if turned else kept
        assert target is not None
        ir.convenience.replace_all_uses_with(other, target, replace_graph_outputs=True)
        graph.initializers.pop(str(other.name))
    return f"{kept.name} <- {', '.join(str(v.name) for v, _ in others)}"


def _is_table(value: ir.Value) -> bool:
    return any(use.node.op_type == "Gather" and use.idx == 0 for use in value.uses())


def _matrices(model: ir.Model) -> Iterable[ir.Value]:
    """2-D initializers of the main graph that are not inputs as well."""
    for value in list(model.graph.initializers.values()):
        if value.const_value is not None and len(value.const_value.shape) == 2 and not value.is_graph_input():
            yield value


def _values(graph: ir.Graph | ir.Function) -> Iterable[ir.Value]:
    yield from graph.inputs
    if isinstance(graph, ir.Graph):
        yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def drop_traces(model: ir.Model) -> None:
    """Remove the exporter's metadata (module paths, stack traces) and doc strings from nodes and values."""
    for graph in model.graphs():
        for thing in (*graph, *_values(graph)):
            for key in [k for k in thing.metadata_props if k.startswith(_TRACES)]:
                del thing.metadata_props[key]
            thing.doc_string = None
