"""Rate-distortion curves of weights with mixed depths: one point for each mean depth, with the best depths for it.

The loss of an error at output n and input k is taken as (mean sensitivity of the band of n) x (cost of input k under
error feedback, `onnxq.pipeline.feedback`): the Kronecker form of the gradients' variance, with what feedback gains
already in it. Weights that read one tensor share the order of its
inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from onnxq.allocation.budget import Point
from onnxq.formats.mixed import MixedFormat
from onnxq.formats.packing import ceil_div
from onnxq.pipeline.feedback import InputCosts
from onnxq.pipeline.plan import Planned
from onnxq.sensitivity import Sensitivities
from onnxq.solvers.mixed import DepthErrors, choose_depths, input_order, measure_depths

MEANS = (*np.arange(0.25, 4.01, 0.125), *np.arange(4.25, 6.01, 0.25), 6.5, 7.0, 8.0)
"""Mean depths that a curve has points at."""
_ORDER_DEPTH = 2
"""Inputs are put in order by what they cost at this depth."""


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A weight with what its errors cost, importance float64 [M, K]."""

    item: Planned
    errors: DepthErrors
    importance: np.ndarray


def mixed_curves(
    items: Sequence[Planned], costs: Callable[[Planned], InputCosts | None], sensitivities: Sensitivities | None
) -> dict[str, list[Point[Planned]]]:
    """The curves of these weights, by name; see `onnxq.pipeline.curves` for what a loss is.

    Memory: 72 / band bytes for each element of the weights that share a tensor.

    Args:
        items: with mixed depths among their options.
        costs: what errors cost at the inputs of a weight; None where they are not fed back.
        sensitivities: what they do to the outputs; None weighs every weight by its relative error.
    """
    curves: dict[str, list[Point[Planned]]] = {}
    readers: dict[int, list[Planned]] = {}
    for item in items:
        readers.setdefault(id(item.weight.sites[0].input), []).append(_option(item))
    for group in readers.values():
        measured = [_measure(item, costs(item), sensitivities) for item in group]
        order = input_order(
            np.sum([(each.errors.squares[:, :, _ORDER_DEPTH] * each.importance).sum(0) for each in measured], axis=0)
        )
        for each in measured:
            curves[each.item.weight.name] = _points(each, order)
    return curves


def _option(item: Planned) -> Planned:
    """The plan of mixed depths among an item's."""
    return next(option for option in item.options if option.mixed)


def _measure(item: Planned, costs: InputCosts | None, sensitivities: Sensitivities | None) -> _Measured:
    format, weight = item.formats[0], item.weight
    assert isinstance(format, MixedFormat)
    matrix = weight.rows(0, weight.n)
    errors = measure_depths(matrix, format.band)
    ones = np.ones(weight.k)
    inputs = ones if costs is None else costs.fed_back
    sensitivity = None if sensitivities is None else sensitivities.weights[weight.name]
    if sensitivity is not None and sensitivity.reached:
        starts = np.arange(ceil_div(weight.n, format.band)) * format.band
        bands = np.add.reduceat(sensitivity.rows.astype(np.float64), starts)
        bands /= np.diff(np.append(starts, weight.n))
        return _Measured(item, errors, bands[:, None] * inputs)
    # Relative to what dropping the weight does.
    energy = float(np.square(matrix, dtype=np.float64).sum(0) @ (ones if costs is None else costs.plain))
    return _Measured(item, errors, np.tile(inputs / energy if energy else inputs, (len(errors.squares), 1)))


def _points(measured: _Measured, order: np.ndarray) -> list[Point[Planned]]:
    item, weight = measured.item, measured.item.weight
    points = []
    for depths in choose_depths(measured.errors, measured.importance, order, weight.n, MEANS):
        format = MixedFormat.of(measured.errors.band, order, depths.by_band)
        choice = dataclasses.replace(item, formats=(format,))
        points.append(Point(format.cost_bits(weight.n, weight.k), depths.loss, choice))
    return points
