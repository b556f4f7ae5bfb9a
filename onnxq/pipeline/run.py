"""`quantize`: load, find, calibrate, allocate, solve weight by weight, rewrite, check, report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.errors import BudgetError, OnnxqError
from onnxq.graph import StreamingWriter, load
from onnxq.pipeline.bank import EncodingBank
from onnxq.pipeline.budget import Budget, fit_budget, fixed_bytes
from onnxq.pipeline.curve_cache import CurveCache, Curves
from onnxq.pipeline.curves import measure_curves
from onnxq.pipeline.job import Job
from onnxq.pipeline.plan import Planned
from onnxq.pipeline.prepare import Given, counted, inline, make_job, open_calibration
from onnxq.pipeline.records import planned_report
from onnxq.pipeline.resume import ResumeStore
from onnxq.pipeline.sensitivity import Weighing, weigh
from onnxq.pipeline.stages import Stages
from onnxq.pipeline.write import Draft, solve_and_write
from onnxq.progress import NullProgress, Progress
from onnxq.recipe import Recipe
from onnxq.report.records import QuantizeReport

_NEAR = 0.995
"""Of a size: files below that are made again, with what the first ones left of the bound of what is no weight."""
_MARGIN, _MARGIN_PER_WEIGHT = 256, 48
"""Bytes by which names and numbers of the graph and the report may differ between two plans."""


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    recipe: Recipe | str = "uniform",
    calibration: Any = None,
    tokenizer: str | Path | None = None,
    size: int | None = None,
    bits: float | None = None,
    table_bits: float | None = None,
    max_error: float | None = None,
    encodings: str | Path | None = None,
    token_counts: np.ndarray | str | Path | None = None,
    threads: int | None = None,
    force: bool = False,
    plan_only: bool = False,
    curves: Path | None = None,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantises the weights of a model and writes the result.

    Peak memory: a few copies of the largest weight, `onnxq.pipeline.stages.STATISTICS_BYTES` of second moments (or
    one, if larger), and what one batch of calibration data needs to run; never the whole model.

    Args:
        model: an ``.onnx`` file, or a folder with one.
        output: the ``.onnx`` file to write; weights go beside it, to ``<output>.data``.
        recipe: what to do; a `Recipe`, a preset's name or a YAML file.
        calibration: data for statistics and for the final check: an ``.npz``, a folder of them, a text file (with
            `tokenizer`), an iterable of feeds or an onnxruntime CalibrationDataReader.
        tokenizer: folder with ``tokenizer.json``.
        size: ceiling of the written files in bytes.
        bits, table_bits: ceilings of the mean bits of products' weights and of tables, side data counted.
        max_error: ceiling of what rounding is expected to do to the outputs, which then decides the size: a relative
            error, such as 0.1 for 10 %, or for logits a divergence in nats.
        encodings: a folder of encodings that weights were trained to (`onnxq.train`): a weight that is what one of them
            decodes to takes it as it is.
        token_counts: how often each row of a table is looked up, for bits per word: int64 [V], a ``.npy`` of it, or a
            text file to be counted (with `tokenizer`).
        threads: threads of calibration runs; None leaves it to ONNX Runtime.
        force: replace an existing output.
        plan_only: work out formats and sizes, solve and write nothing.
        curves: a folder that keeps what budgets are spent by, so that another budget for the same model, recipe and
            data costs seconds; None keeps nothing.
        progress: follows the run.

    Returns:
        What was done to every constant. The written model carries it too.

    Raises:
        OnnxqError: bad input of any kind; nothing is left behind then. After an interrupt the solved weights stay in
            ``<output>.resume`` and the same call goes on from there.
    """
    started = time.monotonic()
    progress = progress or NullProgress()
    chosen = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    budget = Budget(size, bits, table_bits, max_error).or_default(chosen)
    progress.start("reading the model", None)
    loaded = load(model)
    out = Path(output)
    # The writer checks the output path now, before hours of work, and writes nothing until the first weight is solved.
    writer = StreamingWriter(out, force=force, source=loaded)
    notes = inline(loaded)
    trained = None if encodings is None else EncodingBank.existing(encodings)
    counts = counted(token_counts, tokenizer)
    given = Given(chosen, threads, progress, trained, counts)
    job = make_job(loaded, open_calibration(calibration, loaded, chosen, tokenizer), given, notes=notes)
    if not job.plan.planned:
        reasons = "; ".join(sorted({kept.reason for kept in job.plan.kept})[:5])
        raise OnnxqError(f"{loaded.path} holds no weight that the recipe quantises ({reasons}).")
    # A plan writes nothing, and must leave what an interrupted run left.
    store = (
        None
        if plan_only
        else ResumeStore(out.with_name(out.name + ".resume"), {**job.identity(), "budget": dataclasses.asdict(budget)})
    )
    try:
        with contextlib.ExitStack() as open_writers:
            fitting = None if not budget.asked else _Fitting(budget, job, store, curves)
            fitted = job if fitting is None else fitting.fitted()
            if store is None:
                return planned_report(fitted, out, started)
            draft = solve_and_write(fitted, open_writers.enter_context(writer), store, started)
            if fitting is not None and size is not None and draft.bytes < _NEAR * size:
                again = fitting.fitted(spare=fitting.spare(draft))
                if [item.formats for item in again.plan.planned] != [item.formats for item in fitted.plan.planned]:
                    fresh = StreamingWriter(out, force=force, source=loaded)
                    closer = solve_and_write(_reopened(again), open_writers.enter_context(fresh), store, started)
                    draft = max(draft, closer, key=lambda made: made.bytes if made.bytes <= size else -1)
            if size is not None and draft.bytes > size:
                raise BudgetError(
                    f"The model came to {draft.bytes:,} bytes, above the {size:,} asked for, and was not written: the "
                    "estimate of what is not weights was too low. Ask for a little less, and please report this model."
                )
            report = draft.publish()
    except OnnxqError:
        if store is not None:
            store.discard()
        raise
    finally:
        progress.finish()
    store.discard()
    return report


