"""Options that several commands share, and what they mean."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from onnxq.errors import RecipeError

if TYPE_CHECKING:
    from onnxq.calibration import CalibrationData
    from onnxq.recipe import GridSpec, Recipe

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="One row for everything, nothing grouped.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of one operator. Default: ONNX Runtime chooses.")]
NoLibrary = Annotated[
    bool,
    typer.Option("--no-library", help="Without the kernel library, as stock ONNX Runtime runs the model."),
]
Tokenizer = Annotated[
    Path | None, typer.Option(help="Folder with tokenizer.json, for DATA that is a text file.", metavar="DIR")
]
DATA_HELP = (
    "An .npz of named inputs (leading axis = samples), a folder of those, or text with --tokenizer. For a folder of "
    "several graphs: GRAPH.npz for each, a recorded trace, or a text that its model is to translate."
)


def parse_group_size(text: str | None) -> int | Literal["column"] | None:
    """``--group-size``: a number, or "column".

    Raises:
        RecipeError: neither.
    """
    if text is None or text == "column":
        return text  # type: ignore[return-value]
    if not text.isdigit():
        raise RecipeError(f"--group-size is {text!r}; give a multiple of 32, such as 64, or 'column'.")
    return int(text)


def adjusted_recipe(
    name: str,
    *,
    width: int | None,
    group_size: int | Literal["column"] | None,
    redundancy: float | None,
    target: Literal["kernel", "stock"] | None,
    seed: int | None,
) -> Recipe:
    """A recipe with the options of the command line put in.

    A width holds for the weights of products; tables take it too, but 4 bits at least. A redundancy puts them in a
    frame. A recipe's rules stay.

    Raises:
        RecipeError: no such recipe, or a value out of range.
    """
    from onnxq.recipe import FrameSpec, Recipe

    recipe = Recipe.load(name)
    linear = dataclasses.replace(recipe.linear, grid=_adjusted(recipe.linear.grid, width, group_size))
    if redundancy is not None:
        frame = dataclasses.replace(linear.frame or FrameSpec(), redundancy=redundancy)
        linear = dataclasses.replace(linear, frame=frame)
    tables = recipe.tables.grid
    if tables is not None:
        tables = _adjusted(tables, None if width is None else max(width, 4), group_size)
    return dataclasses.replace(
        recipe,
        linear=linear,
        tables=dataclasses.replace(recipe.tables, grid=tables),
        target=recipe.target if target is None else target,
        seed=recipe.seed if seed is None else seed,
    )


def _adjusted(grid: GridSpec, width: int | None, group_size: int | Literal["column"] | None) -> GridSpec:
    return dataclasses.replace(
        grid,
        bits=grid.bits if width is None else width,
        group_size=grid.group_size if group_size is None else group_size,
    )


def open_for(model: Path, data: Path, tokenizer: Path | None, *, batch: int, samples: int | None) -> CalibrationData:
    """Data for a model, checked against its inputs.

    Raises:
        OnnxqError: the model can't be read, or the data does not fit it.
    """
    from onnxq.calibration import model_inputs, open_data
    from onnxq.runtime.optimized import read_graph

    inputs = model_inputs(read_graph(model))
    return open_data(data, inputs, tokenizer=tokenizer, batch_size=batch, max_samples=samples)
