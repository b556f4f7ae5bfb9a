"""`distil`: train the scales, biases and norms of a quantised model towards the float model's outputs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from onnxq.backprop import TorchGraph, missing_ops
from onnxq.backprop.threads import torch_threads
from onnxq.calibration import CalibrationData
from onnxq.calibration.inputs import Feed
from onnxq.distillation.objective import Objective
from onnxq.distillation.result import Distillation
from onnxq.distillation.settings import DistillationSettings
from onnxq.distillation.student import Student
from onnxq.distillation.vectors import layer_biases, norm_parameters
from onnxq.distillation.weights import DecodedWeight
from onnxq.errors import CalibrationError, ModelError
from onnxq.graph import LoadedModel
from onnxq.progress import NullProgress, Progress


def distil(
    loaded: LoadedModel,
    weights: Sequence[DecodedWeight],
    data: CalibrationData,
    settings: DistillationSettings | None = None,
    *,
    progress: Progress | None = None,
) -> Distillation:
    """Train what surrounds the codes of a quantised model; codes stay.

    Memory, besides the model's map: for every weight 1 byte of codes and, during a step, 4 bytes decoded (5 in all per
    weight of the quantised layers); 20 bytes per scale (start, factor, gradient, two moments of AdamW); the activations
    of one batch; the feeds; and up to ``settings.cache_bytes`` of the float model's outputs.

    Time: a step costs about three runs of the float model on a batch, plus two passes over the decoded weights; the
    float model runs once per batch more, or once more per step where its outputs outgrow the cache.

    Args:
        loaded: the float model; not changed.
        weights: what stands for its weights, found in this very model. Others stay float.
        data: at least two batches.
        settings: see `DistillationSettings`.
        progress: follows the run.

    Returns:
        The new numbers if the loss on held-out batches fell, else the old ones.

    Raises:
        ModelError: the model holds operators without a gradient, or nothing to train.
        CalibrationError: fewer than two batches.
    """
    started = time.monotonic()
    settings, progress = settings or DistillationSettings(), progress or NullProgress()
    require_distillable(loaded, data)
    graph = TorchGraph(loaded)
    vectors, notes = _vectors(graph, weights, settings)
    student = Student(graph, weights, vectors, settings.per)
    if not student.factors and not student.shifts:
        raise ModelError("There is nothing to distil: no weight is to be trained, and no bias or norm was found.")
    train, held_out = _divide(list(data), settings.held_out, settings.seed)
    with torch_threads(settings.threads):
        lesson = _Lesson(graph, student, Objective(graph, settings.outputs), settings.cache_bytes)
        progress.start("distilling", settings.steps)
        before = lesson.held_out_loss(held_out)
        losses = _train(student, lesson, train, settings, progress)
        after = lesson.held_out_loss(held_out)
    kept = math.isfinite(after) and after < before
    if not kept:
        notes.append(f"the held-out loss did not fall ({before:.4g} to {after:.4g}): nothing was changed")
    return Distillation(
        kept=kept,
        scales=student.stored_scales() if kept else _given(weights),
        initializers=student.stored_vectors() if kept else {},
        before=before,
        after=after,
        training=tuple(losses),
        samples=(len(train), len(held_out)),
        trained=(
            sum(factor.numel() for parts in student.factors for factor in parts),
            sum(shift.numel() for shift in student.shifts.values()),
        ),
        seconds=time.monotonic() - started,
        notes=tuple(notes),
    )


def require_distillable(loaded: LoadedModel, data: CalibrationData) -> None:
    """Refuses what can't be distilled, before hours of other work.

    Raises:
        ModelError: the model holds operators without a gradient.
        CalibrationError: fewer than two batches.
    """
    if missing := missing_ops(loaded.model):
        ops = ", ".join(f"{item.op} ('{item.nodes[0]}')" for item in missing)
        raise ModelError(f"{loaded.path} can't be distilled: no gradient is known for {ops}. Leave distillation out.")
    if data.batches < 2:
        raise CalibrationError(
            f"{data.name} has {data.batches} batch: distillation needs at least two, one of them to decide with. Give "
            "more samples, or a smaller batch size."
        )


class _Lesson:
    """Compares the student with the float model, whose outputs are kept for as long as they fit."""

    def __init__(self, graph: TorchGraph, student: Student, objective: Objective, cache_bytes: int) -> None:
        self._graph, self._student, self._objective = graph, student, objective
        self._room = cache_bytes
        self._known: dict[int, dict[str, Tensor]] = {}

    def loss(self, number: int, feed: Feed) -> Tensor:
        """Differentiable; ``number`` tells the batch from others."""
        found = self._student.run(feed, self._objective.outputs)
        return self._objective.loss(found, self._wanted(number, feed), feed)

    def held_out_loss(self, batches: Sequence[tuple[int, Feed]]) -> float:
        """Mean loss of the student as it would be stored."""
        losses = []
        with torch.no_grad():
            for number, feed in batches:
                found = self._student.run_stored(feed, self._objective.outputs)
                losses.append(float(self._objective.loss(found, self._wanted(number, feed), feed)))
        return float(np.mean(losses))

    def _wanted(self, number: int, feed: Feed) -> dict[str, Tensor]:
        if number in self._known:
            return self._known[number]
        with torch.no_grad():
            wanted = self._graph.run(feed, outputs=self._objective.outputs)
        size = sum(tensor.nbytes for tensor in wanted.values())
        if size <= self._room:
            self._room -= size
            self._known[number] = wanted
        return wanted


def _train(
    student: Student,
    lesson: _Lesson,
    batches: Sequence[tuple[int, Feed]],
    settings: DistillationSettings,
    progress: Progress,
) -> list[float]:
    scales = [factor for parts in student.factors for factor in parts]
    shifts = list(student.shifts.values())
    groups = [{"params": scales, "lr": settings.scale_rate}, {"params": shifts, "lr": settings.vector_rate}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=settings.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    order = _order(len(batches), settings.seed)
    losses: list[float] = []
    for _ in range(settings.steps):
        loss = lesson.loss(*batches[next(order)])
        losses.append(float(loss.detach()))
        if math.isfinite(losses[-1]):  # a batch of another kind must not spoil the rest
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_([*scales, *shifts], settings.clip)
            optimizer.step()
        schedule.step()
        progress.advance(1, f"loss {losses[-1]:.4g}")
    return losses


def _rate(step: int, settings: DistillationSettings) -> float:
    """The share of the learning rate at a step: a line up, then half a cosine down."""
    up = round(settings.warm_up * settings.steps)
    if step < up:
        return (step + 1) / (up + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - up) / max(settings.steps - up, 1)))


def _order(count: int, seed: int) -> Iterator[int]:
    """Batch numbers without end: all of them in random order, again and again."""
    rng = np.random.default_rng(seed)
    while True:
        yield from (int(index) for index in rng.permutation(count))


def _divide(feeds: list[Feed], share: float, seed: int) -> tuple[list[tuple[int, Feed]], list[tuple[int, Feed]]]:
    """Numbered batches for training and for the decision."""
    count = min(max(round(share * len(feeds)), 1), len(feeds) - 1)
    chosen = set(np.random.default_rng([seed, 1]).choice(len(feeds), count, replace=False).tolist())
    numbered = list(enumerate(feeds))
    return [b for b in numbered if b[0] not in chosen], [b for b in numbered if b[0] in chosen]


def _vectors(
    graph: TorchGraph, weights: Sequence[DecodedWeight], settings: DistillationSettings
) -> tuple[list[ir.Value], list[str]]:
    """What to train beside scales, and notes on what can't be reached."""
    found: dict[ir.Value, None] = {}
    if settings.biases:
        found.update(dict.fromkeys(layer_biases(site for item in weights for site in item.weight.sites)))
    if settings.norms:
        found.update(dict.fromkeys(norm_parameters(graph.model)))
    reached, notes = [], []
    for value in found:
        try:
            graph.key(value)
            reached.append(value)
        except ModelError as error:
            notes.append(f"'{value.name}' was not trained: {error}")
    return reached, notes


def _given(weights: Sequence[DecodedWeight]) -> dict[str, tuple[np.ndarray, ...]]:
    return {item.weight.name: tuple(part.scales for part in item.parts) for item in weights if item.trained}
