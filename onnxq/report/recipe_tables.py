"""Recipes for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import RenderableType
from rich.markup import escape
from rich.text import Text

from onnxq.recipe import GridSpec, Recipe
from onnxq.report.tables import table


def recipes(known: Mapping[str, Recipe]) -> list[RenderableType]:
    """One row per recipe."""
    made = table("recipe", "products", "solver", "tables", "target", "what it is", wide=("what it is",))
    for name, recipe in known.items():
        solver = recipe.linear.solver.name + (", sequential" if recipe.calibration.sequential else "")
        made.add_row(
            Text(name, style="bold"), _products(recipe), solver, _grid(recipe.tables.grid),
            recipe.target, escape(recipe.description),
        )  # fmt: skip
    foot = "`onnxq recipes NAME` prints one as YAML: save it, change it, and give the file to --recipe."
    return [made, Text(foot, style="dim")]


def _products(recipe: Recipe) -> str:
    if recipe.alternatives:
        return f"{recipe.linear.grid.bits} bits in the mean, of {1 + len(recipe.alternatives)} plans"
    if recipe.linear.mixed is not None:
        return f"{recipe.linear.grid.bits} bits in the mean, mixed"
    return _grid(recipe.linear.grid)


def _grid(grid: GridSpec | None) -> str:
    if grid is None:
        return "float"
    group = "per column" if grid.group_size == "column" else f"groups of {grid.group_size}"
    return f"{grid.bits}-bit, {group}"
