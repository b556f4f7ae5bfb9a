"""`quantize`: load, find, calibrate, allocate, solve weight by weight, rewrite, check, report."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq.calibration import (
    CalibrationData,
    Collected,
    SequentialCalibration,
    model_inputs,
    open_data,
)
from onnxq.errors import BudgetError, OnnxqError
from onnxq.evaluation.load_probe import peak_bytes
from onnxq.graph import LoadedModel, StreamingWriter, find_weights, load
from onnxq.passes.fold import FoldFramesPass
from onnxq.passes.forms import Readers, StoredWeight, choose_form
from onnxq.passes.functions import inline_functions_with_sites
from onnxq.passes.rewrite import Assignment, RewriteSitesPass
from onnxq.pipeline.budget import Budget, fit_budget
from onnxq.pipeline.check import check_outputs
from onnxq.pipeline.curve_cache import CurveCache, Curves
from onnxq.pipeline.curves import measure_curves
from onnxq.pipeline.distil import check_distillable, distil_solved
from onnxq.pipeline.plan import Plan, Planned, frame_of, is_planned, make_plan
from onnxq.pipeline.resume import ResumeStore, file_identity
from onnxq.pipeline.sensitivity import Weighing, weigh
from onnxq.pipeline.solve import Solved, dequantized_roots, solve_weight, statistics_of
from onnxq.pipeline.stages import Stages
from onnxq.progress import NullProgress, Progress
from onnxq.recipe import Recipe
from onnxq.report.records import REPORT_PROPERTY, BudgetRecord, QuantizeReport, WeightRecord
from onnxq.version import __version__

RECIPE_PROPERTY = "onnxq.recipe"
"""Metadata key of a written model that holds its recipe."""


@dataclasses.dataclass(frozen=True)
class _Job:
    """What one run works on, all of it checked before anything is computed."""

    loaded: LoadedModel
    recipe: Recipe
    plan: Plan
    data: CalibrationData | None
    threads: int | None
    progress: Progress
    budget: tuple[BudgetRecord, ...] = ()


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
    budget = Budget(size, bits, table_bits, max_error)
    if chosen.chooses and budget.size is None and budget.bits is None and budget.max_error is None:
        budget = dataclasses.replace(budget, bits=float(chosen.linear.grid.bits))
    progress.start("reading the model", None)
    loaded = load(model)
    out = Path(output)
    # The writer checks the output path now, before hours of work, and writes nothing until the first weight is solved.
    writer = StreamingWriter(out, force=force, source=loaded)
    inlined = inline_functions_with_sites(loaded.model)
    found = find_weights(loaded.model)
    data = _open(calibration, loaded, chosen, tokenizer)
    if chosen.distillation is not None and data is not None:
        check_distillable(loaded, data)
    fold = FoldFramesPass(
        found.weights, lambda weight: frame_of(weight, chosen), lambda weight: is_planned(weight, chosen)
    )
    if fold(loaded.model).modified:
        found = find_weights(loaded.model)
    plan = make_plan(found, chosen, calibrated=data is not None, origins=fold.origins, in_frame=fold.in_frame)
    for item in fold.folded:
        note = f"the frame between {item.before} and {', '.join(item.after)} is folded into both: no transform is left"
        plan = dataclasses.replace(plan, notes=(*plan.notes, note))
    if inlined:
        note = f"inlined the functions {', '.join(inlined)}: weights inside them can't be replaced"
        plan = dataclasses.replace(plan, notes=(*plan.notes, note))
    if not plan.planned:
        reasons = "; ".join(sorted({kept.reason for kept in plan.kept})[:5])
        raise OnnxqError(f"{loaded.path} holds no weight that the recipe quantises ({reasons}).")
    job = _Job(loaded, chosen, plan, data, threads, progress)
    # A plan writes nothing, and must leave what an interrupted run left.
    store = (
        None
        if plan_only
        else ResumeStore(out.with_name(out.name + ".resume"), {**_identity(job), "budget": dataclasses.asdict(budget)})
    )
    try:
        if budget.asked:
            job = _within(budget, job, store, curves)
        if store is None:
            return _planned_report(job, out, started)
        with writer:
            report = _solve_and_write(job, writer, store, started)
    except OnnxqError:
        if store is not None:
            store.discard()
        raise
    finally:
        progress.finish()
    store.discard()
    if size is not None and report.bytes > size:
        for written in (out, out.with_name(out.name + ".data")):
            written.unlink(missing_ok=True)
        raise BudgetError(
            f"The written model came to {report.bytes:,} bytes, above the {size:,} asked for, and was removed: the "
            "estimate of what is not weights was too low. Ask for a little less, and please report this model."
        )
    return report


def _identity(job: _Job) -> dict[str, Any]:
    """What tells a model, recipe and data from others."""
    data = job.data
    return {
        "source": [file_identity(path) for path in (job.loaded.path, *sorted(job.loaded.external_files))],
        "recipe": job.recipe.digest(),
        "data": None if data is None else [data.name, data.samples, _fingerprint(data)],
        "version": __version__,
    }


def _within(budget: Budget, job: _Job, store: ResumeStore | None, cache: Path | None) -> _Job:
    """The job with widths chosen so that the budget holds."""
    checkpoint = None
    if store is not None and job.data is not None:
        store.open()
        checkpoint = store.folder / "sensitivities.state"
    fitted, records = fit_budget(budget, job.plan, job.recipe, job.loaded, _curve_source(job, cache, checkpoint))
    return dataclasses.replace(job, plan=fitted, budget=records)


def _curve_source(job: _Job, folder: Path | None, checkpoint: Path | None) -> Callable[[Sequence[Planned]], Curves]:
    """Gives curves from the cache or measures them; what errors do to the outputs is measured once."""
    cache = CurveCache(folder, _identity(job))
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

    def curves_of(items: Sequence[Planned]) -> Curves:
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


def _fingerprint(data: CalibrationData) -> str:
    """Tells data apart by all feeds: curves are kept for long, and a file may change under its name."""
    digest = hashlib.sha256()
    for feed in data:
        for name, array in sorted(feed.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _open(
    calibration: Any, loaded: LoadedModel, recipe: Recipe, tokenizer: str | Path | None
) -> CalibrationData | None:
    if calibration is None:
        return None
    spec = recipe.calibration
    return open_data(
        calibration,
        model_inputs(loaded.model),
        tokenizer=tokenizer,
        batch_size=spec.batch_size,
        max_samples=spec.max_samples,
        max_length=spec.max_length,
        seed=recipe.seed,
    )


def _stages(job: _Job) -> Iterator[tuple[list[Planned], Collected | None, SequentialCalibration | None]]:
    """The weights in portions, each with the statistics that its solver needs."""
    stages = Stages(job.loaded, job.data, job.threads, job.progress)
    if job.data is not None and job.recipe.calibration.sequential:
        yield from stages.in_sequence(job.plan.planned)
        return
    for portion, collected in stages.portions(job.plan.planned, lambda item: item.statistics_level):
        yield portion, collected, None


def _solve_and_write(job: _Job, writer: StreamingWriter, store: ResumeStore, started: float) -> QuantizeReport:
    model = job.loaded.model
    assignments: list[Assignment] = []
    records: list[WeightRecord] = []
    shared: dict[str, ir.Value] = {}
    notes = [*job.plan.notes]
    if store.found:
        notes.append(f"went on from an interrupted run: {store.found} weights were solved already")
    distillation = job.recipe.distillation
    if distillation is not None and job.data is None:
        notes.append("no calibration data: nothing was distilled")
        distillation = None
    # Scales are final only when all weights are solved: until then the encodings wait, a byte for each weight.
    waiting: list[tuple[Planned, Solved, float]] = []

    def write(item: Planned, solved: Solved, seconds: float) -> None:
        assignment, written, note = _store(item, solved, job, writer, shared)
        assignments.append(assignment)
        records.append(_record(item, solved, assignment, written, note, seconds))

    order = {item.weight.name: index for index, item in enumerate(job.plan.planned)}
    for portion, collected, sequence in _stages(job):
        if collected is not None:
            notes += [note for note in collected.notes if note not in notes]
        job.progress.start("solving", len(portion))
        for item in portion:
            began = time.monotonic()
            statistics = None if collected is None else statistics_of(item.weight, collected)
            solved = solve_weight(item, statistics, store)
            if sequence is not None:
                for name, array in dequantized_roots(item.weight, solved.encodings).items():
                    sequence.replace(name, array)
            seconds = time.monotonic() - began
            if distillation is None:
                write(item, solved, seconds)
            else:
                waiting.append((item, solved, seconds))
            job.progress.advance(1, item.weight.name)
    if distillation is not None:
        assert job.data is not None
        pairs = [(item, solved) for item, solved, _ in waiting]
        changed, said = distil_solved(job.loaded, pairs, job.data, distillation, job.recipe.seed, job.progress)
        notes += said
        for (item, _, seconds), solved in zip(waiting, changed, strict=True):
            write(item, solved, seconds)
    records.sort(key=lambda record: order[record.name])
    if shared:
        common = sum(value.const_value.nbytes for value in shared.values() if value.const_value is not None)
        notes.append(f"frames and tables that weights share take {common:,} bytes, counted with none of them")
    job.progress.start("writing", None)
    report = _report(job, writer.path, tuple(records), tuple(notes), started, written=0)
    RewriteSitesPass(assignments)(model)
    model.metadata_props[RECIPE_PROPERTY] = job.recipe.to_yaml()
    model.metadata_props[REPORT_PROPERTY] = report.to_json()
    saved = writer.finish(model)
    check = None
    if job.data is not None:
        job.progress.start("checking", None)
        check = check_outputs(job.loaded.path, saved.path, job.data, job.threads)
    return dataclasses.replace(
        report.as_written(saved.bytes),
        seconds=time.monotonic() - started,
        peak_memory=peak_bytes() or 0,
        check=check,
    )


def _store(
    item: Planned, solved: Solved, job: _Job, writer: StreamingWriter, shared: dict[str, ir.Value]
) -> tuple[Assignment, int, str]:
    """Writes the arrays of a weight, and of those that weights share the ones not in `shared` yet.

    Returns:
        What stands for it, the bytes of what is its alone, and what the report should say.
    """
    weight = item.weight
    parts, written, notes = [], 0, []

    def append(name: str, array: np.ndarray) -> ir.Value:
        tensor = writer.append(name, array)
        return ir.Value(
            name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy())
        )

    for index, encoding in enumerate(solved.encodings):
        form, note = choose_form(
            encoding,
            stock=job.recipe.target == "stock",
            opset=job.loaded.opset,
            readers=Readers.of(weight.sites),
            accuracy_level=item.accuracy_level,
        )
        prefix = weight.name if weight.batch == 1 else f"{weight.name}.{index}"
        arrays = form.arrays(encoding)
        tensors = {role: append(f"{prefix}.{role}", array) for role, array in arrays.items()}
        written += sum(value.const_value.nbytes for value in tensors.values() if value.const_value is not None)
        for role, common in form.shared_arrays(encoding).items():
            if common.name not in shared:
                shared[common.name] = append(common.name, common.array)
            tensors[role] = shared[common.name]
        parts.append(StoredWeight(prefix, form, encoding.shape, form.attributes(encoding), tensors))
        notes.append(note)
    return Assignment(weight, tuple(parts)), written, "; ".join(dict.fromkeys(note for note in notes if note))


def _record(
    item: Planned, solved: Solved, assignment: Assignment, written: int, note: str, seconds: float
) -> WeightRecord:
    weight = item.weight
    said = "; ".join(text for text in (item.note, solved.note, note) if text)
    return WeightRecord(
        name=weight.name,
        kinds=weight.kinds,
        sites=len(weight.sites),
        shape=(weight.batch * weight.n, weight.k),
        format=" and ".join(dict.fromkeys(encoding.format.label() for encoding in solved.encodings)),
        form=assignment.parts[0].form.name,
        solver=solved.solver,
        source_bytes=weight.bytes,
        bytes=written,
        relative_error=solved.relative_error,
        proxy_loss=solved.proxy_loss,
        note=said,
        seconds=seconds,
    )


def _planned_report(job: _Job, out: Path, started: float) -> QuantizeReport:
    records = tuple(
        WeightRecord(
            name=item.weight.name,
            kinds=item.weight.kinds,
            sites=len(item.weight.sites),
            shape=(item.weight.batch * item.weight.n, item.weight.k),
            format=item.label,
            form="planned",
            solver=item.solver.name,
            source_bytes=item.weight.bytes,
            bytes=item.cost_bits // 8,
            relative_error=None,
            proxy_loss=None,
            note=item.note,
            seconds=0.0,
        )
        for item in job.plan.planned
    )
    job.progress.finish()
    kept = sum(record.bytes for record in job.plan.kept)
    return _report(job, out, records, job.plan.notes, started, written=kept + sum(record.bytes for record in records))


def _report(
    job: _Job, out: Path, records: tuple[WeightRecord, ...], notes: tuple[str, ...], started: float, written: int
) -> QuantizeReport:
    data = job.data
    return QuantizeReport(
        source=job.loaded.path.name,
        output=out.name,
        source_bytes=job.loaded.bytes_on_disk,
        bytes=written,
        version=__version__,
        recipe=job.recipe.to_dict(),
        # The name alone: a written model tells nothing of the machine it was made on.
        calibration="" if data is None else f"{data.samples} samples of {Path(data.name).name}",
        weights=records,
        kept=job.plan.kept,
        notes=tuple(notes) + (() if data is None else (*data.notes, *data.casts)),
        seconds=time.monotonic() - started,
        peak_memory=peak_bytes() or 0,
        budget=job.budget,
    )
