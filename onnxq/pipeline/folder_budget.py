"""One budget for all graphs of a folder.

A weight that several graphs hold is one choice. Losses of layers become losses of the folder's results where a trace
was recorded (`onnxq.pipeline.scan`); elsewhere they are relative errors of layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from onnxq.allocation.budget import Point, allocate_priced, cheapest
from onnxq.calibration.trace import Trace
from onnxq.errors import BudgetError
from onnxq.graph import Weight
from onnxq.graph.shared import Shared
from onnxq.pipeline.budget import Budget, Share, fixed_bytes, shares, spend
from onnxq.pipeline.curve_cache import CurveCache, Curves
from onnxq.pipeline.curves import measure_curves
from onnxq.pipeline.job import Job
from onnxq.pipeline.plan import Plan, Planned
from onnxq.pipeline.scan import Scanned, scan
from onnxq.report.records import BudgetRecord
from onnxq.sensitivity.replay import Replay

Points = dict[str, list[Point[Planned]]]


@dataclasses.dataclass(frozen=True)
class FittedFolder:
    """Jobs with formats chosen, what each ceiling came to, and what should be said."""

    jobs: dict[str, Job]
    records: tuple[BudgetRecord, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Lead:
    """A weight in the graph that solves it.

    Attributes:
        graph: that graph.
        item: its plan there; the weight is renamed, so that names are unique in the folder.
        original: the plan with its own name.
        holders: graph and weight of all that plan it.
    """

    graph: str
    item: Planned
    original: Planned
    holders: tuple[tuple[str, Weight], ...]


def fit_folder(
    budget: Budget, jobs: Mapping[str, Job], shared: Shared, trace: Trace | None, cache: Path | None
) -> FittedFolder:
    """Chooses formats for the weights of all graphs so that the budget holds.

    Args:
        budget: the ceilings; a size is that of all graphs.
        jobs: by graph, in the order in which they will be solved.
        shared: what they share.
        trace: of their loop, or None.
        cache: where curves are kept, or None.

    Raises:
        BudgetError: see `onnxq.pipeline.budget.fit_budget`.
    """
    leads = _leads(jobs, shared)
    curves = _curves(leads, jobs, trace, cache)
    names = {lead.item.weight.name: content for content, lead in leads.items()}
    picks: dict[str, Point[Planned]] = {}
    records, notes = [], [*curves.notes]
    prices = _prices(leads, jobs, trace)
    if budget.max_error is not None:
        picks, record = _within_error(curves, budget.max_error)
        records.append(record)
    else:
        everything = Plan(tuple(lead.item for lead in leads.values()), (), ())
        for share in shares(budget, everything):
            offered = {
                item.weight.name: _times(curves.points[item.weight.name], leads[names[item.weight.name]], share)
                for item in share.items
            }
            spent = spend(
                offered,
                share,
                lambda chosen: _fixed(jobs, shared, {names[name]: point.choice for name, point in chosen.items()}),
                lambda points, bits: allocate_priced(points, bits, prices),
            )
            picks |= spent.picks
            records.append(dataclasses.replace(share.record, floor=spent.floor, got=spent.got))
    if curves.kind == "kl":
        loss = sum(point.loss for point in picks.values())
        notes.append(
            f"expected of the results for the rounding of all weights: a divergence of {loss:.3g} nats a token"
        )
    chosen = {names[name]: point.choice for name, point in picks.items()}
    fitted = {name: dataclasses.replace(job, plan=_chosen(job, name, shared, chosen)) for name, job in jobs.items()}
    return FittedFolder(fitted, tuple(records), tuple(notes))


def _leads(jobs: Mapping[str, Job], shared: Shared) -> dict[tuple[str, ...], _Lead]:
    """The weights of all graphs by what they hold, each in the first job that plans it.

    A weight that a pass made of another is in no other graph.
    """
    leads: dict[tuple[str, ...], _Lead] = {}
    for graph, job in jobs.items():
        for item in job.plan.planned:
            content = _content(graph, item.weight, shared)
            if content in leads:
                before = leads[content]
                leads[content] = dataclasses.replace(before, holders=(*before.holders, (graph, item.weight)))
                continue
            name = f"{Path(graph).stem}/{item.weight.name}"
            renamed = dataclasses.replace(item, weight=dataclasses.replace(item.weight, name=name))
            leads[content] = _Lead(graph, renamed, item, ((graph, item.weight),))
    return leads


def _content(graph: str, weight: Weight, shared: Shared) -> tuple[str, ...]:
    return shared.contents.get((graph, weight.name), (graph, weight.name))


def _curves(
    leads: Mapping[tuple[str, ...], _Lead], jobs: Mapping[str, Job], trace: Trace | None, cache: Path | None
) -> Curves:
    """Points of every weight by its name in the folder, a loss of the results each where there is a trace."""
    items = [lead.item for lead in leads.values()]
    kept = CurveCache(cache, {graph: job.identity() for graph, job in jobs.items()})
    known = kept.load(items)
    if known is not None:
        return dataclasses.replace(known, notes=(*known.notes, "rate and error were measured by an earlier run"))
    points = _layer_points(leads, jobs, nearest=False)
    if trace is None:
        note = "no trace was recorded: weights count by the relative errors of their layers"
        curves = Curves(points, "layer", (note,))
    else:
        curves = _scanned(points, leads, jobs, trace)
    kept.save(items, curves)
    return curves


def _layer_points(leads: Mapping[tuple[str, ...], _Lead], jobs: Mapping[str, Job], *, nearest: bool) -> Points:
    """Curves of layers, from the graph that solves each weight; as they will be solved, or rounded to nearest."""
    points: Points = {}
    for graph, job in jobs.items():
        mine = [lead for lead in leads.values() if lead.graph == graph]
        items = [_rounded_to_nearest(lead.original) if nearest else lead.original for lead in mine]
        measured = measure_curves(items, job.stages, None, job.progress)
        for lead in mine:
            points[lead.item.weight.name] = list(measured[lead.original.weight.name])
    return points


def _rounded_to_nearest(item: Planned) -> Planned:
    solver = dataclasses.replace(item.solver, name="nearest")
    return dataclasses.replace(item, solver=solver, alternatives=())


def _scanned(points: Points, leads: Mapping[tuple[str, ...], _Lead], jobs: Mapping[str, Job], trace: Trace) -> Curves:
    """Losses of layers as those of the results."""
    first = next(iter(jobs.values()))
    nearest = _layer_points(leads, jobs, nearest=True)
    first.progress.start("playing the trace", None)
    replay = Replay(
        trace.head(first.recipe.allocation.samples),
        {graph: job.loaded.path for graph, job in jobs.items()},
        first.threads,
    )
    weights = {
        lead.item.weight.name: Scanned(lead.original, nearest[lead.item.weight.name], lead.holders)
        for lead in leads.values()
    }
    costs = scan(weights, replay, first.progress)
    members: dict[str, int] = {}
    for weight in weights.values():
        members[weight.unit] = members.get(weight.unit, 0) + 1
    scaled = {
        name: [
            # What a sub-layer's weights lose together decides how dear it is; here all are taken to lose alike.
            dataclasses.replace(
                point, loss=point.loss * costs[weights[name].unit].factor(point.loss * members[weights[name].unit])
            )
            for point in curve
        ]
        for name, curve in points.items()
    }
    note = f"errors of {len(costs)} sub-layers were measured on {replay.trace.sequences} samples of the trace"
    return Curves(scaled, replay.kind, (note,))


def _prices(leads: Mapping[tuple[str, ...], _Lead], jobs: Mapping[str, Job], trace: Trace | None) -> dict[str, float]:
    """What a bit of each weight counts: its place on disk, and how often a token is multiplied with it."""
    weight = next(iter(jobs.values())).recipe.allocation.read_weight
    prices = {}
    for lead in leads.values():
        reads = 0.0
        if trace is not None:
            reads = sum(trace.calls_per_step(graph) for graph, held in lead.holders if "linear" in held.own_kinds)
        prices[lead.item.weight.name] = 1.0 + weight * reads
    return prices


def _times(curve: list[Point[Planned]], lead: _Lead, share: Share) -> list[Point[Planned]]:
    """Points of a weight, under a ceiling of bytes as often as its bytes may be stored.

    Files refer to each other's data (`onnxq.graph.pool`); but stock forms differ with what reads a weight.
    """
    stock = lead.item.recipe.target == "stock"
    copies = len(lead.holders) if share.record.what == "size" and stock else 1
    return [dataclasses.replace(point, bits=point.bits * copies) for point in curve]


def _fixed(jobs: Mapping[str, Job], shared: Shared, chosen: Mapping[tuple[str, ...], Planned]) -> int:
    """What all files hold besides the weights, with these formats."""
    total = 0
    for graph, job in jobs.items():
        plan = _chosen(job, graph, shared, chosen)
        stock = job.recipe.target == "stock"
        total += fixed_bytes(job.loaded, plan, stock=stock) if plan.planned else job.loaded.bytes_on_disk
    return total


def _chosen(job: Job, graph: str, shared: Shared, chosen: Mapping[tuple[str, ...], Planned]) -> Plan:
    """A graph's plan with the formats that the folder chose."""
    planned = []
    for item in job.plan.planned:
        choice = chosen.get(_content(graph, item.weight, shared))
        planned.append(item if choice is None else dataclasses.replace(choice, weight=item.weight))
    return dataclasses.replace(job.plan, planned=tuple(planned))


def _within_error(curves: Curves, ceiling: float) -> tuple[dict[str, Point[Planned]], BudgetRecord]:
    """The cheapest formats whose expected loss of the results stays within a ceiling."""
    if curves.kind == "layer":
        raise BudgetError(
            "What rounding does to the results of several graphs is not known without a trace: give --calibration "
            "with a text for the model to translate, or a recorded trace."
        )

    def told(loss: float) -> float:
        return loss if curves.kind == "kl" else loss**0.5

    least = told(sum(min(point.loss for point in points) for points in curves.points.values()))
    if least > ceiling:
        raise BudgetError(
            f"An error of {ceiling:g} is below {least:.4g}, what the widest formats are expected to come to. "
            "Allow more, or keep weights in float by rules."
        )
    picks = cheapest(curves.points, ceiling if curves.kind == "kl" else ceiling**2)
    return picks, BudgetRecord("max_error", ceiling, least, told(sum(point.loss for point in picks.values())))
