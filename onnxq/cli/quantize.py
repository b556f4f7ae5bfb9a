"""`onnxq quantize`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from onnxq.cli.options import (
    DATA_HELP,
    Force,
    Json,
    Threads,
    Tokenizer,
    Verbose,
    adjusted_recipe,
    parse_group_size,
)
from onnxq.cli.output import emit, error_console
from onnxq.errors import BudgetError

if TYPE_CHECKING:
    from onnxq.report.records import QuantizeReport


def command(
    model: Annotated[Path, typer.Argument(help="An .onnx file, or the folder of an exported model.")],
    out: Annotated[
        Path,
        typer.Argument(help="The .onnx file to write (weights go to OUT.data beside it), or the folder."),
    ],
    recipe: Annotated[
        str, typer.Option(help="A preset (`onnxq recipes` lists them) or a YAML file.", metavar="NAME|FILE")
    ] = "uniform",
    calibration: Annotated[Path | None, typer.Option(help=DATA_HELP, metavar="DATA")] = None,
    tokenizer: Tokenizer = None,
    token_counts: Annotated[
        Path | None,
        typer.Option(
            help="How often each token occurs, for bits per word: a text to count in (with --tokenizer), or a .npy.",
            metavar="TEXT|NPY",
        ),
    ] = None,
    encodings: Annotated[
        Path | None,
        typer.Option(help="Encodings that weights were trained to (onnxq.train), taken as they are.", metavar="DIR"),
    ] = None,
    size: Annotated[str | None, typer.Option(help="Ceiling of the written files, such as 20MB.")] = None,
    bits: Annotated[
        float | None, typer.Option(help="Ceiling of the mean bits of products' weights, side data counted.")
    ] = None,
    table_bits: Annotated[
        float | None, typer.Option(help="Ceiling of the mean bits of tables, side data counted.")
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            help="Ceiling of the expected error of the outputs, instead of a size: relative, or nats for logits."
        ),
    ] = None,
    width: Annotated[int | None, typer.Option(help="Bits of every code, 1 to 8, instead of a budget.")] = None,
    group_size: Annotated[
        str | None, typer.Option(help="Weights that share a scale: a multiple of 32, or 'column'.")
    ] = None,
    redundancy: Annotated[
        float | None,
        typer.Option(
            help="Round in a frame with so many coefficients per input: 1 is a rotation, 1.125 a little more."
        ),
    ] = None,
    target: Annotated[
        Literal["kernel", "stock"] | None,
        typer.Option(help="kernel: our ops with function bodies. stock: what stock ONNX Runtime runs fast."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything that is drawn at random.")] = None,
    threads: Threads = None,
    force: Force = False,
    plan: Annotated[bool, typer.Option("--plan", help="Show formats and sizes; solve and write nothing.")] = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Rewrite a model's weights to a few bits."""
    if width is not None and (size is not None or bits is not None or max_error is not None):
        raise BudgetError("--width fixes the bits that --size, --bits and --max-error would choose: give one of them.")
    chosen = adjusted_recipe(
        recipe,
        width=width,
        group_size=parse_group_size(group_size),
        redundancy=redundancy,
        target=target,
        seed=seed,
    )

    from onnxq.allocation.budget import parse_size
    from onnxq.cli.progress import RichProgress
    from onnxq.pipeline.curve_cache import default_folder
    from onnxq.report.records import FolderReport
    from onnxq.report.tables import Asked, folder_report, quantize_report

    asked = Asked(None if size is None else parse_size(size), bits, table_bits, max_error)
    with RichProgress(error_console()) as progress:
        options = {
            **dataclasses.asdict(asked),
            "recipe": chosen,
            "calibration": calibration,
            "tokenizer": tokenizer,
            "token_counts": token_counts,
            "encodings": encodings,
            "threads": threads,
            "force": force,
            "curves": default_folder(),
            "progress": progress,
        }
        reports = _run(model, out, plan, options)
    folder = reports if isinstance(reports, FolderReport) and len(reports) > 1 else None
    plain = {key: report.to_dict() for key, report in reports.items()}
    told: dict[str, Any] = {"asked": asked, "planned": plan}
    if folder is None:
        (only,) = plain.values()
        emit(
            json,
            {**only, **told},
            lambda: quantize_report(next(iter(reports.values())), verbose=verbose, planned=plan, asked=asked),
        )
        return
    emit(
        json,
        {"graphs": plain, "budget": folder.budget, "notes": folder.notes, **told},
        lambda: [
            *(
                part
                for report in folder.values()
                for part in (*quantize_report(report, verbose=verbose, planned=plan), "")
            ),
            *folder_report(folder),
        ],
    )


def _run(model: Path, out: Path, plan: bool, options: dict[str, Any]) -> Mapping[str, QuantizeReport]:
    """The reports by graph: of one file, or of every graph of a folder that becomes a folder."""
    from onnxq.pipeline import quantize, quantize_folder

    if not model.is_dir() or out.suffix == ".onnx":
        return {out.name: quantize(model, out, plan_only=plan, **options)}
    return quantize_folder(model, out, plan_only=plan, **options)
