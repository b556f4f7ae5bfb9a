"""What recipes say of calibration, of spending a budget, and of what follows the rounding."""

from __future__ import annotations

import dataclasses
from typing import Literal

from onnxq.recipe.checks import require, require_choices


@dataclasses.dataclass(frozen=True)
class CalibrationSpec:
    """How calibration data is read.

    Attributes:
        max_samples: at most so many, drawn with the recipe's seed.
        batch_size: samples per run.
        max_length: tokens per text.
        sequential: gather statistics block by block, each from quantised predecessors; slower.
    """

    max_samples: int = 256
    batch_size: int = 8
    max_length: int = 256
    sequential: bool = False

    def __post_init__(self) -> None:
        for name in ("max_samples", "batch_size", "max_length"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class AllocationSpec:
    """How a budget (`--size`, `--bits`) weighs the errors of different weights.

    Attributes:
        sensitivity: "gradient": by what they do to the final outputs (`onnxq.sensitivity`); needs calibration data
            and torch, and the report says where one is missing. "layer": by each weight's own relative error.
        samples: at most so many of the calibration samples for the gradients; of a folder of several graphs a trace is
            played again with so many.
        read_weight: what a bit counts in which a generated token is multiplied, beside its place on disk, which counts
            1: more gives a decoder fewer bits than an encoder that runs once for a sentence. Of folders with a trace.
    """

    sensitivity: Literal["gradient", "layer"] = "gradient"
    samples: int = 64
    read_weight: float = 0.0

    def __post_init__(self) -> None:
        require_choices(self)
        require(self.read_weight >= 0, f"read_weight is {self.read_weight}; it must be 0 or more")
        require(self.samples >= 1, f"samples is {self.samples}; it must be 1 or more")


@dataclasses.dataclass(frozen=True)
class DistillationSpec:
    """A short training of scales, biases and norms after rounding (`onnxq.distillation`); needs torch.

    Attributes:
        steps: batches of calibration data to train on.
        rate: learning rate, relative to what is trained.
    """

    steps: int = 200
    rate: float = 0.01

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps is {self.steps}; it must be 1 or more")
        require(0 < self.rate <= 1, f"rate is {self.rate}; it must be above 0 and at most 1, such as 0.01")
