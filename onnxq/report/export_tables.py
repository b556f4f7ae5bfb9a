"""What an export wrote, for the terminal."""

from __future__ import annotations

import math

from rich.console import RenderableType
from rich.markup import escape
from rich.text import Text

from onnxq.export.result import ExportResult
from onnxq.report.tables import table
from onnxq.report.units import count, duration, size


def export_result(result: ExportResult) -> list[RenderableType]:
    """The graphs with their sizes and their distance to torch."""
    head = Text.assemble(
        ("wrote ", "dim"), (str(result.folder), "bold"), f"  task {result.task}, {duration(result.seconds)}"
    )
    made = table("graph", ">size", ">nodes", ">opset", ">largest difference", "most frequent", wide=("most frequent",))
    shown: list[RenderableType] = [head, made]
    for graph in result.graphs:
        difference = "-" if math.isnan(graph.max_abs) else f"{graph.max_abs:.1e}"
        frequent = ", ".join(f"{name} {number}" for name, number in list(graph.operators.items())[:5])
        made.add_row(
            escape(graph.path.name),
            size(graph.bytes),
            str(graph.nodes),
            str(graph.opset),
            difference,
            frequent,
        )
        if graph.unverified:
            shown.append(
                Text.assemble(("not compared with torch: ", "yellow"), f"{graph.path.name}: {graph.unverified}")
            )
        shown += [Text(f"stored once: {shared}", style="dim") for shared in graph.shared]
    if result.carried:
        shown.append(
            Text(f"{count(len(result.carried), 'file')} carried over: {', '.join(result.carried)}", style="dim")
        )
    return shown
