"""From plain data, as YAML gives it, to records whose fields are checked."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from onnxq.errors import RecipeError
from onnxq.recipe.checks import nearest_name, require_choice


def build(kind: Any, value: Any, where: str) -> Any:
    """Checks plain data against a type of this module and makes the value."""
    if dataclasses.is_dataclass(kind):
        return _build_record(kind, value, where)
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _build_union(choices, value, where)
    if origin is Literal:
        require_choice(value, choices, where)
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"{where} must be a list, not {value!r}.")
        return tuple(build(choices[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RecipeError(f"{where} must be {_plain_name(kind)}, not {value!r}.")
    return value


def _build_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    options = [choice for choice in choices if choice is not type(None)]
    errors = []
    for option in options:
        try:
            return build(option, value, where)
        except RecipeError as error:
            errors.append(error)
    # A record's own complaint says more than "none of these types".
    raise (
        errors[0]
        if len(errors) == 1
        else RecipeError(f"{where} is {value!r}; it must be {' or '.join(_plain_name(option) for option in options)}.")
    )


def _build_record(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where} must be a mapping of keys, not {value!r}.")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            raise RecipeError(
                f"{where} has no key {key!r}.{nearest_name(str(key), list(fields))} Valid keys: {', '.join(fields)}."
            )
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in value]
    if missing:
        raise RecipeError(f"{where} lacks {', '.join(missing)}.")
    try:
        return kind(**{key: build(hints[key], item, f"{where}.{key}") for key, item in value.items()})
    except RecipeError as error:
        text = str(error)
        raise error if text.startswith(where) else RecipeError(f"{where}: {text}") from error


def _plain_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(kind))
    return names.get(kind, getattr(kind, "__name__", str(kind)))