def _reopened(job: Job) -> Job:
    """The job on a model that no pass has changed yet."""
    loaded = load(job.loaded.path)
    inline(loaded)
    given = Given(job.recipe, job.threads, job.progress, job.trained, job.counts)
    fresh = make_job(loaded, job.data, given)
    chosen = {item.weight.name: item for item in job.plan.planned}
    planned = tuple(dataclasses.replace(chosen[item.weight.name], weight=item.weight) for item in fresh.plan.planned)
    return dataclasses.replace(fresh, plan=dataclasses.replace(job.plan, planned=planned), budget=job.budget)


class _Fitting:
    """Spends a budget on a job, again and again on curves that are measured once."""

    def __init__(self, budget: Budget, job: Job, store: ResumeStore | None, cache: Path | None) -> None:
        self._budget, self._job = budget, job
        checkpoint = None
        if store is not None and job.data is not None:
            store.open()
            checkpoint = store.folder / "sensitivities.state"
        self._curves_of = _curve_source(job, cache, checkpoint)

    def fitted(self, spare: int = 0) -> Job:
        """The job with widths chosen so that the budget holds; `spare` as in `fit_budget`."""
        job = self._job
        plan, records = fit_budget(self._budget, job.plan, job.recipe, job.loaded, self._curves_of, spare)
        return dataclasses.replace(job, plan=plan, budget=records)

    def spare(self, draft: Draft) -> int:
        """By how many bytes the bound of what is no weight was too high, with some left for names and numbers."""
        job = draft.job
        bound = fixed_bytes(job.loaded, job.plan, stock=job.recipe.target == "stock")
        margin = _MARGIN + _MARGIN_PER_WEIGHT * len(job.plan.planned)
        return max(bound - draft.beside_weights - margin, 0)


def _curve_source(job: Job, folder: Path | None, checkpoint: Path | None) -> Callable[[Sequence[Planned]], Curves]:
    """Gives curves from the cache or measures them; what errors do to the outputs is measured once."""
    cache = CurveCache(folder, job.identity())
    recipe = job.recipe

    @functools.cache
    def weighing() -> Weighing:
        return weigh(
            job.loaded,
            job.plan,
            job.data,
            recipe.allocation,
            recipe.seed,
            job.progress,
            checkpoint=checkpoint,
            threads=job.threads,
        )

    measured: dict[tuple[str, ...], Curves] = {}

    def curves_of(items: Sequence[Planned]) -> Curves:
        names = tuple(item.weight.name for item in items)
        if names not in measured:
            measured[names] = find(items)
        return measured[names]

    def find(items: Sequence[Planned]) -> Curves:
        known = cache.load(items)
        if known is not None:
            return dataclasses.replace(known, notes=(*known.notes, "rate and error were measured by an earlier run"))
        stages = Stages(job.loaded, job.data, job.threads, job.progress)
        found = weighing()
        points = measure_curves(items, stages, found.sensitivities, job.progress)
        kind = "layer" if found.sensitivities is None else found.sensitivities.kind
        curves = Curves(points, kind, found.notes)
        if kind != "layer" or recipe.allocation.sensitivity == "layer" or job.data is None:
            # Where gradients were wanted and torch or an operator was missing, another run may have them.
            cache.save(items, curves)
        return curves

    return curves_of
