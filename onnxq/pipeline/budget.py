"""`--size`, `--bits` and `--table-bits`: a width for every weight, so that a ceiling holds.

The curves are measured (`onnxq.pipeline.curves`), and one Lagrangian spends each ceiling over them
(`onnxq.allocation.budget`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import onnx_ir as ir

from onnxq import ops
from onnxq.allocation.budget import Point, allocate, cheapest
from onnxq.errors import BudgetError, RecipeError
from onnxq.formats.binary import BinaryFormat
from onnxq.formats.codebook import CodebookFormat
from onnxq.formats.float8 import Float8Format
from onnxq.formats.framed import FramedFormat, frames_of
from onnxq.formats.mixed import MixedFormat
from onnxq.formats.packing import BLOCK_K
from onnxq.formats.uniform import UniformFormat
from onnxq.frames import Frame
from onnxq.graph import LoadedModel
from onnxq.passes.forms.planes import planes_nodes
from onnxq.pipeline.curve_cache import Curves
from onnxq.pipeline.plan import Plan, Planned
from onnxq.recipe import Recipe
from onnxq.report.records import BudgetRecord

# What the .onnx file grows by for one weight: three initializers, a longer node, a line in the report.
_GRAPH_BYTES_PER_WEIGHT = 1500
_REPORT_BYTES_PER_KEPT = 200
_REPORT_BYTES = 3000
_ALIGNMENT = 64
_TRIES = 8
"""Allocations of one size: what is chosen decides what is left to spend."""
_TABLE_BYTES = 512
"""Of the levels of mixed depths, which all weights share."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What was asked for.

    Attributes:
        size: ceiling of the written files in bytes.
        bits: ceiling of the mean bits of products' weights, side data counted.
        table_bits: the same for tables.
        max_error: ceiling of what rounding is expected to do to the outputs: a relative error, such as 0.1 for 10 %;
            or the divergence of the distributions that logits stand for, in nats.
    """

    size: int | None = None
    bits: float | None = None
    table_bits: float | None = None
    max_error: float | None = None

    def __post_init__(self) -> None:
        others = (self.size, self.bits, self.table_bits)
        if self.max_error is not None and any(value is not None for value in others):
            raise RecipeError("a largest error decides the size: give either it, or a size or bits")
        if self.size is not None and (self.bits is not None or self.table_bits is not None):
            raise RecipeError("a size counts the whole file: give either a size, or bits and table bits")
        for name in ("size", "bits", "table_bits", "max_error"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RecipeError(f"{name} is {value}; it must be above 0")

    @property
    def asked(self) -> bool:
        """Whether there is a ceiling at all."""
        return any(value is not None for value in dataclasses.astuple(self))

    def or_default(self, recipe: Recipe) -> Budget:
        """With the mean bits that a recipe names, where its formats follow from a budget and none was asked for."""
        if not recipe.chooses or any(value is not None for value in (self.size, self.bits, self.max_error)):
            return self
        return dataclasses.replace(self, bits=float(recipe.linear.grid.bits))


@dataclasses.dataclass(frozen=True)
class Share:
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
    curves_of: Callable[[Sequence[Planned]], Curves],
    spare: int = 0,
) -> tuple[Plan, tuple[BudgetRecord, ...]]:
    """The plan with widths chosen so that the budget holds.

    Args:
        budget: the ceilings.
        plan, recipe, loaded: what to spend them on.
        curves_of: gives the curves of weights.
        spare: bytes by which what is no weight stays below its upper bound (`fixed_bytes`), if that is known.

    Returns:
        The plan, and for each ceiling what was asked, the least that was possible, and what the plan comes to.

    Raises:
        BudgetError: the narrowest formats are above it, or the widest lose more; the message says the floor.
    """
    chosen: dict[str, Planned] = {}
    records: list[BudgetRecord] = []
    notes = [*plan.notes]
    if budget.max_error is not None:
        measured = curves_of(plan.planned)
        picks, record = _within_error(measured, budget.max_error)
        chosen = {name: point.choice for name, point in picks.items()}
        notes += measured.notes
        records.append(record)
    for share in shares(budget, plan):
        measured = curves_of(share.items)
        curves = measured.points
        notes += [note for note in measured.notes if note not in notes]
        fixed_with = functools.partial(_fixed_with, loaded, plan, stock=recipe.target == "stock", spare=spare)
        spent = spend(curves, share, fixed_with)
        records.append(dataclasses.replace(share.record, floor=spent.floor, got=spent.got))
        if measured.kind != "layer":
            loss = sum(point.loss for point in spent.picks.values())
            notes.append(_expected(measured.kind, loss, share.record.what))
        chosen |= {name: point.choice for name, point in spent.picks.items()}
    planned = tuple(chosen.get(item.weight.name, item) for item in plan.planned)
    return dataclasses.replace(plan, planned=planned, notes=tuple(notes)), tuple(records)


def shares(budget: Budget, plan: Plan) -> Iterator[Share]:
    """What each ceiling of a budget is spent on."""
    linear = tuple(item for item in plan.planned if "linear" in item.weight.kinds)
    tables = tuple(item for item in plan.planned if "linear" not in item.weight.kinds)
    if budget.size is not None:
        # What is not weights depends on what is chosen: see `spend`.
        yield Share(BudgetRecord("size", budget.size), plan.planned, 8 * budget.size, 0, 8)
    for what, asked, items in (("bits", budget.bits, linear), ("table_bits", budget.table_bits, tables)):
        if asked is not None and items:
            elements = _elements(items)
            yield Share(BudgetRecord(what, asked), items, int(asked * elements), 0, elements)


def _within_error(measured: Curves, ceiling: float) -> tuple[dict[str, Point[Planned]], BudgetRecord]:
    """The cheapest formats whose expected error stays within a ceiling."""
    if measured.kind == "layer":
        why = "; ".join(measured.notes) or "the recipe weighs errors by layers"
        raise BudgetError(f"What rounding does to the outputs is not known, so no error can be promised: {why}.")
    least = _error(measured.kind, sum(min(point.loss for point in points) for points in measured.points.values()))
    if least > ceiling:
        raise BudgetError(
            f"An error of {ceiling:g} is below {least:.4g}, what the widest formats are expected to come to. "
            "Allow more, or keep weights in float by rules."
        )
    picks = cheapest(measured.points, _loss_of(measured.kind, ceiling))
    got = _error(measured.kind, sum(point.loss for point in picks.values()))
    return picks, BudgetRecord("max_error", ceiling, least, got)


def _error(kind: str, loss: float) -> float:
    """A summed loss as the error that people name: relative, or in nats."""
    return loss / 2 if kind == "fisher" else math.sqrt(loss)


def _loss_of(kind: str, error: float) -> float:
    """Undoes `_error`."""
    return 2 * error if kind == "fisher" else error**2


def _expected(kind: str, loss: float, what: str) -> str:
    error = _error(kind, loss)
    named = f"a divergence of {error:.3g} nats" if kind == "fisher" else f"a relative error of {error:.1%}"
    of = {"size": "all weights", "bits": "products' weights", "table_bits": "tables"}[what]
    return f"expected of the outputs for the rounding of {of}: {named}"


def _fixed_with(
    loaded: LoadedModel, plan: Plan, picks: Mapping[str, Point[Planned]], *, stock: bool, spare: int
) -> int:
    """See `fixed_bytes`, of a plan that takes these formats."""
    planned = tuple(picks[item.weight.name].choice for item in plan.planned)
    return fixed_bytes(loaded, dataclasses.replace(plan, planned=planned), stock=stock) - spare


@dataclasses.dataclass(frozen=True)
class Spent:
    """What a share was spent on, and in its record's unit the least possible and what it came to."""

    picks: Mapping[str, Point[Planned]]
    floor: float
    got: float


