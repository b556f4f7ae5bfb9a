"""What all commands have in common: version, errors in one message, interrupts, exit codes."""

from __future__ import annotations

from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from onnxq.cli.output import error_console
from onnxq.errors import OnnxqError

FAILED = 1
INTERRUPTED = 130

_INTERRUPTED = {
    "quantize": "Interrupted. Solved weights are kept: run the same command again to go on.",
}


class Commands(TyperGroup):
    """The group of all commands, with one place where errors end."""

    def invoke(self, ctx: Any) -> Any:
        """Runs a command: what users can mend is one message and exit code 1, Ctrl-C exit code 130."""
        console = error_console()
        try:
            return super().invoke(ctx)
        except OnnxqError as error:
            console.print(f"[bold red]error:[/] [red]{escape(str(error))}[/]", soft_wrap=True)
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as interrupt:
            said = _INTERRUPTED.get(ctx.invoked_subcommand or "", "Interrupted. Nothing was left behind.")
            console.print(f"\n[yellow]{said}[/]", soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from interrupt


def print_version(wanted: bool) -> None:
    """``--version``: this package, ONNX Runtime, and the kernel library."""
    if not wanted:
        return
    import onnxruntime

    from onnxq.runtime.library import describe_library
    from onnxq.version import __version__

    try:
        library = describe_library()
        kernels = f"kernel library {library.get('version')} ({library.get('isa')})"
    except OnnxqError:
        kernels = "no kernel library"
    typer.echo(f"onnxq {__version__}, {kernels}, ONNX Runtime {onnxruntime.__version__}")
    raise typer.Exit
