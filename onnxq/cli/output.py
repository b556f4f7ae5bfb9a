"""Where the command line writes: results to standard output, all else to the error stream."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

_PIPE_WIDTH = 160
"""Columns where standard output is no terminal: tables are read by people there too."""


def out_console() -> Console:
    """For results. Made anew at each call, so that a redirected stream is respected."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def error_console() -> Console:
    """For progress and errors."""
    return Console(file=sys.stderr, highlight=False)


def emit(as_json: bool, plain: Any, shown: Callable[[], Iterable[RenderableType]]) -> None:
    """Prints a result.

    Args:
        as_json: print `plain` as one JSON document, and nothing else.
        plain: the result as data: dataclasses, paths and enums are taken as well.
        shown: makes what people see; not called for JSON.
    """
    if as_json:
        sys.stdout.write(json.dumps(as_data(plain), indent=2, ensure_ascii=False) + "\n")
        return
    console = out_console()
    for part in shown():
        console.print(part)


def as_data(value: Any) -> Any:
    """Plain data that JSON can hold; numbers that are not finite become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return as_data(value.value)
    if isinstance(value, Mapping):
        return {str(key): as_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_data(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value