def spend(
    curves: Mapping[str, Sequence[Point[Planned]]],
    share: Share,
    fixed_with: Callable[[Mapping[str, Point[Planned]]], int],
    allocate: Callable[[Mapping[str, Sequence[Point[Planned]]], int], Mapping[str, Point[Planned]]] = allocate,
) -> Spent:
    """Spends a share. The bytes of a file hold more function bodies and frames, the more kinds of formats are chosen.

    Args:
        curves: of its weights.
        share: what to spend.
        fixed_with: bytes of what is no weight, with these formats.
        allocate: chooses points within so many bits.

    Raises:
        BudgetError: the narrowest formats are above it.
    """
    narrowest = {name: min(curve, key=lambda point: point.bits) for name, curve in curves.items()}
    least = total_bits(narrowest)
    if share.record.what != "size":
        picks = allocate(curves, share.bits)
        return Spent(picks, share.told(least), share.told(total_bits(picks)))
    size, fixed = int(share.record.asked), fixed_with(narrowest)
    lean = dataclasses.replace(share, fixed=fixed)
    floor = lean.told(least)
    if floor > size:
        raise BudgetError(
            f"A size of {size:,} bytes is below the floor of {floor:,.0f} bytes for this model: {fixed:,} bytes are "
            f"not weights; the narrowest formats of its weights take {floor - fixed:,.0f}."
        )
    for _ in range(_TRIES):
        if 8 * (size - fixed) < least:
            break
        wished = allocate(curves, 8 * (size - fixed))
        needed = dataclasses.replace(share, fixed=fixed_with(wished))
        if needed.told(total_bits(wished)) <= size:
            return Spent(wished, floor, needed.told(total_bits(wished)))
        fixed = max(needed.fixed, fixed + 1)
    return Spent(narrowest, floor, floor)


def total_bits(picks: Mapping[str, Point[Planned]]) -> int:
    """Of all weights together."""
    return sum(point.bits for point in picks.values())


