"""`onnxq eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from onnxq.cli.options import Json, NoLibrary, Threads, Tokenizer
from onnxq.cli.output import emit, error_console
from onnxq.errors import CalibrationError, ModelError

if TYPE_CHECKING:
    from onnxq.evaluation.tasks import TaskReport


def command(
    model: Annotated[Path, typer.Argument(help="The model to measure.")],
    task: Annotated[Literal["perplexity", "accuracy", "similarity"], typer.Option(help="What the model is for.")],
    data: Annotated[
        Path,
        typer.Option(
            help="perplexity: a text file, with --tokenizer. accuracy: an .npz of named inputs and 'labels'. "
            "similarity: a text file with --tokenizer, or an .npz of named inputs.",
            metavar="DATA",
        ),
    ],
    tokenizer: Tokenizer = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Measure this model beside it, such as the float one.", metavar="MODEL"),
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="perplexity: tokens of a window.")] = 512,
    windows: Annotated[int, typer.Option(min=1, help="perplexity: at most this many, drawn at random.")] = 16,
    samples: Annotated[
        int | None, typer.Option(min=1, help="accuracy, similarity: at most this many, drawn at random.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Samples in one run. Default: 1 window, 8 sentences, 64 others.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn at random.")] = 0,
    threads: Threads = None,
    no_library: NoLibrary = False,
    json: Json = False,
) -> None:
    """Measure how well a model does its task.

    perplexity: of a causal language model on windows of text. accuracy: top-1 of a classifier. similarity: of sentence
    embeddings to a reference's.
    """
    from onnxq.cli.progress import RichProgress
    from onnxq.evaluation import tasks
    from onnxq.evaluation.sessions import library_available
    from onnxq.graph.load import find_model_file
    from onnxq.report.task_tables import task_report
    from onnxq.runtime.session import session

    _refuse_incomplete(task, tokenizer, reference)
    path = find_model_file(model)
    other = None if reference is None else find_model_file(reference)
    library = not no_library and library_available()
    with RichProgress(error_console()) as progress:
        progress.start("loading", None)
        measured = session(path, library=library, threads=threads)
        beside = None if other is None else session(other, library=library, threads=threads)
        found: TaskReport
        if task == "perplexity":
            assert tokenizer is not None
            found = tasks.evaluate_perplexity(
                measured, data, tokenizer, reference=beside, context=context, windows=windows, batch=batch or 1,
                seed=seed, progress=progress,
            )  # fmt: skip
        elif task == "accuracy":
            found = tasks.evaluate_accuracy(
                measured, data, reference=beside, batch=batch or 64, samples=samples, seed=seed, progress=progress
            )
        else:
            assert beside is not None
            found = tasks.evaluate_similarity(
                measured, data, reference=beside, tokenizer=tokenizer, batch=batch or 8, samples=samples, seed=seed,
                progress=progress,
            )  # fmt: skip
    plain = {"task": task, "model": path, "reference": other, "data": data, "library": library, "found": found}
    emit(json, plain, lambda: task_report(found, path, other))


def _refuse_incomplete(task: str, tokenizer: Path | None, reference: Path | None) -> None:
    """Say what a task lacks before anything is loaded.

    Raises:
        CalibrationError: Perplexity without a tokenizer.
        ModelError: Similarity without a reference.
    """
    if task == "perplexity" and tokenizer is None:
        raise CalibrationError(
            "The task perplexity reads text: name the folder that holds tokenizer.json (--tokenizer DIR)."
        )
    if task == "similarity" and reference is None:
        raise ModelError(
            "The task similarity compares embeddings with another model's: name that model (--reference MODEL)."
        )
