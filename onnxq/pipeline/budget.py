"""`--size`, `--bits` and `--table-bits`: a width for every weight, so that a ceiling holds.

The curves are measured (`onnxq.pipeline.curves`), and one Lagrangian spends each ceiling over them
(`onnxq.allocation.budget`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from onnxq import ops
from onnxq.allocation.budget import Point, allocate
from onnxq.calibration import Collected
from onnxq.errors import BudgetError, RecipeError
from onnxq.formats.framed import FramedFormat, frames_of
from onnxq.frames import Frame
from onnxq.graph import LoadedModel
from onnxq.pipeline.curves import Curve, Formats, measure_curves
from onnxq.pipeline.plan import Plan, Planned
from onnxq.progress import Progress
from onnxq.recipe import Recipe
from onnxq.report.records import BudgetRecord
from onnxq.sensitivity import Sensitivities

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


@dataclasses.dataclass(frozen=True)
class _Share:
    """Weights that one ceiling is spent on.

    Attributes:
        record: the ceiling; floor and got are not known yet.
        items: the weights.
        bits: what they may take.
        fixed: bytes of the ceiling that are no weights.
        unit: bits of the weights that one unit of the record stands for.
    """

    record: BudgetRecord
    items: tuple[Planned, ...]
    bits: int
    fixed: int
    unit: int

    def told(self, bits: int) -> float:
        """Bits of the weights in the record's unit: bytes of the whole model, or mean bits."""
        return self.fixed + -(-bits // 8) if self.record.what == "size" else bits / self.unit


def fit_budget(
    budget: Budget,
    plan: Plan,
    recipe: Recipe,
    loaded: LoadedModel,
    statistics: Collected | None,
    progress: Progress,
    sensitivities: Sensitivities | None = None,
) -> tuple[Plan, tuple[BudgetRecord, ...]]:
    """The plan with widths chosen so that the budget holds.

    Args:
        budget: the ceilings.
        plan, recipe, loaded: what to spend them on.
        statistics: mean squares of inputs, for rounding, and for losses where there are no sensitivities.
        progress: follows the weights.
        sensitivities: what errors do to the outputs; None weighs every weight by its relative error.

    Returns:
        The plan, and for each ceiling what was asked, the least that was possible, and what the plan comes to.

    Raises:
        BudgetError: the narrowest formats are above it; the message says the floor.
    """
    chosen: dict[str, Formats] = {}
    records = []
    for share in _shares(budget, plan, recipe, loaded):
        curves = measure_curves(share.items, statistics, sensitivities, progress)
        floor = share.told(sum(min(point.bits for point in curve) for curve in curves.values()))
        picks = _allocate(curves, share, floor)
        got = share.told(sum(point.bits for point in picks.values()))
        records.append(dataclasses.replace(share.record, floor=floor, got=got))
        chosen |= {name: point.choice for name, point in picks.items()}
    planned = tuple(
        dataclasses.replace(item, formats=chosen.get(item.weight.name, item.formats)) for item in plan.planned
    )
    return dataclasses.replace(plan, planned=planned), tuple(records)


def _shares(budget: Budget, plan: Plan, recipe: Recipe, loaded: LoadedModel) -> Iterator[_Share]:
    linear = tuple(item for item in plan.planned if "linear" in item.weight.kinds)
    tables = tuple(item for item in plan.planned if "linear" not in item.weight.kinds)
    if budget.size is not None:
        fixed = fixed_bytes(loaded, plan, stock=recipe.target == "stock")
        yield _Share(BudgetRecord("size", budget.size), plan.planned, 8 * (budget.size - fixed), fixed, 8)
    for what, asked, items in (("bits", budget.bits, linear), ("table_bits", budget.table_bits, tables)):
        if asked is not None and items:
            elements = _elements(items)
            yield _Share(BudgetRecord(what, asked), items, int(asked * elements), 0, elements)


def _allocate(curves: dict[str, Curve], share: _Share, floor: float) -> dict[str, Point[Formats]]:
    try:
        return allocate(curves, share.bits)
    except BudgetError as error:
        if share.record.what != "size":
            raise
        raise BudgetError(
            f"A size of {share.record.asked:,} bytes is below the floor of {floor:,.0f} bytes for this model: "
            f"{share.fixed:,} bytes are not weights; the narrowest formats of its weights take "
            f"{floor - share.fixed:,.0f}."
        ) from error


def _elements(items: Sequence[Planned]) -> int:
    return sum(item.weight.batch * item.weight.n * item.weight.k for item in items)


def _frames(plan: Plan) -> list[Frame]:
    """The frames that a plan's weights share."""
    frames = {}
    for item in plan.planned:
        format = item.formats[0]
        if isinstance(format, FramedFormat):
            for frame in frames_of(format, item.weight.n, item.weight.k):
                if frame is not None:
                    frames[frame.key] = frame
    return list(frames.values())


def _frame_bytes(frame: Frame, stock: bool) -> int:
    """Of what forms store of a frame: its own arrays, or the matrices of its transform."""
    return sum(array.nbytes for array in frame.matrices().values()) if stock else frame.cost_bits() // 8


def fixed_bytes(loaded: LoadedModel, plan: Plan, *, stock: bool = False) -> int:
    """Upper bound of what the written files hold besides the weights: kept constants, graph, functions, report."""
    kept = sum(record.bytes + _ALIGNMENT + _REPORT_BYTES_PER_KEPT for record in plan.kept)
    kept += sum(item.weight.bytes for item in plan.planned if item.weight.other_uses)
    kept += sum(_frame_bytes(frame, stock) + 3 * _ALIGNMENT for frame in _frames(plan))
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
