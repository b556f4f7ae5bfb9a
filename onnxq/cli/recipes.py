"""`onnxq recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from onnxq.cli.options import Json
from onnxq.cli.output import emit


def command(
    name: Annotated[str | None, typer.Argument(help="A preset or a YAML file: print it in full.")] = None,
    json: Json = False,
) -> None:
    """List the presets, or print one as YAML to start a recipe of your own from."""
    from onnxq.recipe import Recipe, presets
    from onnxq.report.recipe_tables import recipes

    if name is None:
        known = presets()
        emit(json, {key: recipe.to_dict() for key, recipe in known.items()}, lambda: recipes(known))
        return
    recipe = Recipe.load(name)
    if json:
        emit(True, recipe.to_dict(), list)
    else:
        typer.echo(recipe.to_yaml().rstrip())
