"""`onnxq export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxq.cli.options import Force, Json
from onnxq.cli.output import emit, error_console


def command(
    source: Annotated[
        Path, typer.Argument(help="Folder of a Hugging Face model: config.json, safetensors, tokenizer.")
    ],
    out_dir: Annotated[Path, typer.Argument(help="New folder for the graphs, tokenizer and configs.")],
    task: Annotated[
        str | None,
        typer.Option(help="What the graphs shall compute, such as feature-extraction. Default: the model's own task."),
    ] = None,
    opset: Annotated[int, typer.Option(help="Version of the standard operator set.")] = 21,
    force: Force = False,
    json: Json = False,
) -> None:
    """Export a Hugging Face model to ONNX and check it against torch."""
    from onnxq.export import export
    from onnxq.report.export_tables import export_result

    console = error_console()

    def tell(line: str) -> None:
        console.print(line, style="dim", markup=False)

    result = export(source, out_dir, task=task, opset=opset, force=force, progress=tell)
    emit(json, result, lambda: export_result(result))
