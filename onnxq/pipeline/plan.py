"""What the recipe means for each constant of a model: a format and a solver, or a reason to leave it alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import numpy as np

from onnxq.calibration.statistics import Level
from onnxq.formats import packing
from onnxq.formats.binary import MOST_PLANES, BinaryFormat
from onnxq.formats.codebook import CodebookFormat
from onnxq.formats.files import AnyFormat
from onnxq.formats.float8 import Float8Format
from onnxq.formats.framed import FramedFormat, frames_of
from onnxq.formats.mixed import LARGEST_INPUTS, MixedFormat
from onnxq.frames import Frame
from onnxq.graph import SiteReport, Weight
from onnxq.passes.forms.kernel import FLOAT_ACTIVATIONS, INT8_ACTIVATIONS
from onnxq.passes.rewrite import site_refusal
from onnxq.recipe import BinarySpec, Float8Spec, GridSpec, LinearPlan, Recipe, SolverSpec, TablePlan
from onnxq.report.records import KeptRecord
from onnxq.solvers.mixed import bands_of

_STOCK_WIDTHS = (2, 4, 8)
_FEWEST_OUTPUTS = 128
"""Of mixed depths: their trellises go through tiles of 32, and in fewer than 4 they gain nothing."""
_UNMIXED = (
    f"depths mix in single weights of at least {_FEWEST_OUTPUTS} outputs and at most {LARGEST_INPUTS} inputs, "
    "which no look-up reads"
)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A weight that will be quantised.

    Attributes:
        weight: where it is.
        formats: how it may be stored, all at about one price; the one with the least loss is kept.
        solver: what will choose the codes.
        grid: what the recipe asked for.
        recipe: what was applied to it: the run's, without the frame for a weight that is in its frame already.
        accuracy_level: activations of its products, as in MatMulNBits.
        note: what the report should say of the plan, or empty.
        alternatives: other plans, of which a budget may take one instead.
    """

    weight: Weight
    formats: tuple[AnyFormat, ...]
    solver: SolverSpec
    grid: GridSpec
    recipe: Recipe
    accuracy_level: int
    note: str = ""
    alternatives: tuple[Planned, ...] = ()

    @property
    def options(self) -> tuple[Planned, ...]:
        """Every plan of the weight: this one, then its alternatives."""
        return (dataclasses.replace(self, alternatives=()), *self.alternatives)

    @property
    def mixed(self) -> bool:
        """Whether depths change inside the weight; until a budget chooses them they are all alike."""
        return isinstance(self.formats[0], MixedFormat)

    @property
    def cost_bits(self) -> int:
        """Exact price of the whole stack, in bits."""
        return self.weight.batch * max(format.cost_bits(self.weight.n, self.weight.k) for format in self.formats)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that its formats have; of depths that are mixed, those that a block may have."""
        if isinstance(self.formats[0], Float8Format):
            return (8,)
        if isinstance(self.formats[0], BinaryFormat):
            return tuple(range(1, MOST_PLANES + 1))
        return _STOCK_WIDTHS if self.recipe.target == "stock" else tuple(range(1, 9))

    def formats_at(self, bits: int) -> tuple[AnyFormat, ...]:
        """How it may be stored at one of its widths, all at one price."""
        if isinstance(self.formats[0], Float8Format):
            return self.formats
        if isinstance(self.formats[0], BinaryFormat):
            spec = _codes(self.recipe.linear if "linear" in self.weight.kinds else self.recipe.tables)
            assert isinstance(spec, BinarySpec), "binary formats come from such a specification"
            return (spec.format(self.weight.n, bits),)
        return _formats(self.weight, self.recipe, dataclasses.replace(self.grid, bits=bits))

    @property
    def label(self) -> str:
        """The formats in words."""
        return " or ".join(format.label() for format in self.formats)

    @property
    def statistics_level(self) -> Level:
        """What calibration has to gather for the solver, and for mixed depths to be chosen."""
        if "linear" not in self.weight.kinds:
            return "none"
        return "full" if self.solver.name == "error-feedback" else "diagonal"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every constant of a model: planned or kept, with reasons.

    Attributes:
        planned: in the order of first use.
        kept: what stays as it is.
        notes: sentences that no single constant owns.
    """

    planned: tuple[Planned, ...]
    kept: tuple[KeptRecord, ...]
    notes: tuple[str, ...]