def _elements(items: Sequence[Planned]) -> int:
    return sum(item.weight.batch * item.weight.n * item.weight.k for item in items)


def _frames(plan: Plan) -> list[Frame]:
    """The frames that a plan's weights share, or may share."""
    frames = {}
    for item in plan.planned:
        for option in item.options:
            format = option.formats[0]
            if isinstance(format, FramedFormat):
                for frame in frames_of(format, item.weight.n, item.weight.k):
                    if frame is not None:
                        frames[frame.key] = frame
    return list(frames.values())


def _order_bytes(plan: Plan) -> int:
    """Of the orders of inputs that mixed depths may store, one for each tensor that weights read; and their tables."""
    inputs = {
        id(item.weight.sites[0].input): item.weight.k
        for item in plan.planned
        if any(option.mixed for option in item.options)
    }
    return sum(2 * k + _ALIGNMENT for k in inputs.values()) + (_TABLE_BYTES if inputs else 0)


_OPS: dict[type, tuple[str, str | None]] = {
    UniformFormat: ("LowBitMatMul", "LowBitGather"),
    CodebookFormat: ("CodebookMatMul", None),
    MixedFormat: ("MixedBitMatMul", None),
    Float8Format: ("Float8MatMul", "Float8Gather"),
    BinaryFormat: ("BinaryCodeMatMul", "MixedBitGather"),
}
"""The ops of a format's products and look-ups."""


def _op_types(plan: Plan) -> list[str]:
    """Names of the ops that a plan's forms may be made of."""
    found: set[str] = set()
    for item in plan.planned:
        products, look_ups = "linear" in item.weight.kinds, "table" in item.weight.kinds
        for format in (format for option in item.options for format in option.formats):
            inner = format
            if isinstance(format, FramedFormat):
                found |= {"FrameAnalysis", "FrameSynthesis"}
                inner = format.inner
            if isinstance(inner, BinaryFormat) and _in_stock_ops(item):
                continue
            product, look_up = _OPS[type(inner)]
            found |= {product} if products else set()
            found |= {look_up} if look_ups and look_up is not None else set()
        inputs = item.recipe.linear.inputs
        if products and inputs is not None and inputs.kind != "int8":
            found.add("Float8RoundTokens" if inputs.scale == "token" else "Float8Round")
    return sorted(found)


def _frame_bytes(frame: Frame, stock: bool) -> int:
    """Of what forms store of a frame: its own arrays, or the matrices of its transform."""
    return sum(array.nbytes for array in frame.matrices().values()) if stock else frame.cost_bits() // 8


def _in_stock_ops(item: Planned) -> bool:
    """Whether binary codes of a weight take no function: see `onnxq.passes.forms.planes`."""
    return item.recipe.target == "stock" and item.weight.k % BLOCK_K == 0


def _node_bytes(plan: Plan) -> int:
    """Of the nodes of binary weights in stock ops, where a site is many, with names of the site and the weight."""
    total = 0
    for item in filter(_in_stock_ops, plan.planned):
        formats = [format for option in item.options for format in option.formats if isinstance(format, BinaryFormat)]
        for site in item.weight.sites if formats else ():
            product = site.kind == "linear"
            nodes = max(planes_nodes(format, products=product, look_ups=not product) for format in formats)
            total += item.weight.batch * nodes * (110 + 5 * (len(item.weight.name) + len(site.name)) // 2)
    return total


def fixed_bytes(loaded: LoadedModel, plan: Plan, *, stock: bool = False) -> int:
    """Upper bound of what the written files hold besides the weights: kept constants, graph, functions, report."""
    kept = sum(record.bytes + _ALIGNMENT + _REPORT_BYTES_PER_KEPT for record in plan.kept)
    kept += sum(item.weight.bytes for item in plan.planned if item.weight.other_uses)
    kept += sum(_frame_bytes(frame, stock) + 3 * _ALIGNMENT for frame in _frames(plan))
    kept += _order_bytes(plan)
    # The graph without its tensors: the source files less all that is stored in them.
    tensors = sum(record.bytes for record in plan.kept) + sum(item.weight.bytes for item in plan.planned)
    graph = max(loaded.bytes_on_disk - tensors, 0)
    opset = loaded.opset
    functions = sum(
        len(ir.to_proto(function).SerializeToString())
        for op_type in _op_types(plan)
        for function in ops.functions_for(op_type, opset)
    )
    # The model carries its recipe twice, as YAML and in the report.
    recipe = plan.planned[0].recipe
    about = len(recipe.to_yaml()) + len(json.dumps(recipe.to_dict())) + _REPORT_BYTES
    members = sum(item.weight.batch for item in plan.planned)
    graph += _node_bytes(plan)
    return kept + graph + functions + about + members * (_GRAPH_BYTES_PER_WEIGHT + 3 * _ALIGNMENT)
