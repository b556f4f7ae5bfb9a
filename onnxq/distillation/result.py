"""What comes out of a distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Distillation:
    """New numbers for a quantised model, or the old ones where training did not help.

    Attributes:
        kept: whether the held-out loss fell. If not, `scales` are the ones that were given and `initializers` is empty.
        scales: for each trained weight, by name, its parts' effective scales: float32, each exactly as stored.
        initializers: trained biases and norm parameters by name, in the stored type and shape.
        before: held-out loss of the quantised model as it was given.
        after: held-out loss with the trained numbers, rounded as they are stored.
        training: loss of every training batch, in the order they were seen.
        samples: training and held-out batches.
        trained: how many scales (or factors of rows) and vector elements were trained.
        seconds: wall time.
        notes: what else the reader of a report should know, in sentences.
    """

    kept: bool
    scales: Mapping[str, tuple[np.ndarray, ...]]
    initializers: Mapping[str, np.ndarray]
    before: float
    after: float
    training: tuple[float, ...]
    samples: tuple[int, int]
    trained: tuple[int, int]
    seconds: float
    notes: tuple[str, ...]
