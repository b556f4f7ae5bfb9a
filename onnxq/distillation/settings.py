"""What a distillation does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DistillationSettings:
    """How to train. The defaults suit a few hundred samples of a small transformer.

    Attributes:
        steps: batches seen; the data is gone through as often as that takes.
        scale_rate: learning rate of the logarithms of the scales: 0.01 is about one percent a step at most.
        vector_rate: learning rate of biases and norms, in units of each vector's root mean square.
        decay: AdamW's pull of every scale and vector towards where it started, relative to its rate.
        warm_up: share of the steps in which the rates rise from 0; after it they fall to 0 on a cosine.
        per: train one factor per group of weights, or one per output row.
        biases: whether the biases of the weights' layers are trained.
        norms: whether the gains and biases of the model's norms are trained.
        outputs: outputs to match; None: ``logits`` where there is one, else every float output but caches.
        held_out: share of the batches that training never sees and that decides whether the result is kept.
        clip: largest norm of a step's gradient; it tames single odd batches.
        cache_bytes: the float model's outputs are kept up to this size, and computed again beyond.
        seed: of the order of batches.
        threads: of torch; None leaves them as they are.
    """

    steps: int = 200
    scale_rate: float = 1e-2
    vector_rate: float = 1e-2
    decay: float = 0.0
    warm_up: float = 0.05
    per: Literal["group", "row"] = "group"
    biases: bool = True
    norms: bool = True
    outputs: tuple[str, ...] | None = None
    held_out: float = 0.125
    clip: float = 1.0
    cache_bytes: int = 256 << 20
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is a share between 0 and 1, not {self.held_out}")
        if not 0 <= self.warm_up < 1:
            raise ValueError(f"warm_up is a share from 0 to below 1, not {self.warm_up}")
        if self.scale_rate < 0 or self.vector_rate < 0:
            raise ValueError("learning rates must not be negative")
