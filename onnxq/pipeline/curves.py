"""Rate-distortion curves of weights: what each width costs, and what it does to the model.

Measured with nearest rounding on evenly spaced rows of each weight; prices are the formats' own. A loss is

1. with sensitivities: the sum over a weight's groups of (sensitivity x elements x mean squared error), an expected
   change of the final outputs, comparable between any two weights (see `onnxq.sensitivity`);
2. for a weight that no gradient reached: its relative error as below, times what dropping a weight does in the median;
3. divided by what error feedback gains at the weight over nearest rounding, or in the median of the weights that
   `curve_level` chose, if that is how it will be solved: its errors cancel, as those of tables don't;
4. without sensitivities: the squared error over the squares, inputs weighed by their mean squares where there are any.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from onnxq.allocation.budget import Point
from onnxq.calibration import Collected, requests_for, statistics_bytes
from onnxq.calibration.statistics import Level
from onnxq.formats.files import AnyFormat
from onnxq.formats.framed import FramedFormat
from onnxq.formats.uniform import UniformFormat
from onnxq.graph import Weight
from onnxq.passes.forms.stock import stock_cost_bits
from onnxq.pipeline.plan import Planned
from onnxq.pipeline.solve import encode, statistics_of
from onnxq.progress import Progress
from onnxq.recipe import SolverSpec
from onnxq.sensitivity import Sensitivities, WeightSensitivity

Formats = tuple[AnyFormat, ...]
Curve = list[Point[Formats]]

WIDTHS = tuple(range(1, 9))
_STOCK_WIDTHS = (2, 4, 8)
_CURVE_ROWS = 256
"""Rows of a weight that its curve is measured on."""

_FEEDBACK_WEIGHTS = 12
_FEEDBACK_BITS = 3
"""At how many weights the gain of error feedback is measured, and at what width; it hardly depends on it."""


def curve_level(items: Sequence[Planned], room: int) -> Callable[[Weight], Level]:
    """What calibration has to gather for curves.

    Mean squares, and whole second moments of some products, evenly spread over the model, for what error feedback
    gains there.

    Args:
        items: all weights of the budget.
        room: bytes that second moments may take.
    """
    solved = [item.weight for item in items if item.solver.name == "error-feedback"]
    chosen: list[Weight] = []
    for index in np.unique(np.linspace(0, len(solved) - 1, min(len(solved), _FEEDBACK_WEIGHTS)).astype(int)):
        if statistics_bytes(requests_for([*chosen, solved[index]])) <= room:
            chosen.append(solved[index])
    names = {weight.name for weight in chosen}
    return lambda weight: "full" if weight.name in names else "diagonal"


def measure_curves(
    items: Sequence[Planned],
    statistics: Collected | None,
    sensitivities: Sensitivities | None,
    progress: Progress,
) -> dict[str, Curve]:
    """The curve of every weight, by name."""
    progress.start("measuring rate and error", len(items))
    curves, gains = {}, {}
    dropped, unreached = [], []
    measured: set[int] = set()
    for item in items:
        name = item.weight.name
        sensitivity = None if sensitivities is None else sensitivities.weights[name]
        if sensitivity is not None and not sensitivity.reached:
            sensitivity = None
            unreached.append(name)
        sample = _Sample(item, statistics, sensitivity)
        curves[name] = _curve(item, sample)
        if sensitivity is not None:
            dropped.append(sample.loss(sample.rows))
        moment = None if sample.statistics is None else sample.statistics.second_moment
        wished = sensitivities is not None and item.solver.name == "error-feedback"
        if wished and moment is not None and id(moment) not in measured:  # queries, keys and values share one
            measured.add(id(moment))
            gains[name] = _feedback_gain(item, sample, moment)
        progress.advance(1, name)
    typical_drop = float(np.median(dropped)) if dropped else 1.0
    typical_gain = float(np.median(list(gains.values()))) if gains else 1.0
    for item in items:
        name = item.weight.name
        factor = typical_drop if name in unreached else 1.0
        if item.solver.name == "error-feedback":
            factor /= gains.get(name, typical_gain)
        curves[name] = [dataclasses.replace(point, loss=factor * point.loss) for point in curves[name]]
    return curves


class _Sample:
    """Evenly spaced rows of a weight, and how errors of them count.

    Attributes:
        rows: float32 [R, K].
        statistics: of the weight's inputs.
    """

    def __init__(self, item: Planned, statistics: Collected | None, sensitivity: WeightSensitivity | None) -> None:
        weight = item.weight
        count = weight.batch * weight.n
        self._picked = np.unique(np.linspace(0, count - 1, min(count, _CURVE_ROWS)).astype(int))
        self.rows = np.concatenate([weight.rows(row, row + 1) for row in self._picked])
        self.statistics = None if statistics is None else statistics_of(weight, statistics)
        self._sensitivity = sensitivity
        self._importance = None if self.statistics is None else self.statistics.diagonal.astype(np.float64)
        self._energy = self.squares(self.rows)

    def loss(self, error: np.ndarray) -> float:
        """What an error of the rows, [R, K], stands for (rules 1 and 4)."""
        if self._sensitivity is not None:
            return self._sensitivity.loss(self._picked, error)
        return self.squares(error) / self._energy if self._energy else 0.0

    def squares(self, rows: np.ndarray) -> float:
        """Their sum, inputs weighed by their mean squares."""
        squares = np.square(rows, dtype=np.float64)
        return float(squares.sum() if self._importance is None else (squares @ self._importance).sum())


def _curve(item: Planned, sample: _Sample) -> Curve:
    weight, stock = item.weight, item.recipe.target == "stock"
    points = []
    for bits in _STOCK_WIDTHS if stock else WIDTHS:
        formats = item.formats_at(bits)
        loss = min(sample.loss(sample.rows - _rounded(sample, format)) for format in formats)
        cost = weight.batch * formats[0].cost_bits(weight.n, weight.k)
        if stock:
            cost = max(cost, weight.batch * _stock_cost(formats[0], weight.n, weight.k))
        points.append(Point(cost, loss, formats))
    return points


def _rounded(sample: _Sample, format: AnyFormat) -> np.ndarray:
    return encode(sample.rows, format, SolverSpec(name="nearest"), sample.statistics).dequantize()


def _feedback_gain(item: Planned, sample: _Sample, moment: np.ndarray) -> float:
    """The error of the products with independent rounding errors, over that with error feedback; 1 at least."""
    format = item.formats_at(_FEEDBACK_BITS)[0]
    fed_back = sample.rows - encode(sample.rows, format, item.solver, sample.statistics).dequantize()
    loss = float(np.vdot(fed_back @ moment, fed_back))
    independent = sample.squares(sample.rows - _rounded(sample, format))
    return max(independent / loss, 1.0) if loss > 0 else 1.0


def _stock_cost(format: AnyFormat, n: int, k: int) -> int:
    if isinstance(format, FramedFormat):
        return _stock_cost(format.inner, *format.coefficients(n, k))
    assert isinstance(format, UniformFormat), "recipes for stock ONNX Runtime have uniform grids"
    return stock_cost_bits(format, n, k)
