"""Quantising an exported model as users have it: a folder with graphs, tokenizer and configs.

The graphs of an encoder-decoder model share weights, and work one after the other. So all are planned before the first
is written: what two of them hold is solved once and stored once, in the data file of the first, and one budget is spent
on all files together.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.calibration import CalibrationData, model_inputs, open_data
from onnxq.calibration.folder import FolderData
from onnxq.calibration.generation import generates, record_generation
from onnxq.errors import BudgetError, ModelError, OnnxqError, OutputExistsError
from onnxq.graph import StreamingWriter, load
from onnxq.graph.pool import DataPool
from onnxq.graph.shared import find_shared
from onnxq.pipeline.bank import EncodingBank
from onnxq.pipeline.budget import Budget
from onnxq.pipeline.folder_budget import fit_folder
from onnxq.pipeline.job import Job
from onnxq.pipeline.prepare import Given, counted, find, inline, make_job
from onnxq.pipeline.records import planned_report
from onnxq.pipeline.resume import ResumeStore
from onnxq.pipeline.write import solve_and_write
from onnxq.progress import NullProgress, Progress
from onnxq.recipe import Recipe
from onnxq.report.records import BudgetRecord, FolderReport, QuantizeReport


def quantize_folder(
    folder: str | Path,
    out_folder: str | Path,
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
) -> FolderReport:
    """Quantises every graph of a folder; all other files are carried over.

    The output folder appears when everything is written, or not at all. No graph becomes larger: one that would is
    carried over as it is, and its report says so.

    Args:
        folder: holds one or more ``.onnx`` files.
        out_folder: a new folder; files keep their names.
        calibration: see `onnxq.calibration.folder`; for a folder with one graph, as in `quantize`. A text file for a
            translation model is translated first, by the float model, to see what its graphs are fed; its tokens are
            counted where the recipe wants counts and none are given.
        tokenizer: the folder itself by default. size: ceiling of all graphs together. recipe, bits, table_bits,
        max_error, encodings, token_counts, threads, plan_only, curves, progress: see `quantize`. force: replace an
        existing output folder.

    Returns:
        The report of each graph, by file name.

    Raises:
        OnnxqError: see `quantize`. After an interrupt the solved weights stay in ``<out_folder>.resume`` and the same
            call goes on from there.
    """
    progress = progress or NullProgress()
    source, target = Path(folder), Path(out_folder)
    chosen = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    budget = Budget(size, bits, table_bits, max_error).or_default(chosen)
    if not sorted(source.glob("*.onnx")):
        raise ModelError(f"The folder {source} holds no .onnx file. Export a model into it: `onnxq export`.")
    if target.exists() and not plan_only and (target.resolve() == source.resolve() or not force):
        raise OutputExistsError(f"{target} exists already. Choose another output path, or replace it with --force.")
    words = tokenizer if tokenizer is not None else source
    trained = None if encodings is None else EncodingBank.existing(encodings)
    if token_counts is None and chosen.counts_words and _is_text(calibration):
        token_counts = calibration
    counts = counted(token_counts, words)
    given = Given(chosen, threads, progress, trained, counts)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        run = _FolderRun(source, given, budget, calibration, words, Path(temporary), curves)
        try:
            if plan_only:
                return run.planned()
            return run.written(target)
        finally:
            progress.finish()


class _FolderRun:
    """One run over all graphs of a folder."""

    def __init__(
        self,
        source: Path,
        given: Given,
        budget: Budget,
        calibration: Any,
        tokenizer: str | Path,
        scratch: Path,
        curves: Path | None,
    ) -> None:
        self._source, self._given, self._budget, self._scratch = source, given, budget, scratch
        self._tokenizer, self._curves = tokenizer, curves
        given.progress.start("reading the graphs", None)
        self._loaded = {path.name: load(path) for path in sorted(source.glob("*.onnx"))}
        if isinstance(calibration, (str, Path)) and len(self._loaded) > 1:
            calibration = self._as_trace(Path(calibration))
        self._data = FolderData(calibration, list(self._loaded), self._open_one)
        self._notes: tuple[str, ...] = ()
        self._ceilings: tuple[BudgetRecord, ...] = ()
        self._pool = DataPool()

    def planned(self) -> FolderReport:
        """What would be done."""
        jobs = self._fitted(self._jobs())
        reports = {name: planned_report(job, job.loaded.path, time.monotonic()) for name, job in jobs.items()}
        return FolderReport(self._in_order(reports), self._ceilings, self._notes)

    def written(self, target: Path) -> FolderReport:
        """Solves and writes all graphs, then puts the folder in place."""
        jobs = self._jobs()
        key = {name: job.identity() for name, job in jobs.items()}
        store = ResumeStore(
            target.with_name(target.name + ".resume"), {"graphs": key, "budget": dataclasses.asdict(self._budget)}
        )
        fresh = self._scratch / "new"
        fresh.mkdir()
        try:
            jobs = self._fitted(jobs)
            reports = {name: self._write(job, fresh / name, store) for name, job in jobs.items()}
            self._require_size(sum(report.bytes for report in reports.values()))
        except OnnxqError:
            store.discard()
            raise
        sources = {path for model in self._loaded.values() for path in (model.path, *model.external_files)}
        _carry(self._source, fresh, sources)
        if target.exists():
            os.replace(target, self._scratch / "old")
        os.replace(fresh, target)
        store.discard()
        return FolderReport(self._in_order(reports), self._ceilings, self._notes)

    def _jobs(self) -> dict[str, Job]:
        """The plan of every graph, those that were run for calibration first.

        What others share with them is then solved from their statistics.
        """
        notes = {name: inline(loaded) for name, loaded in self._loaded.items()}
        self._shared = find_shared({name: find(loaded).weights for name, loaded in self._loaded.items()})
        jobs = {}
        for name in self._by_use():
            loaded = self._loaded[name]
            elsewhere = {weight.name: weight.elsewhere for weight in self._shared.weights[name]}
            data = self._data.of(name, model_inputs(loaded.model))
            jobs[name] = make_job(
                loaded, data, self._given, notes=notes[name], elsewhere=elsewhere, calibrated=self._data.any
            )
        if not any(job.plan.planned for job in jobs.values()):
            reasons = sorted({kept.reason for job in jobs.values() for kept in job.plan.kept})[:5]
            raise OnnxqError(f"{self._source} holds no weight that the recipe quantises ({'; '.join(reasons)}).")
        return jobs

    def _by_use(self) -> list[str]:
        trace = self._data.trace
        ran: tuple[str, ...] = () if trace is None else trace.graphs

        def use(name: str) -> tuple[bool, int]:
            products = sum("linear" in weight.own_kinds for weight in self._shared.weights[name])
            return name not in ran, -products

        return sorted(self._loaded, key=use)

    def _fitted(self, jobs: dict[str, Job]) -> dict[str, Job]:
        if not self._budget.asked:
            return jobs
        fitted = fit_folder(self._budget, jobs, self._shared, self._data.trace, self._curves)
        self._ceilings, self._notes = fitted.records, fitted.notes
        return fitted.jobs

    def _write(self, job: Job, path: Path, store: ResumeStore) -> QuantizeReport:
        started = time.monotonic()
        if job.plan.planned:
            writer = StreamingWriter(path, source=job.loaded, pool=self._pool)
            with writer:
                draft = solve_and_write(job, writer, store, started)
                if draft.bytes < job.loaded.bytes_on_disk:
                    return draft.publish()
            reason = f"quantised it would take {draft.bytes:,} bytes, no fewer than its {job.loaded.bytes_on_disk:,}"
        else:
            reason = "it holds no weight that the recipe quantises"
        return _carried_graph(job, path, reason, started)

    def _require_size(self, came_to: int) -> None:
        asked = self._budget.size
        if asked is not None and came_to > asked:
            raise BudgetError(
                f"The graphs came to {came_to:,} bytes, above the {asked:,} asked for, and were not written: the "
                "estimate of what is not weights was too low. Ask for a little less, and please report this model."
            )

    def _in_order(self, reports: Mapping[str, QuantizeReport]) -> dict[str, QuantizeReport]:
        return {name: reports[name] for name in self._loaded}

    def _open_one(self, source: Any, inputs: Any) -> CalibrationData:
        spec = self._given.recipe.calibration
        return open_data(
            source,
            inputs,
            tokenizer=self._tokenizer,
            batch_size=spec.batch_size,
            max_samples=spec.max_samples,
            max_length=spec.max_length,
            seed=self._given.recipe.seed,
        )

    def _as_trace(self, path: Path) -> Any:
        """A trace of the folder's own model on a text or on clips; other data as it is."""
        if not path.is_file() or not generates(self._source):
            return path
        recipe = self._given.recipe
        return record_generation(
            self._source,
            path,
            self._scratch / "trace",
            max_samples=recipe.calibration.max_samples,
            seed=recipe.seed,
            progress=self._given.progress,
        )


def _carried_graph(job: Job, path: Path, reason: str, started: float) -> QuantizeReport:
    """Copies a graph with its external data, and reports every weight as kept."""
    for file in (job.loaded.path, *job.loaded.external_files):
        copy = path.parent / file.relative_to(job.loaded.path.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, copy)
    report = planned_report(dataclasses.replace(job, plan=job.plan.keeping_all(reason)), path, started)
    return dataclasses.replace(report, bytes=job.loaded.bytes_on_disk)


def _is_text(calibration: Any) -> bool:
    """Whether calibration data is a text, whose tokens can be counted as well."""
    return isinstance(calibration, (str, Path)) and Path(calibration).is_file() and Path(calibration).suffix != ".npz"


def _carry(source: Path, target: Path, left_out: set[Path]) -> None:
    """Copies everything but the graphs and their external data."""
    done = {path.resolve() for path in left_out}
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.resolve() not in done:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
