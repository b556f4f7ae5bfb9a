"""`retrain`: train a module phase by phase towards the values that its codes can hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from onnxq.errors import TrainingError
from onnxq.formats.binary import BinaryEncoding
from onnxq.progress import NullProgress, Progress
from onnxq.train import checkpoint as files
from onnxq.train.checkpoint import Best, State
from onnxq.train.phases import Phase, TrainSettings
from onnxq.train.students import Student, clip, groups_of, student_of

Batch = TypeVar("Batch")
_SEEDS_APART = 1_000_003
"""Between the seeds of two runs: their steps don't draw the same numbers."""


@dataclasses.dataclass(frozen=True)
class Validation:
    """What a projected model came to.

    Attributes:
        phase: number of the phase.
        step: how many of its steps were done.
        loss: what `validate` returned.
        training: mean loss of the training batches since the validation before; NaN where there were none.
    """

    phase: int
    step: int
    loss: float
    training: float


@dataclasses.dataclass(frozen=True, eq=False)
class Retrained:
    """The result; the module holds it too.

    Attributes:
        encodings: of all targets of the last phase, by parameter name; they decode to what the module holds.
        history: all validations, in order.
        loss: the least validation loss of the last phase, which the result has; None without validation.
    """

    encodings: Mapping[str, BinaryEncoding]
    history: tuple[Validation, ...]
    loss: float | None


