"""A few weights solved for trial: what curves expect is set against what came, one correction for each kind of plan.

Curves come from nearest rounding and from what error feedback should gain. How much of that comes true differs between
kinds of plans: steps are fitted to the codes afterwards, a trellis looks ahead, groups have steps of their own. Where a
budget chooses between plans, a few percent decide.

Corrections only raise losses: the kind that came out best keeps what it expects, so that a promised error stays on the
safe side where weights differ from those that were tried.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from onnxq.allocation.budget import Point
from onnxq.calibration import InputStatistics
from onnxq.formats.framed import FramedFormat
from onnxq.pipeline.plan import Planned
from onnxq.pipeline.solve import encode
from onnxq.sensitivity import Sensitivities

MOST = 6
"""Weights that are solved."""
_BITS = 2.75
"""The point of a curve that is tried: between those where plans are closest."""
_MOST_CORRECTION = 1.5
"""More than this is of the weights tried rather than of the kind of plan."""

Kind = tuple[str, ...]
Moments = tuple[InputStatistics | None, InputStatistics | None]
"""The inputs' statistics in two halves of the data."""


def kind_of(item: Planned) -> Kind:
    """What plans have in common whose expectations err alike: their formats and solver."""
    format = item.formats[0]
    inner = (type(format.inner).__name__,) if isinstance(format, FramedFormat) else ()
    return type(format).__name__, *inner, item.solver.name


def picked(items: Sequence[Planned], sensitivities: Sensitivities | None) -> frozenset[str]:
    """Names of the weights to try: evenly spaced among those whose errors are fed back and known to count."""
    if sensitivities is None:
        return frozenset()
    fit = [
        item.weight.name
        for item in items
        if item.weight.kinds == ("linear",)
        and item.weight.batch == 1
        and item.solver.name == "error-feedback"
        and sensitivities.weights[item.weight.name].reached
    ]
    places = np.unique(np.linspace(0, max(len(fit) - 1, 0), min(MOST, len(fit))).round().astype(int))
    return frozenset(fit[place] for place in places)


class Trials:
    """Collects trials and corrects curves by them."""

    def __init__(self, sensitivities: Sensitivities | None) -> None:
        self._sensitivities = sensitivities
        self._logs: dict[Kind, list[float]] = defaultdict(list)

    def add(self, item: Planned, curve: Sequence[Point[Planned]], moments: Moments) -> None:
        """Solves a weight by each of its plans, at one point of each plan's part of its curve.

        Peak memory: that of the solver, and four copies of the weight in float64.
        """
        first, second = moments
        if self._sensitivities is None or first is None or first.second_moment is None:
            return
        weight, sensitivity = item.weight, self._sensitivities.weights[item.weight.name]
        matrix = weight.rows(0, weight.n)
        parts: dict[Kind, list[Point[Planned]]] = defaultdict(list)
        for point in curve:
            parts[kind_of(point.choice)].append(point)
        for kind, points in parts.items():
            wanted = _BITS * weight.n * weight.k
            point = min(points, key=lambda each: abs(each.bits - wanted))
            formats, solver = point.choice.formats, point.choice.solver
            errors = [matrix - encode(matrix, format, solver, first).dequantize() for format in formats]
            came = min(
                sensitivity.loss(np.arange(weight.n), error) * _share(error, sensitivity.rows, first, second)
                for error in errors
            )
            if came > 0 and point.loss > 0:
                self._logs[kind].append(np.log(came / point.loss))

    @property
    def corrections(self) -> Mapping[Kind, float]:
        """By kind of plan, what expected losses are to be multiplied by, 1 or more.

        The geometric mean over the trials, beside that of the best kind where that did better than expected.
        """
        means = {kind: float(np.mean(logs)) for kind, logs in self._logs.items()}
        best = min(0.0, min(means.values(), default=0.0))
        return {kind: min(float(np.exp(mean - best)), _MOST_CORRECTION) for kind, mean in means.items()}

    def corrected(self, curve: Sequence[Point[Planned]]) -> list[Point[Planned]]:
        """A curve with all its losses corrected; plans of a kind that was not tried stay as they are."""
        known = self.corrections
        return [dataclasses.replace(point, loss=point.loss * known.get(kind_of(point.choice), 1.0)) for point in curve]


def _share(error: np.ndarray, rows: np.ndarray, first: InputStatistics, second: InputStatistics | None) -> float:
    """What is left of the errors' loss when they cancel as they do on the inputs, beside that of independent ones.

    On all the data's kin: (3 other half + own half) / 4, see `onnxq.pipeline.feedback`.
    """
    own = _cancelled(error, rows, first)
    if second is None or second.count == 0 or second.second_moment is None:
        return own
    return (3 * _cancelled(error, rows, second) + own) / 4


def _cancelled(error: np.ndarray, rows: np.ndarray, statistics: InputStatistics) -> float:
    moment = statistics.second_moment
    assert moment is not None
    weighed = error * np.sqrt(rows.astype(np.float64))[:, None]
    whole = float(np.einsum("nk,nk->", weighed @ moment.astype(np.float64), weighed))
    alone = float(np.square(weighed).sum(0) @ np.diagonal(moment).astype(np.float64))
    return whole / alone if alone > 0 else 1.0
