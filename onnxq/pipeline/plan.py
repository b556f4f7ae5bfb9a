"""What the recipe means for each constant of a model: a format and a solver, or a reason to leave it alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

import numpy as np

from onnxq.calibration.statistics import Level
from onnxq.errors import RecipeError
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
from onnxq.pipeline.words import Words, words_of
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
        codes: what it asked for in place of the grid, or None.
        recipe: what was applied to it: the run's, without the frame for a weight that is in its frame already.
        accuracy_level: activations of its products, as in MatMulNBits.
        note: what the report should say of the plan, or empty.
        alternatives: other plans, of which a budget may take one instead.
        trained: its values are what encodings decode to that were given with the model, and that it takes.
        words: what decides the planes of its rows one by one; None where all have as many.
        rows: int32 [N], its rows in the order in which they are stored; None for natural.
    """

    weight: Weight
    formats: tuple[AnyFormat, ...]
    solver: SolverSpec
    grid: GridSpec
    recipe: Recipe
    accuracy_level: int
    note: str = ""
    alternatives: tuple[Planned, ...] = ()
    trained: bool = False
    codes: Float8Spec | BinarySpec | None = None
    words: Words | None = None
    rows: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

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
        """The widths that its formats have; of depths that are mixed, those that a block may have.

        A trained weight has the one that it was trained to, called 0.
        """
        if self.trained:
            return (0,)
        if isinstance(self.formats[0], Float8Format):
            return (8,)
        if isinstance(self.formats[0], BinaryFormat):
            return tuple(range(1, MOST_PLANES + 1))
        return _STOCK_WIDTHS if self.recipe.target == "stock" else tuple(range(1, 9))

    def formats_at(self, bits: int) -> tuple[AnyFormat, ...]:
        """How it may be stored at one of its widths, all at one price."""
        if self.trained or isinstance(self.formats[0], Float8Format):
            return self.formats
        if isinstance(self.formats[0], BinaryFormat):
            assert isinstance(self.codes, BinarySpec), "binary formats come from such a specification"
            return (self.codes.format(self.weight.n, bits),)
        return _formats(self.weight, self.recipe, dataclasses.replace(self.grid, bits=bits))

    def with_planes(self, planes: np.ndarray) -> Planned:
        """The plan with planes of every row, int [N], in place of its formats."""
        assert isinstance(self.codes, BinarySpec), "planes are of binary codes"
        format, rows = self.codes.by_row(planes)
        return dataclasses.replace(self, formats=(format,), rows=rows)

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

    def keeping_all(self, reason: str) -> Plan:
        """The plan of a model that stays as it is."""
        stay = tuple(
            KeptRecord(item.weight.name, item.weight.shape, item.weight.dtype.name, item.weight.bytes, reason)
            for item in self.planned
        )
        return Plan((), (*self.kept, *stay), self.notes)


def make_plan(
    found: SiteReport,
    recipe: Recipe,
    *,
    calibrated: bool,
    origins: Mapping[str, str] | None = None,
    in_frame: Collection[str] = (),
    trained: Callable[[Weight], tuple[AnyFormat, ...] | None] | None = None,
    counts: Callable[[Weight], np.ndarray | None] | None = None,
) -> Plan:
    """Applies a recipe to the constants of a model.

    Args:
        found: the model's weights and the constants that are none.
        recipe: what to do.
        calibrated: whether there will be statistics.
        origins: by name of a weight that another was made into, the name that the recipe's rules know it by.
        in_frame: names of weights that are in their frame already.
        trained: gives the formats of weights that were trained to what encodings decode to, None for others.
        counts: gives how often each row of a table is looked up, int64 [N], None where it was not counted.
    """
    planned: list[Planned] = []
    kept = [
        KeptRecord(item.name, tuple(item.shape), item.dtype.name, item.bytes, item.reason) for item in found.skipped
    ]
    for weight in found.weights:
        origin = (origins or {}).get(weight.name, weight.name)
        decided = _decide(weight, _unframed(recipe) if weight.name in in_frame else recipe, calibrated, origin)
        formats = None if trained is None else trained(weight)
        if isinstance(decided, Planned) and formats is not None:
            planned.append(_as_trained(decided, formats))
            continue
        if isinstance(decided, Planned):
            decided = _with_words(decided, counts)
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


def _as_trained(planned: Planned, formats: tuple[AnyFormat, ...]) -> Planned:
    """Takes the formats that a weight was trained to, and rounds nothing."""
    note = "trained to these codes: nothing is rounded again"
    solver = dataclasses.replace(planned.solver, name="nearest")
    return dataclasses.replace(planned, formats=formats, solver=solver, note=note, trained=True)


def _alternatives(weight: Weight, recipe: Recipe, calibrated: bool, name: str) -> tuple[Planned, ...]:
    """What the recipe's other plans make of a weight that no rule speaks of and products alone read."""
    if weight.kinds != ("linear",) or recipe.rule_for(_names(weight, name)) is not None:
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
    rule = recipe.rule_for(_names(weight, name))
    if rule is not None and rule.keep:
        return f"kept by the rule {rule.match!r}"
    elements = weight.batch * weight.n * weight.k
    if elements < recipe.min_elements:
        return f"{elements} elements, fewer than min_elements {recipe.min_elements}"
    linear = "linear" in weight.kinds
    plan = recipe.linear if linear else recipe.tables
    grid, codes = (plan.grid, _codes(plan)) if rule is None else (rule.grid, rule.binary)
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
    planned = Planned(weight, formats, solver, grid, recipe, level, "; ".join(remarks), codes=codes)
    return _if_smaller(planned)


def _if_smaller(planned: Planned) -> Planned | str:
    if planned.cost_bits >= 8 * planned.weight.bytes:
        return f"{planned.label} would take {planned.cost_bits // 8} bytes, no fewer than it has"
    return planned


def _with_words(planned: Planned, counts: Callable[[Weight], np.ndarray | None] | None) -> Planned | str:
    """The plan with planes row by row, where the recipe wants them and look-ups read the weight.

    Raises:
        RecipeError: nothing was counted.
    """
    weight, codes = planned.weight, planned.codes
    if not isinstance(codes, BinarySpec) or codes.words is None:
        return planned
    if "table" not in weight.kinds:
        return planned
    if counts is None:
        raise RecipeError(
            f"{weight.name}: bits per word need token counts: give --token-counts TEXT with a tokenizer, or leave "
            '"words" out of the recipe.'
        )
    found = counts(weight)
    if found is not None:
        words = words_of(weight, codes, planned.solver, found)
        return _if_smaller(dataclasses.replace(planned, words=words).with_planes(words.planes()))
    note = "planes are alike in all rows: its look-ups were not counted"
    return dataclasses.replace(planned, note="; ".join(text for text in (planned.note, note) if text))


def _names(weight: Weight, name: str) -> list[str]:
    """What rules may know a weight by: a name, those of its sites, its part."""
    return [name, *(site.name for site in weight.sites), f"part:{weight.part}"]


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
