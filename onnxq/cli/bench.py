"""`onnxq bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxq.cli.options import DATA_HELP, Json, NoLibrary, Threads, Tokenizer, open_for
from onnxq.cli.output import emit, error_console


def command(
    model: Annotated[Path, typer.Argument(help="The model to time.")],
    vs: Annotated[
        list[Path] | None,
        typer.Option("--vs", help="A model to time beside it; may be repeated.", metavar="MODEL"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples in one run.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Size of free dimensions, such as tokens.")] = 128,
    past: Annotated[int, typer.Option(min=0, help="Size of free dimensions of the past, for decoders.")] = 0,
    data: Annotated[
        Path | None, typer.Option(help=f"Take the first batch of this instead. {DATA_HELP}", metavar="DATA")
    ] = None,
    tokenizer: Tokenizer = None,
    threads: Threads = None,
    repeats: Annotated[int, typer.Option(min=3, help="Measured rounds; each runs every model once.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
    load: Annotated[
        bool, typer.Option("--load/--no-load", help="Time loading and measure memory, in fresh processes.")
    ] = True,
    no_library: NoLibrary = False,
    json: Json = False,
) -> None:
    """Time models side by side: latency in turns, load time, memory.

    Ratios are times over those of the first --vs.
    """
    from onnxq.evaluation import measure_latency, measure_load
    from onnxq.evaluation.sessions import library_available
    from onnxq.graph.load import find_model_file
    from onnxq.report.measure_tables import latency
    from onnxq.runtime.feeds import random_feed
    from onnxq.runtime.session import session

    paths = [find_model_file(path) for path in [*(vs or []), model]]
    names = _names(paths)
    library = not no_library and library_available()
    with error_console().status("timing") as status:
        if data is None:
            feed = random_feed(paths[-1], batch=batch, length=length, past=past, seed=seed)
        else:
            feed = next(iter(open_for(paths[-1], data, tokenizer, batch=batch, samples=None)))
        sessions = {
            name: session(path, library=library, threads=threads) for name, path in zip(names, paths, strict=True)
        }
        times = measure_latency(sessions, feed, rounds=repeats, threads=threads)
        loads = {}
        if load:
            for name, path in zip(names, paths, strict=True):
                status.update(f"loading {name}")
                loads[name] = measure_load(path, feed, threads=threads, library=library)
    emit(
        json,
        {"latency": times, "load": loads, "library": library},
        lambda: latency(times, loads, library=library),
    )


def _names(paths: list[Path]) -> list[str]:
    """File names where they differ, else as much of the path as tells them apart, else numbered."""
    for depth in (1, 2, 3):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({index})" for index, path in enumerate(paths, 1)]
