"""Sizes asked for, and the sizes of the files that came: whether a budget is a ceiling, and how near it is met.

    python -m tools.tables.sizes vit [--recipe auto] [--count 20] [--markdown]

Sizes go in equal ratios from just above the floor to a little below what the widest formats come to. Curves are
measured once; the first size pays for them, the others show what another size costs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

import onnxq
from onnxq.errors import BudgetError
from onnxq.report.records import QuantizeReport
from tools.tables.results import show_table
from tools.tables.subjects import SUBJECTS, Subject

_LOWEST, _HIGHEST = 1.01, 0.28
"""Of the floor, and of the float model's size."""


def floor_of(subject: Subject, recipe: str, curves: Path) -> float:
    """The least size that there is, by asking for less."""
    try:
        plan(subject, recipe, 1, curves)
    except BudgetError as error:
        words = str(error).split("the floor of ")[1]
        return float(words.split()[0].replace(",", ""))
    raise RuntimeError("a byte was enough")


def plan(subject: Subject, recipe: str, size: int, curves: Path) -> QuantizeReport:
    """A plan for a size."""
    return onnxq.quantize(
        subject.model,
        curves / "planned.onnx",
        recipe=recipe,
        calibration=subject.calibration(),
        size=size,
        plan_only=True,
        curves=curves,
    )


def rows(subject: Subject, recipe: str, count: int) -> list[list[str]]:
    """One line a size."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        curves = Path(folder)
        started = time.monotonic()
        lowest = _LOWEST * floor_of(subject, recipe, curves)
        measured = time.monotonic() - started
        highest = _HIGHEST * sum(file.stat().st_size for file in subject.model.parent.glob(subject.model.name + "*"))
        for size in np.geomspace(lowest, highest, count).round().astype(int):
            started = time.monotonic()
            plan(subject, recipe, int(size), curves)
            planned = time.monotonic() - started
            report = onnxq.quantize(
                subject.model,
                curves / f"{size}.onnx",
                recipe=recipe,
                calibration=subject.calibration(),
                size=int(size),
                curves=curves,
            )
            error = "" if report.check is None else f"{next(iter(report.check.relative_errors.values())):.2%}"
            found.append(
                [
                    f"{size:,}",
                    f"{report.bytes:,}",
                    f"{report.bytes / size:.4f}",
                    error,
                    f"{planned:.1f}",
                    f"{report.seconds:.0f}",
                ]
            )
            print(*found[-1], flush=True)
    print(f"curves took {measured:.0f} s")
    return found


def main() -> None:
    """Measures and shows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("subject", choices=tuple(SUBJECTS))
    parser.add_argument("--recipe", default="auto")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    arguments = parser.parse_args()
    headings = ["asked, bytes", "file, bytes", "file / asked", "output error", "plan, s", "whole run, s"]
    lines = rows(SUBJECTS[arguments.subject](), arguments.recipe, arguments.count)
    title = f"{arguments.subject}, {arguments.recipe}"
    show_table(title, headings, lines, "", Console(width=160), markdown=arguments.markdown)


if __name__ == "__main__":
    main()
