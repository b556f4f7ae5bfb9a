"""Bits per word: planes of a table row by row, from how often each row is looked up (`onnxq.recipe.WordSpec`).

A table that is also an output projection has every row read for every token, so there every row counts, however rarely
it is looked up. All graphs of a folder decide alike: what counts is the weight's kinds, not the sites in its own graph.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from onnxq.errors import RecipeError
from onnxq.formats.binary import BinaryFormat
from onnxq.graph import Weight
from onnxq.graph.shared import content_of
from onnxq.recipe import BinarySpec, SolverSpec, WordSpec
from onnxq.sensitivity import WeightSensitivity
from onnxq.solvers.binary import BinaryFit
from onnxq.solvers.planes import planes_by_frequency, planes_by_mean, row_errors, row_weights

MEANS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 5.0)
"""Mean planes that a curve of by "loss" has points at."""
CLUSTERS = ((1, 1.0), *((clusters, ratio) for clusters in (2, 3, 4, 5, 6) for ratio in (0.5, 1.0, 2.0, 4.0, 8.0)))
"""Clusters and ratios that a curve of by "frequency" has points at."""

_MOST_KNOWN = 4
_KNOWN: dict[tuple[str, BinaryFormat, BinaryFit], np.ndarray] = {}
"""Errors of the last tables, by content: the graphs of a folder hold one table, and each is planned."""


@dataclasses.dataclass(frozen=True, eq=False)
class Words:
    """A table, and what decides the planes of its rows.

    Attributes:
        weight: the table.
        spec: its codes, with words.
        counts: int64 [N], how often each row is looked up.
        fit: how its levels are found.
    """

    weight: Weight
    spec: BinarySpec
    counts: np.ndarray
    fit: BinaryFit = BinaryFit.ALTERNATING

    @property
    def rule(self) -> WordSpec:
        """What the recipe asks for."""
        assert self.spec.words is not None, "words come from such a specification"
        return self.spec.words

    @functools.cached_property
    def weights(self) -> np.ndarray:
        """What an error of each row counts, float64 [N]; look-ups together count 1."""
        tied = "linear" in self.weight.kinds
        return row_weights(self.counts, self.rule.every_row if tied else 0.0)

    @functools.cached_property
    def errors(self) -> np.ndarray:
        """Squared error of each row with 1 to 6 planes, float64 [N, 6]; takes seconds for a large table."""
        weight = self.weight
        matrix, format = weight.rows(0, weight.n), self.spec.format(weight.n, 1)
        key = content_of(matrix), format, self.fit
        if key not in _KNOWN:
            while len(_KNOWN) >= _MOST_KNOWN:
                del _KNOWN[next(iter(_KNOWN))]
            _KNOWN[key] = row_errors(matrix, format, fit=self.fit)
        return _KNOWN[key]

    def planes(self) -> np.ndarray:
        """What the recipe's numbers come to, int64 [N]."""
        rule = self.rule
        if rule.by == "frequency":
            return planes_by_frequency(self.counts, rule.clusters, rule.ratio)
        return planes_by_mean(self.errors, self.weights, rule.mean_planes)

    def choices(self) -> list[np.ndarray]:
        """Planes that a budget may choose from, int64 [N] each, the recipe's own among them."""
        rule = self.rule
        if rule.by == "frequency":
            pairs = dict.fromkeys([*CLUSTERS, (rule.clusters, rule.ratio)])
            return [planes_by_frequency(self.counts, clusters, ratio) for clusters, ratio in pairs]
        means = sorted({*MEANS, rule.mean_planes})
        return [planes_by_mean(self.errors, self.weights, mean) for mean in means]

    def loss(self, planes: np.ndarray, sensitivity: WeightSensitivity | None) -> float:
        """What rounding to these planes costs, in the unit of `onnxq.pipeline.curves`.

        Without sensitivities it is the share of the squares, rows counted as often as they are read.

        Args:
            planes: int [N].
            sensitivity: of the table; None where it is not known.
        """
        lost = np.take_along_axis(self.errors, planes[:, None] - 1, axis=1)[:, 0]
        if sensitivity is not None:
            return float(sensitivity.rows.astype(np.float64) @ lost)
        squares = float(self.weights @ self._squares)
        return float(self.weights @ lost) / squares if squares else 0.0

    @functools.cached_property
    def _squares(self) -> np.ndarray:
        """Sum of squares of each row, float64 [N]."""
        rows = self.weight.rows(0, self.weight.n)
        squares: np.ndarray = np.einsum("nk,nk->n", rows, rows, dtype=np.float64)
        return squares


def words_of(weight: Weight, spec: BinarySpec, solver: SolverSpec, counts: np.ndarray) -> Words:
    """The words of a weight that look-ups read.

    Raises:
        RecipeError: there are more or fewer counts than rows, or negative ones.
    """
    if counts.shape != (weight.n,) or counts.min(initial=0) < 0:
        raise RecipeError(
            f"{weight.name} has {weight.n} rows, and their token counts are {list(counts.shape)} from "
            f"{counts.min(initial=0)} up: there must be one for each row, none negative."
        )
    return Words(weight, spec, counts, BinaryFit.GREEDY if solver.levels == "greedy" else BinaryFit.ALTERNATING)


def planes_of_rows(formats: Sequence[object], rows: np.ndarray | None) -> np.ndarray:
    """Undoes `BinarySpec.by_row`: planes of every row as the weight has them, uint8 [N]."""
    (format,) = formats
    assert isinstance(format, BinaryFormat), "planes are of binary codes"
    stored = np.zeros(format.planes[0], np.uint8)
    for count in format.planes:
        stored[:count] += 1
    if rows is None:
        return stored
    planes = np.empty_like(stored)
    planes[rows] = stored
    return planes
