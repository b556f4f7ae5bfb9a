"""What the recipe means for each constant of a model: a format and a solver, or a reason to leave it alone."""

from __future__ import annotations

import dataclasses

from onnxq.calibration.statistics import Level
from onnxq.formats.uniform import UniformFormat
from onnxq.graph import SiteReport, Weight
from onnxq.passes.forms.kernel import FLOAT_ACTIVATIONS, INT8_ACTIVATIONS
from onnxq.passes.rewrite import site_refusal
from onnxq.recipe import Recipe, SolverSpec
from onnxq.report.records import KeptRecord


@dataclasses.dataclass(frozen=True)
class Planned:
    """A weight that will be quantised.

    Attributes:
        weight: where it is.
        formats: how it may be stored, all at one price; the one with the least loss is kept.
        solver: what will choose the codes.
        accuracy_level: activations of its products, as in MatMulNBits.
        note: what the report should say of the plan, or empty.
    """

    weight: Weight
    formats: tuple[UniformFormat, ...]
    solver: SolverSpec
    accuracy_level: int
    note: str = ""

    @property
    def cost_bits(self) -> int:
        """Exact price of the whole stack, in bits."""
        return self.weight.batch * self.formats[0].cost_bits(self.weight.n, self.weight.k)

    @property
    def label(self) -> str:
        """The formats in words."""
        return " or ".join(format.label() for format in self.formats)

    @property
    def statistics_level(self) -> Level:
        """What calibration has to gather for the solver."""
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


def make_plan(found: SiteReport, recipe: Recipe, *, calibrated: bool) -> Plan:
    """Applies a recipe to the constants of a model.

    Args:
        found: the model's weights and the constants that are none.
        recipe: what to do.
        calibrated: whether there will be statistics.
    """
    planned: list[Planned] = []
    kept = [
        KeptRecord(item.name, tuple(item.shape), item.dtype.name, item.bytes, item.reason) for item in found.skipped
    ]
    for weight in found.weights:
        decided = _decide(weight, recipe, calibrated)
        if isinstance(decided, Planned):
            planned.append(decided)
        else:
            kept.append(KeptRecord(weight.name, tuple(weight.shape), weight.dtype.name, weight.bytes, decided))
    notes = list(found.notes)
    if not calibrated and recipe.linear.solver.name != "nearest":
        notes.append(
            "no calibration data: weights are rounded to nearest without regard to their inputs. "
            "Give data with --calibration for error feedback, which is far better below 4 bits."
        )
    return Plan(tuple(planned), tuple(kept), tuple(notes))


def _decide(weight: Weight, recipe: Recipe, calibrated: bool) -> Planned | str:
    """A plan for a weight, or the reason why it stays in float."""
    for site in weight.sites:
        refusal = site_refusal(site, weight)
        if refusal is not None:
            return f"{site.name}: {refusal}"
    rule = recipe.rule_for([weight.name, *(site.name for site in weight.sites)])
    if rule is not None and rule.keep:
        return f"kept by the rule {rule.match!r}"
    elements = weight.batch * weight.n * weight.k
    if elements < recipe.min_elements:
        return f"{elements} elements, fewer than min_elements {recipe.min_elements}"
    linear = "linear" in weight.kinds
    grid = recipe.linear.grid if linear else recipe.tables.grid
    if rule is not None:
        grid = rule.grid
    if grid is None:
        return "a table, and the recipe leaves tables alone"
    solver = recipe.linear.solver
    if not calibrated or not linear:
        # How often a row is looked up scales its whole error and moves no optimum: nearest is right for tables.
        solver = dataclasses.replace(solver, name="nearest")
    level = INT8_ACTIVATIONS if recipe.linear.activations == "int8" else FLOAT_ACTIVATIONS
    planned = Planned(weight, grid.formats(recipe.target), solver, level)
    if planned.cost_bits >= 8 * weight.bytes:
        return f"{planned.label} would take {planned.cost_bits // 8} bytes, no fewer than it has"
    return planned
