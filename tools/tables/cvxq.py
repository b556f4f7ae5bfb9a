"""Mixed depths and the allocator against one depth: methods by true bits, on real models.

    python -m tools.tables.cvxq minilm smollm2 [--only PATTERN] [--list] [--markdown] [--plot FOLDER]

Every linear weight that no look-up reads is quantised, weights only, float32 activations; tables stay in float. All go
through `onnxq.quantize`, so a cell is what a user gets: the metric of the written file, its mean true bits (the ceiling
asked for is the column), and the time it took. `tools/tables/paper_cvxq.py` measures the paper's own method beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnxruntime as ort
from rich.console import Console

import onnxq
from onnxq.pipeline.curve_cache import default_folder
from onnxq.recipe import FrameSpec, GridSpec, LinearPlan, MixedSpec, Recipe, SolverSpec, TablePlan
from onnxq.report.records import QuantizeReport
from tools.tables.results import cell_file, load_result, save_result, show_table
from tools.tables.subjects import SUBJECTS, Subject

TABLE = "cvxq-1"
"""Results of another version of the methods are not taken up again."""
RATES = (2.1, 2.25, 2.5, 3.0, 3.5, 4.0)
GROUPS = {2.1: (2, 160), 2.25: (2, 64), 2.5: (2, 32), 3.0: (3, "column"), 3.5: (3, 32), 4.0: (4, "column")}
"""Width and group size of one depth at about each rate: scales and zero points make the fractions."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one cell shows.

    Attributes:
        bits: mean true bits of the weights.
        metric: see the subject.
        error: relative error of the first output on the calibration data.
        seconds, peak_memory: of the whole run, curves and gradients included where they were not in the cache.
    """

    bits: float
    metric: float
    error: float
    seconds: float
    peak_memory: int


@dataclasses.dataclass(frozen=True)
class Method:
    """A line of the table: a recipe and, where there is one, a budget for each rate."""

    name: str
    recipes: dict[float, Recipe]
    budget: bool


def methods() -> list[Method]:
    def recipe(linear: LinearPlan, *alternatives: LinearPlan) -> Recipe:
        plans = [dataclasses.replace(plan, activations="float32") for plan in (linear, *alternatives)]
        return Recipe("table", linear=plans[0], alternatives=tuple(plans[1:]), tables=TablePlan(None))

    def fixed(solver: SolverSpec) -> dict[float, Recipe]:
        return {
            rate: recipe(LinearPlan(GridSpec(bits, group), solver=solver)) for rate, (bits, group) in GROUPS.items()
        }

    def spent(*plans: LinearPlan) -> dict[float, Recipe]:
        return dict.fromkeys(RATES, recipe(*plans))

    uniform = LinearPlan(GridSpec(4, 64))
    framed = LinearPlan(GridSpec(2, "column", window=4), FrameSpec())
    mixed = LinearPlan(GridSpec(3, "column"), mixed=MixedSpec())
    return [
        Method("nearest", fixed(SolverSpec(name="nearest")), False),
        Method("error feedback", fixed(SolverSpec()), False),
        Method("uniform, a width for each weight", spent(uniform), True),
        Method("trellis in frames, a width for each weight", spent(framed), True),
        Method("mixed depths", spent(mixed), True),
        Method("all formats", spent(uniform, framed, mixed), True),
    ]


def run(subject: Subject, recipe: Recipe, ceiling: float | None) -> tuple[Cell, QuantizeReport]:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.onnx"
        report = onnxq.quantize(
            subject.model, out, recipe=recipe, calibration=subject.calibration(), bits=ceiling, curves=default_folder()
        )
        seconds = time.monotonic() - started
        metric = subject.measure(ort.InferenceSession(out, providers=["CPUExecutionProvider"]))
    assert report.check is not None
    assert report.linear_bits is not None
    error = next(iter(report.check.relative_errors.values()))
    return Cell(report.linear_bits, metric, error, seconds, report.peak_memory), report


def cells() -> Iterator[tuple[Method, float, Recipe]]:
    for method in methods():
        for rate, recipe in method.recipes.items():
            yield method, rate, recipe


def fill(name: str, only: Sequence[str], console: Console) -> None:
    subject: Subject | None = None
    for method, rate, recipe in cells():
        label = f"{name} {method.name} {rate:g}"
        file = cell_file(TABLE, name, method.name, rate)
        if file.is_file() or not any(fnmatch.fnmatchcase(label, pattern) for pattern in only):
            continue
        subject = subject or SUBJECTS[name]()
        cell, report = run(subject, recipe, rate if method.budget else None)
        save_result(file, cell)
        file.with_suffix(".report").write_text(report.to_json())
        console.print(
            f"{label}: {cell.bits:.3f} bits, metric {cell.metric:.4f}, error {cell.error:.4f}, {cell.seconds:.0f} s"
        )


def rows(name: str) -> Iterator[list[str]]:
    """The lines of a subject's table as texts; cells that are not known are empty."""
    for method in methods():
        found = [load_result(cell_file(TABLE, name, method.name, rate), Cell) for rate in RATES]
        yield [method.name, *("" if cell is None else f"{cell.metric:.4g} ({cell.bits:.2f})" for cell in found)]


def plot(name: str, folder: Path) -> None:
    """Two pictures of a subject: the metric by rate, and where the bits of each layer went."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "onnxq"  # the same file from the same numbers
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method in methods():
        found = [load_result(cell_file(TABLE, name, method.name, rate), Cell) for rate in RATES]
        known = [cell for cell in found if cell is not None]
        axes.plot([cell.bits for cell in known], [cell.error for cell in known], "o-", label=method.name, markersize=4)
    axes.set(xlabel="true bits per weight", ylabel="relative error of the output", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(folder / f"{name}-rate.svg", metadata={"Date": None})
    for rate in (2.25, 3.0):
        file = cell_file(TABLE, name, "mixed depths", rate).with_suffix(".report")
        if not file.is_file():
            continue
        weights = QuantizeReport.from_json(file.read_text()).weights
        figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
        axes.bar(range(len(weights)), [weight.bits_per_weight for weight in weights])
        axes.set_xticks(range(len(weights)), [weight.name for weight in weights], rotation=90, fontsize=5)
        axes.axhline(rate, color="black", linewidth=0.8)
        axes.set(ylabel=f"bits of each weight, {rate:g} in the mean")
        figure.savefig(folder / f"{name}-bits-{rate:g}.svg", metadata={"Date": None})
    plt.close("all")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("subjects", nargs="+", choices=tuple(SUBJECTS))
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns over 'subject method rate'")
    parser.add_argument("--list", action="store_true", help="show what is known and compute nothing")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw what is known (needs matplotlib)")
    arguments = parser.parse_args()
    console = Console(width=200)
    for name in arguments.subjects:
        if not arguments.list:
            fill(name, arguments.only, console)
        headings = ["method", *(f"{rate:g} bits" for rate in RATES)]
        show_table(name, headings, rows(name), "metric (true bits)", console, markdown=arguments.markdown)
        if arguments.plot is not None:
            plot(name, arguments.plot)


if __name__ == "__main__":
    main()