def make_plan(
    found: SiteReport,
    recipe: Recipe,
    *,
    calibrated: bool,
    origins: Mapping[str, str] | None = None,
    in_frame: Collection[str] = (),
) -> Plan:
    """Applies a recipe to the constants of a model.

    Args:
        found: the model's weights and the constants that are none.
        recipe: what to do.
        calibrated: whether there will be statistics.
        origins: by name of a weight that another was made into, the name that the recipe's rules know it by.
        in_frame: names of weights that are in their frame already.
    """
    planned: list[Planned] = []
    kept = [
        KeptRecord(item.name, tuple(item.shape), item.dtype.name, item.bytes, item.reason) for item in found.skipped
    ]
    for weight in found.weights:
        origin = (origins or {}).get(weight.name, weight.name)
        decided = _decide(weight, _unframed(recipe) if weight.name in in_frame else recipe, calibrated, origin)
        if isinstance(decided, Planned):
            planned.append(dataclasses.replace(decided, alternatives=_alternatives(weight, recipe, calibrated, origin)))
        else:
            kept.append(KeptRecord(weight.name, tuple(weight.shape), weight.dtype.name, weight.bytes, decided))
    notes = list(found.notes)
    if not calibrated and recipe.linear.solver.name != "nearest":
        notes.append(
            "no calibration data: weights are rounded to nearest without regard to their inputs. "
            "Give data with --calibration for error feedback, which is far better below 4 bits."
        )
    return Plan(tuple(planned), tuple(kept), tuple(notes))


def _alternatives(weight: Weight, recipe: Recipe, calibrated: bool, name: str) -> tuple[Planned, ...]:
    """What the recipe's other plans make of a weight that no rule speaks of and products alone read."""
    if weight.kinds != ("linear",) or recipe.rule_for([name, *(site.name for site in weight.sites)]) is not None:
        return ()
    others = (dataclasses.replace(recipe, linear=plan) for plan in recipe.alternatives)
    decided = (_decide(weight, other, calibrated, name) for other in others)
    return tuple(item for item in decided if isinstance(item, Planned))


def _decide(weight: Weight, recipe: Recipe, calibrated: bool, name: str) -> Planned | str:
    """A plan for a weight that rules know by a name, or the reason why it stays in float."""
    for site in weight.sites:
        refusal = site_refusal(site, weight)
        if refusal is not None:
            return f"{site.name}: {refusal}"
    rule = recipe.rule_for([name, *(site.name for site in weight.sites)])
    if rule is not None and rule.keep:
        return f"kept by the rule {rule.match!r}"
    elements = weight.batch * weight.n * weight.k
    if elements < recipe.min_elements:
        return f"{elements} elements, fewer than min_elements {recipe.min_elements}"
    linear = "linear" in weight.kinds
    grid = recipe.linear.grid if linear else recipe.tables.grid
    if rule is not None:
        grid = rule.grid
    codes = None if rule is not None else _codes(recipe.linear if linear else recipe.tables)
    if grid is None:
        if codes is None:
            return "a table, and the recipe leaves tables alone"
        grid = GridSpec(8)
    solver = recipe.linear.solver
    if not calibrated or not linear:
        # How often a row is looked up scales its whole error and moves no optimum: nearest is right for tables.
        solver = dataclasses.replace(solver, name="nearest")
    if linear:
        recipe.linear.require_levels(grid, "the recipe's grid" if rule is None else f"the rule {rule.match!r}")
    else:
        solver = dataclasses.replace(solver, levels="search")
    level = _accuracy_level(recipe)
    mixed = rule is None and _mixes(weight, recipe)
    formats = _flat(weight, recipe) if mixed else _formats(weight, recipe, grid, codes)
    remarks = _remarks(weight, formats, grid)
    if linear and rule is None and recipe.linear.mixed is not None and not mixed:
        remarks.append(f"one depth: {_UNMIXED}")
    planned = Planned(weight, formats, solver, grid, recipe, level, "; ".join(remarks))
    if planned.cost_bits >= 8 * weight.bytes:
        return f"{planned.label} would take {planned.cost_bits // 8} bytes, no fewer than it has"
    return planned


