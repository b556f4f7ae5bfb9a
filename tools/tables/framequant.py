"""FrameQuant against what it builds on and what came of it: methods by true bits, on three real models.

    python -m tools.tables.framequant minilm smollm2 vit [--only PATTERN] [--list]

Every linear weight that no look-up reads is quantised, weights only, from statistics of the float model; embeddings
and tied heads stay in float, as in the paper. A cell shows the metric, the true bits per weight (codes, scales, zero
points, padding; frames' own arrays are a few KB a model) and the mean relative proxy loss. Results are kept one file
each in the cache, so that a run goes on where it stopped and several can work side by side.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from onnxq.calibration import InputStatistics, collect, requests_for
from onnxq.graph import Weight, find_weights, load
from onnxq.pipeline.solve import dequantized_roots, encode, statistics_of
from onnxq.recipe import FrameSpec, GridSpec, LinearPlan, Recipe, SolverSpec
from onnxq.solvers.loss import relative_proxy_loss
from tools.tables.results import cell_file, load_result, save_result, show_table
from tools.tables.subjects import SUBJECTS, Subject, measure_with

VERSION = 1
"""Results of another version of the methods are not taken up again."""

GROUPS = {2.0: (2, "column"), 2.25: (2, 64), 2.5: (2, 32), 3.0: (3, "column"), 4.0: (4, "column")}
"""Nominal bits to width and group size, for methods whose only fractional rates are those of their scales."""
RATES = tuple(GROUPS)


@dataclasses.dataclass(frozen=True)
class Method:
    """A line of the table: a plan for each rate that it can have."""

    name: str
    plans: dict[float, LinearPlan]


def methods() -> list[Method]:
    feedback = SolverSpec(refit=True)
    rule = {"zero_point": "per-group-integer", "group_size": "column"}
    gptq = SolverSpec(levels="min-max", refit=False)
    paper = SolverSpec(levels="two-sigma", order="natural", refit=False)

    def by_groups(frame: FrameSpec | None, solver: SolverSpec) -> dict[float, LinearPlan]:
        return {rate: LinearPlan(GridSpec(bits, group), frame, solver) for rate, (bits, group) in GROUPS.items()}

    def by_rule(frame: FrameSpec | None, solver: SolverSpec) -> dict[float, LinearPlan]:
        return {float(bits): LinearPlan(GridSpec(bits, **rule), frame, solver) for bits in (2, 3, 4)}

    def redundant(solver: SolverSpec, grid: GridSpec) -> dict[float, LinearPlan]:
        return {rate: LinearPlan(grid, FrameSpec(rate / 2), solver) for rate in (2.25, 2.5)}

    def trellis(window: int) -> dict[float, LinearPlan]:
        whole = {
            float(bits): LinearPlan(GridSpec(bits, "column", window=window), FrameSpec(), feedback)
            for bits in (2, 3, 4)
        }
        return whole | redundant(feedback, GridSpec(2, "column", window=window))

    paper_grid = GridSpec(2, **rule)
    return [
        Method("nearest", by_groups(None, SolverSpec(name="nearest"))),
        Method("error feedback, min-max levels (GPTQ)", by_rule(None, gptq)),
        Method("error feedback", by_groups(None, feedback)),
        Method("rotation, error feedback, min-max levels", by_rule(FrameSpec(), gptq)),
        Method("FrameQuant, paper's levels", by_rule(FrameSpec(), paper) | redundant(paper, paper_grid)),
        Method("rotation, error feedback, scales in groups", by_groups(FrameSpec(), feedback)),
        Method("frames, our levels", redundant(feedback, GridSpec(2, "column"))),
        Method("frames, trellis of 16 levels", trellis(4)),
        Method("frames, trellis of 64 levels", trellis(6)),
    ]


@dataclasses.dataclass(frozen=True)
class Result:
    """What one cell shows."""

    bits: float
    metric: float
    proxy_loss: float
    seconds: float


class Bench:
    """A subject with its weights and statistics, gathered when first needed and kept in the cache."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.subject: Subject = SUBJECTS[name]()
        self.loaded = load(self.subject.model)
        found = find_weights(self.loaded.model).weights
        self.weights = [weight for weight in found if weight.kinds == ("linear",)]
        self._statistics: dict[str, InputStatistics] = {}

    def statistics(self, weight: Weight) -> InputStatistics:
        if not self._statistics:
            collected = collect(self.loaded, requests_for(self.weights, "full"), self.subject.calibration())
            for item in self.weights:
                found = statistics_of(item, collected)
                assert found is not None, f"calibration reached no input of {item.name}"
                self._statistics[item.name] = found
        return self._statistics[weight.name]

    def run(self, plan: LinearPlan) -> Result:
        started = time.monotonic()
        recipe = Recipe("table", linear=plan)
        replaced: dict[str, np.ndarray] = {}
        bits, elements, losses = 0, 0, []
        for weight in self.weights:
            matrix, statistics = weight.rows(0, weight.n), self.statistics(weight)
            candidates = [
                encode(matrix, format, plan.solver, statistics)
                for format in recipe.formats(plan.grid, products=True, look_ups=False)
            ]
            scored = [
                (relative_proxy_loss(matrix, encoding.dequantize(), statistics.second_moment), index)
                for index, encoding in enumerate(candidates)
            ]
            loss, best = min(scored)
            bits += candidates[best].cost_bits()
            elements += weight.n * weight.k
            losses.append(loss)
            replaced |= dequantized_roots(weight, [candidates[best]])
        metric = measure_with(self.subject, replaced)
        return Result(bits / elements, metric, float(np.mean(losses)), time.monotonic() - started)


