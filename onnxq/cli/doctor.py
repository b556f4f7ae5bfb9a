"""`onnxq doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxq.cli.app import FAILED
from onnxq.cli.options import Json, NoLibrary, Threads, Verbose
from onnxq.cli.output import as_data, emit, error_console


def command(
    model: Annotated[
        Path | None, typer.Argument(help="An .onnx file. Without one: the library and this machine.")
    ] = None,
    threads: Threads = None,
    no_library: NoLibrary = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Say whether kernels load here, and which nodes of a model are fast, slow or folded to more memory.

    A model with nodes of ours is opened twice, with the library and without. The exit code is 0 unless
    something is broken: no session, or a kernel library that does not work.
    """
    from rich.console import RenderableType

    from onnxq.report import doctor_tables
    from onnxq.runtime.doctor import Diagnosis, diagnose, has_own_nodes
    from onnxq.runtime.environment import check_environment

    with error_console().status("testing"):
        environment = check_environment()
        found: list[Diagnosis] = []
        if model is not None:
            with_library = environment.works and not no_library
            if with_library:
                found.append(diagnose(model, library=True, threads=threads))
            if not with_library or has_own_nodes(model):
                found.append(diagnose(model, library=False, threads=threads))

    def shown() -> list[RenderableType]:
        parts = doctor_tables.environment(environment) if model is None else []
        if model is not None and environment.problem and not no_library:
            parts.append(doctor_tables.problem(environment))
        for diagnosis in found:
            parts += (
                ["", *doctor_tables.diagnosis(diagnosis, verbose=verbose)]
                if parts
                else doctor_tables.diagnosis(diagnosis, verbose=verbose)
            )
        return parts

    emit(
        json,
        {"environment": environment, "models": [{**as_data(one), "counts": one.counts} for one in found]},
        shown,
    )
    if (environment.library is not None and not environment.works) or any(diagnosis.broken for diagnosis in found):
        raise typer.Exit(FAILED)
