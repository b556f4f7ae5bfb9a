"""What a retraining does: its phases, and what they share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from onnxq.solvers.binary import ROUNDS, BinaryFit
from onnxq.train.targets import Target

Mode = Literal["project", "scales", "straight-through"]


@dataclasses.dataclass(frozen=True, eq=False)
class Phase:
    """One stretch of training with a fresh optimizer, at whose end the targets are projected.

    Modes:
        "project": the paper's. All parameters are trained as floats, and every `period` steps the targets become what
            their codes decode to, from where training goes on.
        "scales": codes stay; scales and offsets, and the model's vectors (biases, norms), are trained. After rounding
            alone, or as the last stretch. Other matrices stay.
        "straight-through": in every step the targets are the nearest levels to floats behind them, which get the
            gradients of their levels; scales are trained too. Takes fewer steps than "project" at 1 and 2 planes.

    Attributes:
        targets: rules, see `Target`; all that is stored in codes from here on, not only what this phase adds.
        steps: batches.
        mode: see above.
        rate: the highest learning rate, of floats.
        scale_rate: that of the logarithms of scales: 0.001 is about 0.1 percent a step.
        period: steps between projections of "project" (pNR).
        validate_every: steps between validations; None is `period`.
        warm_up: share of the steps in which rates rise from 0; after it they fall to 0 on a cosine.
        name: for reports.
    """

    targets: Sequence[Target]
    steps: int
    mode: Mode = "project"
    rate: float = 2e-4
    scale_rate: float = 1e-3
    period: int = 1000
    validate_every: int | None = None
    warm_up: float = 0.05
    name: str = ""

    def __post_init__(self) -> None:
        if self.mode not in ("project", "scales", "straight-through"):
            raise ValueError(f"mode is {self.mode!r}; it must be project, scales or straight-through")
        if self.steps < 0 or self.period < 1 or (self.validate_every is not None and self.validate_every < 1):
            raise ValueError(
                f"steps must be 0 or more, period and validate_every 1 or more, not {self.steps}, {self.period} and "
                f"{self.validate_every}"
            )
        if self.rate < 0 or self.scale_rate < 0 or not 0 <= self.warm_up < 1:
            raise ValueError("rates must not be negative, and warm_up is a share from 0 to below 1")

    def share_of_rate(self, step: int) -> float:
        """By what rates are multiplied in a step, counted from 0."""
        rise = self.warm_up * self.steps
        if step < rise:
            return (step + 1) / (rise + 1)
        return (1 + math.cos(math.pi * (step - rise) / max(self.steps - rise, 1))) / 2


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """What all phases share.

    Attributes:
        seed: of dropout and whatever else draws from torch's generator in a step.
        clip: largest norm of a step's gradient.
        betas: of AdamW.
        weight_decay: of floats, not of scales.
        solver: how signs and scales are found.
        rounds: of the alternating solver.
        checkpoint_every: steps between checkpoints.
    """

    seed: int = 0
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    solver: BinaryFit = BinaryFit.ALTERNATING
    rounds: int = ROUNDS
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        if not self.clip > 0 or self.checkpoint_every < 1:
            raise ValueError(
                f"clip must be above 0 and checkpoint_every 1 or more: {self.clip}, {self.checkpoint_every}"
            )


def growing_phases(blocks: Sequence[Sequence[Target]], phase: Phase) -> list[Phase]:
    """The paper's schedule: each phase stores one block more, such as embedding, + decoder, + encoder.

    Args:
        blocks: rules of each block, in the order in which they are added.
        phase: what all phases do; its targets are left out.
    """
    phases = []
    for count in range(1, len(blocks) + 1):
        targets = [target for block in blocks[:count] for target in block]
        phases.append(dataclasses.replace(phase, targets=targets, name=f"{phase.name} {count}".strip()))
    return phases
