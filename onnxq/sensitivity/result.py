"""Sensitivities as plain arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxq.graph import Weight


@dataclass(frozen=True, eq=False)
class WeightSensitivity:
    """How much the outputs change, per squared change of a weight's elements; [rows, K] is its stacked matrix.

    Attributes:
        groups: float32 [M, K]: mean over the rows of each group, for every input column.
        rows: float32 [rows]: mean over the columns of each row.
        row_group: int [rows]: the group of each row, 0 to M - 1.
        reached: in how many backward passes a gradient came to it; 0 says that nothing is known.
    """

    groups: np.ndarray
    rows: np.ndarray
    row_group: np.ndarray
    reached: int

    @property
    def columns(self) -> np.ndarray:
        """Mean over all rows, float32 [K]."""
        counts = np.bincount(self.row_group, minlength=len(self.groups))
        columns: np.ndarray = (counts / counts.sum()) @ self.groups.astype(np.float64)
        return columns.astype(np.float32)

    @property
    def mean(self) -> float:
        """Mean over all elements."""
        return float(self.rows.mean(dtype=np.float64))

    def loss(self, picked: np.ndarray, error: np.ndarray) -> float:
        """The expected rise of the loss when every element of the weight is off by an independent error.

        It is the sum over groups of (elements x sensitivity x mean squared error). A group without a sampled row takes
        the mean squared errors of all sampled rows.

        Args:
            picked: int [R]: the rows that the error was measured on.
            error: [R, K]: what rounding did to them.
        """
        squared = np.square(error, dtype=np.float64)
        sampled = np.bincount(self.row_group[picked], minlength=len(self.groups))
        means = np.tile(squared.mean(0), (len(self.groups), 1))
        sums = np.zeros_like(means)
        np.add.at(sums, self.row_group[picked], squared)
        known = sampled > 0
        means[known] = sums[known] / sampled[known, None]
        sizes = np.bincount(self.row_group, minlength=len(self.groups))
        return float(sizes @ (means * self.groups).sum(1))


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """What a measurement found.

    Attributes:
        weights: by weight name.
        kind: "output": losses are squared changes of the outputs, each output divided by its mean squared row, so a
            loss of 0.01 is a relative error of 10 %. "fisher": twice the expected divergence per row, in nats.
        outputs: what was probed.
        samples, rows, passes: how many were seen, probed and run backwards.
        notes: what the reader of a report should know, in sentences.
        seconds: wall time, without that of an interrupted run before it.
    """

    weights: Mapping[str, WeightSensitivity]
    kind: str
    outputs: tuple[str, ...]
    samples: int
    rows: int
    passes: int
    notes: tuple[str, ...]
    seconds: float


def runs_of_rows(weight: Weight, size: int) -> np.ndarray:
    """Groups of `size` rows in their order, the last of each matrix of a stack what is left: int [batch * n]."""
    groups = -(-weight.n // size)
    return (np.arange(weight.n) // size + groups * np.arange(weight.batch)[:, None]).reshape(-1)


def equal_parts(weight: Weight, count: int) -> np.ndarray:
    """At most `count` groups of neighbouring rows of about one size: int [batch * n]."""
    rows = weight.batch * weight.n
    return np.arange(rows) * min(count, rows) // rows
