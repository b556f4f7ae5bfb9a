"""`onnxq inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from onnxq.cli.options import Json, Verbose
from onnxq.cli.output import emit, error_console


def command(
    model: Annotated[Path, typer.Argument(help="Any .onnx file, quantised or not, or a folder with one.")],
    reference: Annotated[
        Path | None,
        typer.Option(help="The float model it was made of: measures the error of every weight.", metavar="MODEL"),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page.", metavar="FILE")] = None,
    node_data: Annotated[
        Path | None, typer.Option(help="Write per-node numbers for Model Explorer.", metavar="FILE")
    ] = None,
    node_metric: Annotated[Literal["bits", "bytes", "error"], typer.Option(help="What --node-data holds.")] = "bits",
    sites: Annotated[
        bool, typer.Option("--sites", help="Every weight with each of its uses, and what is no weight.")
    ] = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Show which weight holds the bytes, at how many bits, with what error."""
    from onnxq.graph import find_weights
    from onnxq.report import tables
    from onnxq.report.html import write_html
    from onnxq.report.inspect import inspect_model
    from onnxq.report.node_data import write_node_data
    from onnxq.runtime.optimized import read_graph

    found = inspect_model(model, reference=reference)
    for path, write in ((html, write_html), (node_data, lambda f, p: write_node_data(f, p, node_metric))):
        if path is not None:
            write(found, path)
            error_console().print(f"wrote {path}", style="dim", markup=False)
    if sites:
        uses = find_weights(read_graph(model))
        emit(json, uses.to_dict(), lambda: tables.sites(uses))
    else:
        emit(json, found.to_dict(), lambda: tables.inspection(found, verbose=verbose))
