"""Which tensors calibration looks at: requests per site, merged to one tap per distinct tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import onnx_ir as ir

from onnxq.calibration.ranges import BINS, SAMPLED_ROWS
from onnxq.calibration.statistics import LEVELS, Level
from onnxq.errors import CalibrationError

Kind = Literal["linear", "table"]
Side = Literal["right", "left"]


@dataclasses.dataclass(frozen=True, eq=False)
class TapRequest:
    """A wish for statistics of one site's input.

    Attributes:
        site_name: For messages and look-up of the result.
        value: The tensor that enters the site, in the caller's model.
        level: See `onnxq.calibration.statistics.Level`. A table with any level but "none" is counted.
        kind: "linear": float rows; "table": the indices of a Gather.
        side: "right": y = x W, rows along the last axis [..., M, K]; "left": y = W x, columns of [..., K, M]. It speaks
            of the tensor as stored, so a transposed Gemm input counts as the other side.
        extent: K of a linear site, or the number of rows of a table; None when not known.
    """

    site_name: str
    value: ir.Value
    level: Level = "full"
    kind: Kind = "linear"
    side: Side = "right"
    extent: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Tap:
    """One tensor to look at, for all the sites that it enters; fields as in `TapRequest`."""

    key: str
    value: ir.Value
    level: Level
    kind: Kind
    side: Side
    extent: int | None
    sites: tuple[str, ...]

    def describe(self) -> str:
        """For messages."""
        more = f" and {len(self.sites) - 1} more" if len(self.sites) > 1 else ""
        return f"'{self.key}' (input of {self.sites[0]}{more})"


class GraphIndex:
    """Where every graph and node of a model sits: built once, since the IR keeps no way up from a subgraph."""

    def __init__(self, model: ir.Model) -> None:
        self.main = model.graph
        self.owners: dict[int, tuple[ir.Node, str]] = {}
        """id(subgraph) -> (node that runs it, attribute name)."""
        self._position: dict[int, int] = {}
        self._functions = {id(f.graph): f for f in model.functions.values()}
        for function in model.functions.values():
            for node in function:
                self._enter(node)
        for number, node in enumerate(model.graph):
            self._position[id(node)] = number
            self._enter(node)

    def _enter(self, node: ir.Node) -> None:
        for name, graph in subgraphs(node):
            self.owners[id(graph)] = (node, name)
            for inner in graph:
                self._enter(inner)

    def path(self, value: ir.Value) -> tuple[tuple[ir.Node, str], ...]:
        """The (node, attribute) pairs that lead from the main graph down to the value's graph.

        Raises:
            CalibrationError: the value is in a model-local function, or not of this model.
        """
        graph = value.graph
        steps: list[tuple[ir.Node, str]] = []
        while graph is not self.main:
            function = graph if isinstance(graph, ir.Function) else self._functions.get(id(graph))
            if function is not None:
                raise CalibrationError(
                    f"Tensor '{value.name}' is inside the model-local function {function.domain}::{function.name}; one "
                    "function body serves many calls, so it can't be tapped. Inline the model's functions first."
                )
            if graph is None or id(graph) not in self.owners:
                raise CalibrationError(
                    f"Tensor '{value.name}' does not belong to the model that is calibrated. Find the sites and "
                    "calibrate on the same loaded model."
                )
            step = self.owners[id(graph)]
            steps.append(step)
            graph = step[0].graph
        return tuple(reversed(steps))

    def position(self, value: ir.Value) -> int:
        """Topological place in the main graph: of the node that makes the value, or that runs its subgraph."""
        steps = self.path(value)
        node = steps[0][0] if steps else value.producer()
        return -1 if node is None else self._position[id(node)]


def subgraphs(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """(attribute name, graph) of the graphs that a node holds."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                yield attribute.name, graph


def all_graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """The graph and every graph nested in it."""
    yield graph
    for node in graph:
        for _, inner in subgraphs(node):
            yield from all_graphs(inner)


def merge_requests(index: GraphIndex, requests: Iterable[TapRequest]) -> tuple[Tap, ...]:
    """One tap per distinct tensor (and side, or table size), in topological order; level "none" drops out.

    The key is the tensor's name; inside a subgraph it is prefixed with the way there
    (``if_node.then_branch/name``); where one tensor is looked at in two ways, the way is appended
    (``name|left``, ``name|30522``, ``name|right|ranges``).
    """
    groups: dict[tuple[int, Kind, Side, int | None, bool], list[TapRequest]] = {}
    ways: dict[int, set[tuple[Kind, Side, int | None, bool]]] = {}
    for request in requests:
        if request.level not in LEVELS:
            raise CalibrationError(f"Site {request.site_name}: level '{request.level}' is none of {LEVELS}.")
        if request.level == "none":
            continue
        # K must not split a group: it follows from the tensor. N does, since negative indices wrap by it.
        ranges = request.kind == "linear" and request.level == "ranges"
        way = (request.kind, request.side, request.extent if request.kind == "table" else None, ranges)
        groups.setdefault((id(request.value), *way), []).append(request)
        ways.setdefault(id(request.value), set()).add(way)
    taps = []
    for (identity, kind, side, rows, ranges), members in groups.items():
        value = members[0].value
        key = "/".join([*(f"{node.name}.{attribute}" for node, attribute in index.path(value)), str(value.name)])
        if len(ways[identity]) > 1:
            key += f"|{rows if kind == 'table' else side}" + "|ranges" * ranges
        level: Level = "full" if any(m.level == "full" for m in members) else "diagonal"
        level = "ranges" if ranges else level
        extents = {m.extent for m in members if m.extent is not None}
        if len(extents) > 1:
            raise CalibrationError(
                f"Sites {[m.site_name for m in members]} share the input '{value.name}' but expect different widths "
                f"{sorted(extents)}; one of the requests is wrong."
            )
        extent = next(iter(extents), None)
        taps.append(Tap(key, value, level, kind, side, extent, tuple(m.site_name for m in members)))
    if len({t.key for t in taps}) != len(taps):
        raise CalibrationError("Two tapped tensors have the same name. Make the model's node and value names unique.")
    return tuple(sorted(taps, key=lambda t: index.position(t.value)))


def statistics_bytes(requests: Sequence[TapRequest]) -> int:
    """Memory that the totals of these requests take while collecting, once per distinct tensor."""
    sizes: dict[tuple[int, Kind, Side, bool], int] = {}
    for request in requests:
        if request.level == "none" or request.extent is None:
            continue
        level = request.level if request.kind == "linear" else "diagonal"
        size = 8 * request.extent**2 if level == "full" else 24 * request.extent
        if level == "ranges":
            size = 16 * BINS + 4 * SAMPLED_ROWS * request.extent
        place = (id(request.value), request.kind, request.side, level == "ranges")
        sizes[place] = max(sizes.get(place, 0), size)
    return sum(sizes.values())