def retrain(
    module: nn.Module,
    phases: Sequence[Phase],
    batch_of: Callable[[int], Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    *,
    validate: Callable[[nn.Module], float] | None = None,
    settings: TrainSettings | None = None,
    known: Mapping[str, BinaryEncoding] | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Retrained:
    """Trains a module in place, and leaves it with exactly the values of the encodings that are returned.

    Every phase begins and ends with a validation of the projected weights, and hands its best to the next one. So a
    phase never makes its own start worse, by the measure that `validate` is. With the same arguments a stopped run
    goes on from its checkpoint as if it had not stopped.

    Memory, besides the module and its gradients: two moments a trained value, a copy for the best, a second one during
    validations, and in mode "straight-through" the floats behind the targets.

    Args:
        module: float32, on the CPU.
        phases: in order, at least one.
        batch_of: the batch of a step, counted from 0 through all phases. The same for the same step.
        loss: differentiable, a scalar.
        validate: what counts, less is better; called in evaluation mode and without gradients. None keeps the last.
        settings: see `TrainSettings`.
        known: encodings that the module's weights have already, by name: codes for mode "scales".
        checkpoint: a file that is written now and then, and that training goes on from where it is there. It stays
            when all is done, so the same call returns at once: remove it to train anew.
        progress: follows the run.

    Raises:
        TrainingError: a rule does not suit, a loss is not finite, or the checkpoint is of another training.
    """
    if not phases:
        raise TrainingError("There are no phases, so nothing says what to store. `project` rounds without training.")
    run: _Run[Batch] = _Run(
        module, phases, settings or TrainSettings(), validate, None if checkpoint is None else Path(checkpoint)
    )
    was_training = module.training
    progress = progress or NullProgress()
    try:
        return run(batch_of, loss, known or {}, progress)
    finally:
        progress.finish()
        module.train(was_training)


class _Run(Generic[Batch]):
    def __init__(
        self,
        module: nn.Module,
        phases: Sequence[Phase],
        settings: TrainSettings,
        validate: Callable[[nn.Module], float] | None,
        checkpoint: Path | None,
    ) -> None:
        self._module, self._phases, self._settings = module, phases, settings
        self._validate, self._checkpoint = validate, checkpoint
        self._identity = files.fingerprint(phases, settings)
        self._history: list[Validation] = []
        self._best: Best | None = None
        self._losses: tuple[float, int] = (0.0, 0)

    def __call__(
        self,
        batch_of: Callable[[int], Batch],
        loss: Callable[[nn.Module, Batch], Tensor],
        known: Mapping[str, BinaryEncoding],
        progress: Progress,
    ) -> Retrained:
        resumed = None if self._checkpoint is None else files.load(self._checkpoint, self._identity)
        floats: Mapping[str, Tensor] = {}
        if resumed is not None:
            known, floats = resumed.known, resumed.floats
            self._history = [Validation(int(p), int(s), *rest) for p, s, *rest in resumed.history]
            self._best, self._losses = resumed.best, resumed.losses
            self._put_module(resumed.module)
        for number, phase in enumerate(self._phases):
            if resumed is not None and number < resumed.phase:
                continue
            first = resumed.step if resumed is not None and number == resumed.phase else 0
            student = student_of(self._module, phase, self._settings, known, floats)
            optimizer = torch.optim.AdamW(groups_of(student, self._settings), betas=self._settings.betas)
            if first and resumed is not None:
                _restore(student, optimizer, resumed)
            else:
                self._offer(student, number, 0)
            progress.start(f"retraining: {phase.name or phase.mode}", phase.steps)
            progress.advance(first)
            done_before = sum(phase.steps for phase in self._phases[:number])
            every = phase.validate_every or phase.period
            for step in range(first, phase.steps):
                value = self._step(student, optimizer, step, batch_of(done_before + step), loss, done_before)
                progress.advance(1, f"loss {value:.4f}")
                done = step + 1
                if done == phase.steps:
                    break
                if phase.mode == "project" and done % phase.period == 0:
                    student.project(settle=True)
                if self._validate is not None and done % every == 0:
                    self._offer(student, number, done)
                if done % self._settings.checkpoint_every == 0:
                    self._save(number, done, student, optimizer, floats)
            self._end(student, number)
            assert self._best is not None, "a phase ends with a model"
            known, floats = self._best.encodings, self._best.floats
            self._save(number + 1, 0, None, None, floats, known)
            if number + 1 < len(self._phases):
                self._best = None
        assert self._best is not None, "a phase ends with a model"
        return Retrained(self._best.encodings, tuple(self._history), self._best.loss)

    def _step(
        self,
        student: Student,
        optimizer: torch.optim.Optimizer,
        step: int,
        batch: Batch,
        loss: Callable[[nn.Module, Batch], Tensor],
        done_before: int,
    ) -> float:
        phase = student.phase
        self._module.train()
        self._module.zero_grad(set_to_none=True)
        optimizer.zero_grad(set_to_none=True)
        student.load()
        # What a step draws does not depend on where the run was stopped, nor on the caller's generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._settings.seed * _SEEDS_APART + done_before + step)
            found = loss(self._module, batch)
            value = float(found.detach())
            if not math.isfinite(value):
                raise TrainingError(
                    f"The loss of step {step} of phase {phase.name or phase.mode!r} is {value}: the rates are too high "
                    f"({phase.rate}, of scales {phase.scale_rate}), or a batch holds what is not finite."
                )
            found.backward()  # type: ignore[no-untyped-call]
        student.collect()
        clip(list(student.leaves().values()), self._settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = group["highest"] * phase.share_of_rate(step)
        optimizer.step()
        self._losses = self._losses[0] + value, self._losses[1] + 1
        return value

    def _offer(self, student: Student, number: int, step: int) -> None:
        """Validates the projected weights, keeps them if they are the best, and puts the others back."""
        if self._validate is None:
            return
        before = {each.name: each.parameter.detach().clone() for each in student.chosen}
        self._consider(student.project(settle=False), student, number, step)
        with torch.no_grad():
            for each in student.chosen:
                each.parameter.copy_(before[each.name])

    def _consider(self, encodings: dict[str, BinaryEncoding], student: Student, number: int, step: int) -> None:
        found = None
        if self._validate is not None:
            self._module.eval()
            with torch.no_grad():
                found = float(self._validate(self._module))
            total, count = self._losses
            self._losses = 0.0, 0
            self._history.append(Validation(number, step, found, total / count if count else math.nan))
        best = None if self._best is None else self._best.loss
        if best is None or found is None or found < best:
            self._best = Best(found, self._copy_module(), dict(encodings), student.floats())

    def _end(self, student: Student, number: int) -> None:
        """The phase's last projection; the module takes the best."""
        self._consider(student.project(settle=True), student, number, student.phase.steps)
        assert self._best is not None, "a phase ends with a model"
        self._put_module(self._best.module)

    def _save(
        self,
        number: int,
        step: int,
        student: Student | None,
        optimizer: torch.optim.Optimizer | None,
        floats: Mapping[str, Tensor],
        known: Mapping[str, BinaryEncoding] | None = None,
    ) -> None:
        if self._checkpoint is None:
            return
        leaves = {} if student is None else student.leaves()
        moments = {} if optimizer is None else {name: dict(optimizer.state[leaf]) for name, leaf in leaves.items()}
        encodings = known if student is None else student.known
        last = number == len(self._phases)
        state = State(
            number,
            step,
            self._copy_module(),
            leaves,
            moments,
            dict(encodings or {}),
            dict(floats),
            self._best if step or last else None,
            [[v.phase, v.step, v.loss, v.training] for v in self._history],
            self._losses,
        )
        files.save(self._checkpoint, state, self._identity)

    def _copy_module(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in _tensors_of(self._module).items()}

    def _put_module(self, tensors: Mapping[str, Tensor]) -> None:
        own = _tensors_of(self._module)
        if own.keys() != tensors.keys() or any(own[name].shape != tensors[name].shape for name in own):
            raise TrainingError(f"{self._checkpoint} is a checkpoint of another module. Remove it to start anew.")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, tied ones once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _restore(student: Student, optimizer: torch.optim.Optimizer, state: State) -> None:
    with torch.no_grad():
        for name, leaf in student.leaves().items():
            leaf.copy_(state.leaves[name])
            # A leaf that no loss has reached yet has no moments.
            if name in state.optimizer:
                optimizer.state[leaf] = dict(state.optimizer[name])