def cells() -> Iterator[tuple[Method, float, LinearPlan]]:
    for method in methods():
        for rate, plan in method.plans.items():
            yield method, rate, plan


def store(subject: str, method: Method, rate: float) -> Path:
    return cell_file(f"framequant-{VERSION}", subject, method.name, rate)


def fill(name: str, only: Sequence[str], console: Console) -> None:
    bench: Bench | None = None
    for method, rate, plan in cells():
        label = f"{name} {method.name} {rate:g}"
        file = store(name, method, rate)
        if file.is_file() or not any(fnmatch.fnmatchcase(label, pattern) for pattern in only):
            continue
        bench = bench or Bench(name)
        result = bench.run(plan)
        save_result(file, result)
        console.print(
            f"{label}: {result.bits:.3f} bits, metric {result.metric:.4f}, proxy loss {result.proxy_loss:.4f}, "
            f"{result.seconds:.0f} s"
        )
    baseline = store(name, Method("float", {}), 32)
    if not baseline.is_file():
        bench = bench or Bench(name)
        save_result(baseline, Result(32, measure_with(bench.subject, {}), 0.0, 0.0))


def rows(name: str) -> Iterator[list[str]]:
    """The lines of a subject's table as texts; cells that are not known are empty."""
    for method in methods():
        cells = [load_result(store(name, method, rate), Result) for rate in RATES]
        yield [
            method.name,
            *("" if cell is None else f"{cell.metric:.4g} ({cell.bits:.2f}; {cell.proxy_loss:.4f})" for cell in cells),
        ]


def show(name: str, console: Console, markdown: bool) -> None:
    baseline = load_result(store(name, Method("float", {}), 32), Result)
    title = name + ("" if baseline is None else f" (float: {baseline.metric:.4g})")
    headings = ["method", *(f"{rate:g} bits" for rate in RATES)]
    foot = "metric (true bits; mean relative proxy loss)"
    show_table(title, headings, rows(name), foot, console, markdown=markdown)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("subjects", nargs="+", choices=tuple(SUBJECTS))
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns over 'subject method rate'")
    parser.add_argument("--list", action="store_true", help="show what is known and compute nothing")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    arguments = parser.parse_args()
    console = Console(width=200)
    for name in arguments.subjects:
        if not arguments.list:
            fill(name, arguments.only, console)
        show(name, console, arguments.markdown)


if __name__ == "__main__":
    main()
