"""The command line: `onnxq`. One module per command: it reads options, calls the package and prints."""

from __future__ import annotations

from typing import Annotated

import typer

from onnxq.cli import bench, compare, doctor, evaluate, export, inspect, quantize, recipes
from onnxq.cli.app import Commands, print_version

app = typer.Typer(
    name="onnxq",
    cls=Commands,
    help="Low-bit ONNX transformers: export, quantise, look inside, compare, evaluate, time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _module in (
    ("export", export),
    ("quantize", quantize),
    ("inspect", inspect),
    ("compare", compare),
    ("eval", evaluate),
    ("bench", bench),
    ("doctor", doctor),
    ("recipes", recipes),
):
    app.command(_name)(_module.command)


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print versions and exit."),
    ] = False,
) -> None:
    """Low-bit ONNX transformers: export, quantise, look inside, compare, evaluate, time."""
