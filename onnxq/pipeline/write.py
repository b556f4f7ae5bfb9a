"""From a plan to the written model: solve weight by weight, store, rewrite, check, report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxq.calibration import Collected, SequentialCalibration
from onnxq.evaluation.load_probe import peak_bytes
from onnxq.graph import StreamingWriter
from onnxq.passes.forms import Readers, StoredWeight, choose_form
from onnxq.passes.rewrite import Assignment, RewriteSitesPass
from onnxq.pipeline.check import check_outputs
from onnxq.pipeline.distil import distil_solved
from onnxq.pipeline.inputs import InputPlans, Inputs, plan_inputs
from onnxq.pipeline.job import Job
from onnxq.pipeline.plan import Planned
from onnxq.pipeline.records import make_report, weight_record
from onnxq.pipeline.resume import ResumeStore
from onnxq.pipeline.solve import Solved, dequantized_roots, solve_weight, statistics_of
from onnxq.report.records import REPORT_PROPERTY, KeptRecord, QuantizeReport, WeightRecord

RECIPE_PROPERTY = "onnxq.recipe"
"""Metadata key of a written model that holds its recipe."""


@dataclasses.dataclass(frozen=True)
class Draft:
    """A model that is written, but not yet where it belongs.

    Attributes:
        job: what it came of.
        writer: holds its files.
        report: what became of its weights, sizes not counted.
        bytes: of its files.
        started: when the run began, by the monotonic clock.
    """

    job: Job
    writer: StreamingWriter
    report: QuantizeReport
    bytes: int
    started: float

    @property
    def beside_weights(self) -> int:
        """Bytes of what is no weight."""
        return self.bytes - sum(weight.bytes for weight in self.report.weights)

    def publish(self) -> QuantizeReport:
        """Puts the files in place and runs the model beside its source."""
        job = self.job
        saved = self.writer.publish()
        check = None
        if job.data is not None:
            job.progress.start("checking", None)
            check = check_outputs(job.loaded.path, saved.path, job.data, job.threads)
        return dataclasses.replace(
            self.report.as_written(saved.bytes),
            seconds=time.monotonic() - self.started,
            peak_memory=peak_bytes() or 0,
            check=check,
        )


def solve_and_write(job: Job, writer: StreamingWriter, store: ResumeStore, started: float) -> Draft:
    """Carries out a plan. Weights are written as they are solved; the model comes last, and is left unpublished."""
    model = job.loaded.model
    output = _Output(job, writer, plan_inputs(job.plan.planned, job.recipe, job.stages))
    notes = [*job.plan.notes]
    if store.found:
        notes.append(f"went on from an interrupted run: {store.found} weights were solved already")
    distillation = job.recipe.distillation
    if distillation is not None and job.data is None:
        notes.append("no calibration data: nothing was distilled")
        distillation = None
    # Scales are final only when all weights are solved: until then the encodings wait, a byte for each weight.
    waiting: list[tuple[Planned, Solved, float]] = []
    for portion, collected, sequence in _stages(job):
        if collected is not None:
            notes += [note for note in collected.notes if note not in notes]
        job.progress.start("solving", len(portion))
        for item in portion:
            began = time.monotonic()
            statistics = None if collected is None else statistics_of(item.weight, collected)
            solved = solve_weight(item, statistics, store, job.trained)
            if sequence is not None:
                for name, array in dequantized_roots(item.weight, solved.encodings).items():
                    sequence.replace(name, array)
            seconds = time.monotonic() - began
            if distillation is None:
                output.add(item, solved, seconds)
            else:
                waiting.append((item, solved, seconds))
            job.progress.advance(1, item.weight.name)
    if distillation is not None:
        assert job.data is not None
        pairs = [(item, solved) for item, solved, _ in waiting]
        changed, said = distil_solved(job.loaded, pairs, job.data, distillation, job.recipe.seed, job.progress)
        notes += said
        for (item, _, seconds), solved in zip(waiting, changed, strict=True):
            output.add(item, solved, seconds)
    notes += output.notes()
    job.progress.start("writing", None)
    report = make_report(job, writer.path, output.in_order(), tuple(notes), started, written=0, kept=output.kept)
    output.rewrite(model)
    model.metadata_props[RECIPE_PROPERTY] = job.recipe.to_yaml()
    model.metadata_props[REPORT_PROPERTY] = report.to_json()
    return Draft(job, writer, report, writer.prepare(model), started)


def _stages(job: Job) -> Iterator[tuple[list[Planned], Collected | None, SequentialCalibration | None]]:
    """The weights in portions, each with the statistics that its solver needs."""
    if job.data is not None and job.recipe.calibration.sequential:
        yield from job.stages.in_sequence(job.plan.planned)
        return
    for portion, collected in job.stages.portions(job.plan.planned, lambda item: item.statistics_level):
        yield portion, collected, None


class _Output:
    """What solved weights become."""

    def __init__(self, job: Job, writer: StreamingWriter, inputs: InputPlans) -> None:
        self._job = job
        self._writer = writer
        self._inputs = inputs
        self._assignments: list[Assignment] = []
        self._records: list[WeightRecord] = []
        self._shared: dict[str, ir.Value] = {}
        self.kept: list[KeptRecord] = []

    def add(self, item: Planned, solved: Solved, seconds: float) -> None:
        """Writes a weight's arrays, unless its products came out too noisy."""
        inputs = self._inputs.of(item)
        snr = inputs.snr(item, solved)
        least = item.recipe.linear.min_snr
        if snr is not None and least is not None and snr < least:
            weight = item.weight
            reason = f"its products came out at {snr:.1f} dB, below min_snr {least:g}"
            self.kept.append(KeptRecord(weight.name, tuple(weight.shape), weight.dtype.name, weight.bytes, reason))
            return
        parts, written, note = self._store(item, solved, inputs)
        self._assignments.append(Assignment(item.weight, parts, inputs.rounding))
        rounding = "" if inputs.rounding is None else f"inputs {inputs.rounding.name}"
        said = [note, rounding, "" if snr is None else f"products {snr:.1f} dB"]
        self._records.append(weight_record(item, solved, parts, written, said, snr, seconds))

    def notes(self) -> list[str]:
        """Sentences that no single weight owns."""
        notes = []
        if self._shared:
            common = sum(value.const_value.nbytes for value in self._shared.values() if value.const_value is not None)
            notes.append(f"frames and tables that weights share take {common:,} bytes, counted with none of them")
        if self._inputs.attention:
            notes.append(f"{self._inputs.attention} inputs of attention's products are rounded")
        return notes

    def in_order(self) -> tuple[WeightRecord, ...]:
        """The records in the order of the plan."""
        order = {item.weight.name: index for index, item in enumerate(self._job.plan.planned)}
        return tuple(sorted(self._records, key=lambda record: order[record.name]))

    def rewrite(self, model: ir.Model) -> None:
        """Puts the stored weights and the roundings into the model."""
        RewriteSitesPass(self._assignments)(model)
        self._inputs.round_attention(model)

    def _store(self, item: Planned, solved: Solved, inputs: Inputs) -> tuple[tuple[StoredWeight, ...], int, str]:
        """Writes the arrays of a weight, and of those that weights share the ones that are not there yet.

        Returns:
            What stands for it, the bytes of what is its alone, and what the report should say.
        """
        weight = item.weight
        parts, written, notes = [], 0, []
        for index, encoding in enumerate(solved.encodings):
            form, note = choose_form(
                encoding,
                stock=self._job.recipe.target == "stock",
                opset=self._job.loaded.opset,
                readers=Readers.of(weight.sites),
                accuracy_level=item.accuracy_level,
                rounded=inputs.rounded,
            )
            prefix = weight.name if weight.batch == 1 else f"{weight.name}.{index}"
            arrays = form.arrays(encoding)
            tensors = {role: self._append(f"{prefix}.{role}", array) for role, array in arrays.items()}
            written += sum(value.const_value.nbytes for value in tensors.values() if value.const_value is not None)
            for role, common in form.shared_arrays(encoding).items():
                if common.name not in self._shared:
                    self._shared[common.name] = self._append(common.name, common.array)
                tensors[role] = self._shared[common.name]
            parts.append(StoredWeight(prefix, form, encoding.shape, form.attributes(encoding), tensors))
            notes.append(note)
        return tuple(parts), written, "; ".join(dict.fromkeys(note for note in notes if note))

    def _append(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = self._writer.append(name, array)
        return ir.Value(
            name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy())
        )
