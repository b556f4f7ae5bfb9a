"""The report's records, from what the pipeline knows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from onnxq.evaluation.load_probe import peak_bytes
from onnxq.passes.forms import StoredWeight
from onnxq.pipeline.job import Job
from onnxq.pipeline.plan import Planned
from onnxq.pipeline.solve import Solved
from onnxq.report.records import KeptRecord, QuantizeReport, WeightRecord
from onnxq.version import __version__


def weight_record(
    item: Planned,
    solved: Solved,
    parts: Sequence[StoredWeight],
    written: int,
    notes: Sequence[str],
    snr: float | None,
    seconds: float,
) -> WeightRecord:
    """What became of a weight.

    Args:
        item, solved: how it was solved.
        parts: what stands for it.
        written: bytes of what is its alone.
        notes: what is to be said beside what plan and solver say.
        snr: of its products, in dB, where it was measured.
        seconds: that solving took.
    """
    weight = item.weight
    said = "; ".join(text for text in (item.note, solved.note, *notes) if text)
    return WeightRecord(
        name=weight.name,
        kinds=weight.own_kinds,
        sites=len(weight.sites),
        shape=(weight.batch * weight.n, weight.k),
        format=" and ".join(dict.fromkeys(encoding.format.label() for encoding in solved.encodings)),
        form=parts[0].form.name,
        solver=solved.solver,
        source_bytes=weight.bytes,
        bytes=written,
        relative_error=solved.relative_error,
        proxy_loss=solved.proxy_loss,
        note=said,
        seconds=seconds,
        snr=snr,
    )


def planned_report(job: Job, out: Path, started: float) -> QuantizeReport:
    """The report of a plan: nothing is solved, and nothing written."""
    records = tuple(
        WeightRecord(
            name=item.weight.name,
            kinds=item.weight.own_kinds,
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
    size = sum(record.bytes for record in job.plan.kept) + sum(record.bytes for record in records)
    return make_report(job, out, records, job.plan.notes, started, written=size)


def make_report(
    job: Job,
    out: Path,
    records: tuple[WeightRecord, ...],
    notes: tuple[str, ...],
    started: float,
    written: int,
    kept: Sequence[KeptRecord] = (),
) -> QuantizeReport:
    """The report of a run.

    Args:
        job: what was run.
        out: the file.
        records, notes: what became of weights, and of the whole.
        started: when, by the monotonic clock.
        written: bytes of the files.
        kept: weights that turned out better left as they are, beside those of the plan.
    """
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
        kept=(*job.plan.kept, *kept),
        notes=tuple(notes) + (() if data is None else (*data.notes, *data.casts)),
        seconds=time.monotonic() - started,
        peak_memory=peak_bytes() or 0,
        budget=job.budget,
    )