def _mixes(weight: Weight, recipe: Recipe) -> bool:
    """Whether a recipe's mixed depths serve a weight."""
    fits = weight.kinds == ("linear",) and weight.batch == 1 and weight.k <= LARGEST_INPUTS
    return recipe.linear.mixed is not None and fits and weight.n >= _FEWEST_OUTPUTS


def _flat(weight: Weight, recipe: Recipe) -> tuple[AnyFormat, ...]:
    """The mixed format of a weight before a budget chooses its depths: all alike, inputs as they lie."""
    assert recipe.linear.mixed is not None
    band = bands_of(weight.n, recipe.linear.mixed.band)
    shape = packing.ceil_div(weight.n, band), packing.ceil_div(weight.k, packing.BLOCK_K)
    return (MixedFormat.of(band, np.arange(weight.k), np.full(shape, recipe.linear.grid.bits)),)


def _unframed(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, linear=dataclasses.replace(recipe.linear, frame=None))


def frame_of(weight: Weight, recipe: Recipe) -> Frame | None:
    """The frame of the inputs that a recipe puts a weight in; None where there is none, or one of outputs beside it."""
    decided = _decide(weight, recipe, False, weight.name)
    if isinstance(decided, str) or weight.kinds != ("linear",):
        return None
    format = decided.formats[0]
    if not isinstance(format, FramedFormat) or format.output_redundancy is not None:
        return None
    return frames_of(format, weight.n, weight.k)[0]


def is_planned(weight: Weight, recipe: Recipe) -> bool:
    """Whether a recipe quantises a weight, with calibration data or without."""
    return isinstance(_decide(weight, recipe, False, weight.name), Planned)


def _formats(
    weight: Weight, recipe: Recipe, grid: GridSpec, codes: Float8Spec | BinarySpec | None = None
) -> tuple[AnyFormat, ...]:
    """How a weight may be stored on a grid under a recipe, all at one price; or in other codes."""
    if isinstance(codes, BinarySpec):
        return (codes.format(weight.n, codes.planes),)
    if codes is not None and not codes.or_grid:
        return (codes.format,)
    formats = recipe.formats(grid, products="linear" in weight.kinds, look_ups="table" in weight.kinds)
    return formats if codes is None else (codes.format, *formats)


def _codes(plan: LinearPlan | TablePlan) -> Float8Spec | BinarySpec | None:
    """What a plan has in place of its grid."""
    return plan.float8 if plan.binary is None else plan.binary


def _accuracy_level(recipe: Recipe) -> int:
    """Activations of the kernels: those that were rounded in front of a product are taken as they are."""
    inputs = recipe.linear.inputs
    if inputs is not None:
        return INT8_ACTIVATIONS if inputs.scale == "dynamic" else FLOAT_ACTIVATIONS
    return INT8_ACTIVATIONS if recipe.linear.activations == "int8" else FLOAT_ACTIVATIONS


def _remarks(weight: Weight, formats: tuple[AnyFormat, ...], grid: GridSpec) -> list[str]:
    """What became of wishes that sizes or readers don't allow."""
    if isinstance(formats[0], MixedFormat):
        return []
    remarks = []
    framed = formats[0] if isinstance(formats[0], FramedFormat) else None
    if framed is not None:
        got = framed.coefficients(weight.n, weight.k)[1] / weight.k
        if abs(got - framed.redundancy) > 1e-3:
            remarks.append(f"redundancy {got:.4g} for {float(framed.redundancy):.4g}, with {weight.k} inputs")
    inner = formats[0] if framed is None else framed.inner
    if grid.window is not None and not isinstance(inner, CodebookFormat):
        remarks.append("equal steps: no table of levels serves it")
    return remarks
