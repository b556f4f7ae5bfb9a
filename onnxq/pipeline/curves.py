"""Rate-distortion curves of weights: what each width costs, and what it does to the model.

Measured with nearest rounding on evenly spaced rows of each weight; prices are the formats' own. A loss is

1. with sensitivities: the sum over a weight's groups of (sensitivity x elements x mean squared error), an expected
   change of the final outputs, comparable between any two weights (see `onnxq.sensitivity`);
2. for a weight that no gradient reached: its relative error as below, times what dropping a weight does in the median;
3. divided by what error feedback gains at the weight over nearest rounding (`onnxq.pipeline.feedback`), if that is how
   it will be solved: its errors cancel, as those of tables don't;
4. without sensitivities: the squared error over the squares, inputs weighed by their mean squares where there are any;
5. with sensitivities, times what a few weights that are solved for trial say (`onnxq.pipeline.trials`).

Mixed depths have curves of their own, in the same unit (`onnxq.pipeline.mixed`), and so have tables with planes row by
row: their errors are found row by row, and without sensitivities rows count as often as they are read
(`onnxq.pipeline.words`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxq.allocation.budget import Point
from onnxq.calibration import InputStatistics
from onnxq.calibration.statistics import Level
from onnxq.formats.binary import BinaryFormat
from onnxq.formats.files import AnyFormat
from onnxq.formats.float8 import Float8Format
from onnxq.formats.framed import FramedFormat, frames_of
from onnxq.formats.uniform import UniformFormat
from onnxq.frames import Frame
from onnxq.passes.forms.planes import planes_cost_bits
from onnxq.passes.forms.stock import stock_cost_bits
from onnxq.pipeline.feedback import InputCosts, input_costs
from onnxq.pipeline.mixed import mixed_curves
from onnxq.pipeline.plan import Planned
from onnxq.pipeline.solve import encode
from onnxq.pipeline.stages import Halves, Stages
from onnxq.pipeline.trials import Trials, picked
from onnxq.progress import Progress
from onnxq.recipe import SolverSpec
from onnxq.sensitivity import Sensitivities, WeightSensitivity

Curve = list[Point[Planned]]
"""A point stands for the plan that leads to it."""

_CURVE_ROWS = 256
"""Rows of a weight that its curve is measured on."""

_FEEDBACK_BITS = 3
"""The width at which the gain of error feedback is found; it hardly depends on it."""


def _level(item: Planned) -> Level:
    """What calibration has to gather for a curve: mean squares; whole second moments where errors are fed back."""
    fed_back = any(option.solver.name == "error-feedback" for option in item.options)
    return "full" if fed_back and "linear" in item.weight.kinds else "diagonal"


def measure_curves(
    items: Sequence[Planned],
    stages: Stages,
    sensitivities: Sensitivities | None,
    progress: Progress,
) -> dict[str, Curve]:
    """The curve of every weight, by name: the points of its plan and of its alternatives."""
    curves: dict[str, Curve] = {}
    dropped: dict[str, float] = {}
    trials, tried = Trials(sensitivities), picked(items, sensitivities)
    for portion, halves in stages.by_halves(items, _level):
        progress.start("measuring rate and error", len(portion))
        costs = _Costs(halves)
        mixed = mixed_curves([item for item in portion if _mixed(item)], costs.of, sensitivities)
        for item in portion:
            name = item.weight.name
            sensitivity = None if sensitivities is None else sensitivities.weights[name]
            reached = sensitivity is not None and sensitivity.reached > 0
            sample = _Sample(item, halves, sensitivity if reached else None)
            if reached:
                dropped[name] = sample.loss(sample.rows)
            curves[name] = []
            for option in item.options:
                if option.mixed:
                    curves[name] += mixed[name]
                    continue
                gain = _feedback_gain(option, sample, costs)
                points = _curve(option, sample) if option.words is None else _words_curve(option, sample)
                curves[name] += [dataclasses.replace(p, loss=p.loss / gain) for p in points]
            if name in tried:
                trials.add(item, curves[name], halves.of(item.weight))
            progress.advance(1, name)
    curves = {name: trials.corrected(curve) for name, curve in curves.items()}
    typical_drop = float(np.median(list(dropped.values()))) if dropped else 1.0
    for name in curves.keys() - dropped.keys():
        curves[name] = [dataclasses.replace(point, loss=typical_drop * point.loss) for point in curves[name]]
    return curves


class _Costs:
    """What errors cost at the inputs of weights: found once for each tensor, solver and frame."""

    def __init__(self, halves: Halves) -> None:
        self._halves = halves
        self._known: dict[tuple[int, SolverSpec, Any], InputCosts] = {}

    def of(self, item: Planned, frame: Frame | None = None) -> InputCosts | None:
        """None without calibration data."""
        first, second = self._halves.of(item.weight)
        if first is None:
            return None
        # Weights that read one tensor, such as queries, keys and values, share its statistics.
        key = (id(item.weight.sites[0].input), item.solver, None if frame is None else frame.key)
        if key not in self._known:
            self._known[key] = input_costs(first, second, item.solver, frame)
        return self._known[key]


def _mixed(item: Planned) -> bool:
    return any(option.mixed for option in item.options)


class _Sample:
    """Evenly spaced rows of a weight, and how errors of them count.

    Attributes:
        rows: float32 [R, K].
        statistics: of the weight's inputs.
        sensitivity: of the weight; None where no gradient reached it.
    """

    def __init__(self, item: Planned, halves: Halves, sensitivity: WeightSensitivity | None) -> None:
        weight = item.weight
        count = weight.batch * weight.n
        self._picked = np.unique(np.linspace(0, count - 1, min(count, _CURVE_ROWS)).astype(int))
        self.rows = np.concatenate([weight.rows(row, row + 1) for row in self._picked])
        # Nearest rounding and losses look at mean squares alone.
        seen = [dataclasses.replace(half, second_moment=None) for half in halves.of(weight) if half is not None]
        self.statistics = functools.reduce(InputStatistics.merge, seen) if seen else None
        self.sensitivity = sensitivity
        self._importance = None if self.statistics is None else self.statistics.diagonal.astype(np.float64)
        self._energy = self.squares(self.rows)

    def loss(self, error: np.ndarray) -> float:
        """What an error of the rows, [R, K], stands for (rules 1 and 4)."""
        if self.sensitivity is not None:
            return self.sensitivity.loss(self._picked, error)
        return self.squares(error) / self._energy if self._energy else 0.0

    def squares(self, rows: np.ndarray) -> float:
        """Their sum, inputs weighed by their mean squares."""
        squares = np.square(rows, dtype=np.float64)
        return float(squares.sum() if self._importance is None else (squares @ self._importance).sum())


def _curve(item: Planned, sample: _Sample) -> Curve:
    if item.trained:  # nothing is rounded
        return [Point(_price(item), 0.0, item)]
    points = []
    for bits in item.widths:
        choice = dataclasses.replace(item, formats=item.formats_at(bits))
        loss = min(sample.loss(sample.rows - _rounded(sample, format)) for format in choice.formats)
        points.append(Point(_price(choice), loss, choice))
    return points


def _price(item: Planned) -> int:
    """Bits on disk, of the larger form where target "stock" chooses between several."""
    cost, weight = item.cost_bits, item.weight
    if item.recipe.target != "stock":
        return cost
    stock = weight.batch * max(_stock_cost(format, weight.n, weight.k) for format in item.formats)
    return stock if isinstance(item.formats[0], BinaryFormat) else max(cost, stock)


def _words_curve(item: Planned, sample: _Sample) -> Curve:
    """Rule 1 with errors of all rows; or rule 4 with rows weighed by their readers, and inputs alike."""
    words = item.words
    assert words is not None
    points = []
    for planes in words.choices():
        choice = item.with_planes(planes)
        points.append(Point(_price(choice), words.loss(planes, sample.sensitivity), choice))
    return points


def _rounded(sample: _Sample, format: AnyFormat) -> np.ndarray:
    if isinstance(format, BinaryFormat):  # knows how many rows there are
        format = BinaryFormat.of(len(sample.rows), len(format.planes), format.group_size, offset=format.offset)
    return encode(sample.rows, format, SolverSpec(name="nearest"), sample.statistics).dequantize()


def _feedback_gain(item: Planned, sample: _Sample, costs: _Costs) -> float:
    """By how much error feedback lowers the loss of nearest rounding; 1 where it does not run."""
    if item.solver.name == "nearest":
        return 1.0
    format = item.formats_at(min(item.widths, key=lambda bits: abs(bits - _FEEDBACK_BITS)))[0]
    if isinstance(format, FramedFormat):
        frame = frames_of(format, item.weight.n, item.weight.k)[0]
        found = costs.of(item, frame)
        # Coefficients are alike, so their errors are.
        return 1.0 if found is None else found.gain(np.ones(len(found.plain)))
    found = costs.of(item)
    error = sample.rows - _rounded(sample, format)
    return 1.0 if found is None else found.gain(np.square(error, dtype=np.float64).mean(0))


def _stock_cost(format: AnyFormat, n: int, k: int) -> int:
    if isinstance(format, FramedFormat):
        return _stock_cost(format.inner, *format.coefficients(n, k))
    if isinstance(format, Float8Format):  # scales in float32
        return format.cost_bits(n, k) + 16 * n * format.groups(k)
    if isinstance(format, BinaryFormat):
        return planes_cost_bits(format, n, k)
    assert isinstance(format, UniformFormat), "recipes for stock ONNX Runtime have uniform grids"
    return stock_cost_bits(format, n, k)
