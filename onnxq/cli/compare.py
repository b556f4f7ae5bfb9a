"""`onnxq compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxq.cli.options import DATA_HELP, Json, NoLibrary, Threads, Tokenizer, Verbose, open_for
from onnxq.cli.output import emit, error_console


def command(
    reference: Annotated[Path, typer.Argument(help="The model to measure against, such as the float one.")],
    model: Annotated[Path, typer.Argument(help="The model to measure.")],
    data: Annotated[Path, typer.Option(help=DATA_HELP, metavar="DATA")],
    tokenizer: Tokenizer = None,
    samples: Annotated[int | None, typer.Option(min=1, help="At most this many, drawn at random.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Samples in one run.")] = 8,
    layers: Annotated[bool, typer.Option("--layers", help="Signal-to-noise of the tensors between, too.")] = False,
    threads: Threads = None,
    no_library: NoLibrary = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Measure how far a model's outputs are from another's on your data."""
    from onnxq.evaluation import LayerError, compare_layers, compare_outputs
    from onnxq.evaluation.sessions import library_available
    from onnxq.graph.load import find_model_file
    from onnxq.report.measure_tables import comparison
    from onnxq.runtime.session import session

    with error_console().status("comparing"):
        left, right = find_model_file(reference), find_model_file(model)
        feeds = open_for(left, data, tokenizer, batch=batch, samples=samples)
        library = not no_library and library_available()
        pair = [session(path, library=library, threads=threads) for path in (left, right)]
        found = compare_outputs(pair[0], pair[1], feeds)
        inner: tuple[LayerError, ...] = compare_layers(left, right, feeds) if layers else ()
    plain = {"reference": left, "model": right, "library": library, "comparison": found, "layers": inner}
    emit(json, plain, lambda: comparison(found, inner, verbose=verbose))
