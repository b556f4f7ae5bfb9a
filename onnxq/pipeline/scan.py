"""What rounding does to a folder's results, sub-layer by sub-layer: the paper's sensitivity scan, with divergence.

The weights of one part of one layer, such as the cross-attention of decoder layer 2, are rounded to nearest at a few
widths, and a recorded trace is played with them (`onnxq.sensitivity.replay`). What comes, over the sum of the errors
that curves state for these weights, turns curves of layers into curves of results: between the widths along logarithms,
beyond them unchanged.

Source: Chung et al. (arXiv 2009.07453), table 1, which scans blocks and sub-layer types in whole.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from onnxq.allocation.budget import Point
from onnxq.graph import Weight
from onnxq.graph.parts import layer_of
from onnxq.pipeline.plan import Planned
from onnxq.pipeline.solve import dequantized_roots, encode_nearest
from onnxq.progress import Progress
from onnxq.sensitivity.replay import Replay

SCANNED_BITS = (2.0, 4.0)
"""Mean bits that sub-layers are rounded to."""

Curve = Sequence[Point[Planned]]


@dataclasses.dataclass(frozen=True)
class Scanned:
    """A weight of the scan.

    Attributes:
        item: its plan in the graph that solves it.
        curve: its points under nearest rounding, a loss of the layer each.
        holders: graph and weight of all that hold it.
    """

    item: Planned
    curve: Curve
    holders: tuple[tuple[str, Weight], ...]

    @property
    def unit(self) -> str:
        """The sub-layer that it is rounded with."""
        weight = self.item.weight
        layer = layer_of([weight.name, *(site.name for site in weight.sites)])
        return weight.part if layer is None else f"{weight.part}.{layer}"


@dataclasses.dataclass(frozen=True)
class UnitCost:
    """What the errors of a sub-layer's weights cost: result's loss over the summed losses of layers.

    Attributes:
        errors: summed losses of the layers that were tried, rising.
        losses: the results' losses there.
    """

    errors: tuple[float, ...]
    losses: tuple[float, ...]

    def factor(self, error: float) -> float:
        """The ratio at a summed loss."""
        known = np.log(np.maximum(self.errors, 1e-30))
        ratios = np.log(np.maximum(self.losses, 1e-30)) - known
        return float(np.exp(np.interp(np.log(max(error, 1e-30)), known, ratios)))


def scan(weights: Mapping[str, Scanned], replay: Replay, progress: Progress) -> dict[str, UnitCost]:
    """The cost of every sub-layer, by `Scanned.unit`.

    Peak memory: the float and the rounded weights of one sub-layer, and what `Replay` states.
    """
    units: dict[str, list[Scanned]] = defaultdict(list)
    for weight in weights.values():
        units[weight.unit].append(weight)
    progress.start("measuring sub-layers", len(units) * len(SCANNED_BITS))
    costs = {}
    for unit, members in units.items():
        tried: dict[float, float] = {}
        for bits in SCANNED_BITS:
            points = [_nearest_point(member, bits) for member in members]
            error = sum(point.loss for point in points)
            if error not in tried:
                tried[error] = max(replay.divergence(_rounded(members, points)), 0.0)
            progress.advance(1, unit)
        errors = sorted(tried)
        costs[unit] = UnitCost(tuple(errors), tuple(tried[error] for error in errors))
    return costs


def _nearest_point(member: Scanned, bits: float) -> Point[Planned]:
    """The point of a curve whose mean bits are nearest, of its first plan."""
    weight = member.item.weight
    elements = weight.batch * weight.n * weight.k
    first = [point for point in member.curve if point.choice.recipe.linear == member.item.recipe.linear]
    return min(first, key=lambda point: abs(point.bits / elements - bits))


def _rounded(members: Sequence[Scanned], points: Sequence[Point[Planned]]) -> dict[str, dict[str, np.ndarray]]:
    """The initializers of all graphs that hold these weights, rounded."""
    arrays: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for member, point in zip(members, points, strict=True):
        encodings = encode_nearest(dataclasses.replace(point.choice, weight=member.item.weight))
        for graph, weight in member.holders:
            roots = {root.name: root for root in weight.roots}
            for name, array in dequantized_roots(weight, encodings).items():
                tensor = roots[name].const_value
                arrays[graph][name] = array if tensor is None else array.astype(tensor.dtype.numpy())
    return arrays
