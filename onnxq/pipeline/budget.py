"""`--size`, `--bits` and `--table-bits`: a width for every weight, so that a ceiling holds.

The curves are measured: the error of nearest rounding at every width, weighted by the inputs' mean squares where there
is calibration data, on evenly spaced rows of each weight. Prices are the formats' own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxq import ops
from onnxq.allocation.budget import Point, allocate
from onnxq.calibration import Collected
from onnxq.errors import BudgetError, RecipeError
from onnxq.formats.uniform import UniformFormat
from onnxq.graph import LoadedModel
from onnxq.pipeline.plan import Plan, Planned
from onnxq.pipeline.solve import statistics_of
from onnxq.progress import Progress
from onnxq.recipe import GridSpec, Recipe
from onnxq.solvers.nearest import nearest

WIDTHS = tuple(range(1, 9))
_STOCK_WIDTHS = (2, 4, 8)
_CURVE_ROWS = 256
"""Rows of a weight that its curve is measured on."""

# What the .onnx file grows by for one weight: three initializers, a longer node, a line in the report.
_GRAPH_BYTES_PER_WEIGHT = 1500
_REPORT_BYTES_PER_KEPT = 200
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Budget:
    """What was asked for.

    Attributes:
        size: ceiling of the written files in bytes.
        bits: ceiling of the mean bits of products' weights, side data counted.
        table_bits: the same for tables.
    """

    size: int | None = None
    bits: float | None = None
    table_bits: float | None = None

    def __post_init__(self) -> None:
        if self.size is not None and (self.bits is not None or self.table_bits is not None):
            raise RecipeError("a size counts the whole file: give either a size, or bits and table bits")
        for name in ("size", "bits", "table_bits"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RecipeError(f"{name} is {value}; it must be above 0")

    @property
    def asked(self) -> bool:
        """Whether there is a ceiling at all."""
        return self.size is not None or self.bits is not None or self.table_bits is not None


def fit_budget(
    budget: Budget, plan: Plan, recipe: Recipe, loaded: LoadedModel, statistics: Collected | None, progress: Progress
) -> Plan:
    """The plan with widths chosen so that the budget holds.

    Raises:
        BudgetError: the narrowest formats are above it; the message says the floor.
    """
    linear = [item for item in plan.planned if "linear" in item.weight.kinds]
    tables = [item for item in plan.planned if "linear" not in item.weight.kinds]
    groups: list[tuple[list[Planned], int, str]] = []
    if budget.size is not None:
        fixed = fixed_bytes(loaded, plan)
        groups.append(([*plan.planned], 8 * (budget.size - fixed), f"{fixed:,} bytes are not weights; "))
    if budget.bits is not None:
        groups.append((linear, int(budget.bits * _elements(linear)), ""))
    if budget.table_bits is not None:
        groups.append((tables, int(budget.table_bits * _elements(tables)), ""))
    chosen: dict[str, tuple[UniformFormat, ...]] = {}
    for items, bits, remark in groups:
        if not items:
            continue
        progress.start("measuring rate and error", len(items))
        curves = {}
        for item in items:
            curves[item.weight.name] = _curve(item, recipe, statistics)
            progress.advance(1, item.weight.name)
        chosen |= _allocate(curves, bits, remark, budget)
    planned = tuple(
        dataclasses.replace(item, formats=chosen.get(item.weight.name, item.formats)) for item in plan.planned
    )
    return dataclasses.replace(plan, planned=planned)


def _allocate(
    curves: dict[str, list[Point[tuple[UniformFormat, ...]]]], bits: int, remark: str, budget: Budget
) -> dict[str, tuple[UniformFormat, ...]]:
    try:
        picks = allocate(curves, bits)
    except BudgetError as error:
        floor = sum(min(point.bits for point in curve) for curve in curves.values())
        if budget.size is None:
            raise
        total = budget.size - bits // 8 + -(-floor // 8)
        raise BudgetError(
            f"A size of {budget.size:,} bytes is below the floor of {total:,} bytes for this model: {remark}"
            f"the narrowest formats of its weights take {floor / 8:,.0f}."
        ) from error
    return {name: point.choice for name, point in picks.items()}


def _elements(items: Sequence[Planned]) -> int:
    return sum(item.weight.batch * item.weight.n * item.weight.k for item in items)


def _curve(item: Planned, recipe: Recipe, statistics: Collected | None) -> list[Point[tuple[UniformFormat, ...]]]:
    weight = item.weight
    rows = weight.batch * weight.n
    picked = np.unique(np.linspace(0, rows - 1, min(rows, _CURVE_ROWS)).astype(int))
    sample = np.concatenate([weight.rows(row, row + 1) for row in picked])
    seen = None if statistics is None else statistics_of(weight, statistics)
    importance = None if seen is None else seen.diagonal
    energy = _energy(sample, importance)
    group = item.formats[0].group_size
    points = []
    for bits in _STOCK_WIDTHS if recipe.target == "stock" else WIDTHS:
        formats = GridSpec(bits, "column" if group is None else group).formats(recipe.target)
        rounded = (nearest(sample, format, importance).dequantize() for format in formats)
        error = min(_energy(sample - decoded, importance) for decoded in rounded)
        cost = weight.batch * formats[0].cost_bits(weight.n, weight.k)
        if recipe.target == "stock":
            # A form that stock ONNX Runtime reads from two places stores zero points that the format shares.
            cost += rows * formats[0].groups(weight.k) * 8
        points.append(Point(cost, error / energy if energy else 0.0, formats))
    return points


def _energy(rows: np.ndarray, importance: np.ndarray | None) -> float:
    squares = np.square(rows, dtype=np.float64)
    return float(squares.sum() if importance is None else (squares @ importance.astype(np.float64)).sum())


def fixed_bytes(loaded: LoadedModel, plan: Plan) -> int:
    """Upper bound of what the written files hold besides the weights: kept constants, graph, functions, report."""
    kept = sum(record.bytes + _ALIGNMENT + _REPORT_BYTES_PER_KEPT for record in plan.kept)
    kept += sum(item.weight.bytes for item in plan.planned if item.weight.other_uses)
    # The graph without its tensors: the source files less all that is stored in them.
    tensors = sum(record.bytes for record in plan.kept) + sum(item.weight.bytes for item in plan.planned)
    graph = max(loaded.bytes_on_disk - tensors, 0)
    opset = loaded.opset
    functions = sum(
        len(ir.to_proto(function).SerializeToString())
        for op_type in ops.op_types()
        for function in ops.functions_for(op_type, opset)
    )
    members = sum(item.weight.batch for item in plan.planned)
    return kept + graph + functions + members * (_GRAPH_BYTES_PER_WEIGHT + 3 * _ALIGNMENT)
