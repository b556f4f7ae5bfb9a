"""Cells of a table, one file each in the cache: a run goes on where it stopped, and several can work side by side."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.table import Table

from tools.models import cache_folder

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Kind = TypeVar("Kind")


def table_folder(table: str) -> Path:
    """Where a table's files are; it need not exist."""
    return cache_folder() / "tables" / table


def cell_file(table: str, subject: str, method: str, rate: float) -> Path:
    """The file of one cell; methods that differ in punctuation alone share one."""
    plain = "".join(letter if letter.isalnum() else "-" for letter in method)
    return table_folder(table) / f"{subject}.{plain}.{rate:g}.json"


def load_result(file: Path, kind: type[Kind]) -> Kind | None:
    """A stored dataclass; None where there is none."""
    return kind(**json.loads(file.read_text())) if file.is_file() else None


def save_result(file: Path, result: DataclassInstance) -> None:
    """Stores a dataclass of plain data, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(dataclasses.asdict(result)))
    partial.replace(file)


def show_table(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], foot: str, console: Console, *, markdown: bool
) -> None:
    """Prints a table, or its Markdown for a document."""
    if markdown:
        print(f"\n{title}\n\n| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
        for row in rows:
            print(f"| {' | '.join(row)} |")
        return
    table = Table(*headings, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table, foot)
