"""How recipes complain: what is wrong, what is allowed, and the nearest valid name."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Sequence
from typing import Any, Literal

from onnxq.errors import RecipeError


def require(condition: bool, sentence: str) -> None:
    """Refuse with the sentence unless the condition holds."""
    if not condition:
        raise RecipeError(f"{sentence}.")


def nearest_name(word: str, valid: Sequence[str]) -> str:
    """A question that offers the valid word nearest to one, or nothing."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def require_choice(value: Any, choices: Sequence[Any], where: str) -> None:
    """Refuse a value that is none of the choices; `where` names its place."""
    if value not in choices:
        near = nearest_name(str(value), [str(choice) for choice in choices])
        raise RecipeError(f"{where} is {value!r}; it must be one of {', '.join(map(str, choices))}.{near}")


def require_choices(record: Any) -> None:
    """Check the fields that name one of several things: Python callers don't come past `Recipe.from_dict`."""
    for name, kind in typing.get_type_hints(type(record)).items():
        if typing.get_origin(kind) is Literal:
            require_choice(getattr(record, name), typing.get_args(kind), name)
