"""From a planned weight and its statistics to its encoding, one weight in memory at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from onnxq.calibration import Collected, InputStatistics
from onnxq.formats.binary import BinaryFormat
from onnxq.formats.codebook import CodebookEncoding, CodebookFormat
from onnxq.formats.files import AnyEncoding, AnyFormat
from onnxq.formats.float8 import Float8Format
from onnxq.formats.framed import FramedEncoding, FramedFormat, frames_of, into_frames
from onnxq.formats.mixed import MixedFormat
from onnxq.formats.uniform import UniformEncoding, UniformFormat
from onnxq.graph import Weight
from onnxq.graph.shared import content_of
from onnxq.pipeline.bank import EncodingBank
from onnxq.pipeline.plan import Planned
from onnxq.pipeline.resume import ResumeStore
from onnxq.recipe import SolverSpec
from onnxq.solvers.binary import BinaryFit, binary_codes
from onnxq.solvers.binary_feedback import binary_feedback
from onnxq.solvers.error_feedback import error_feedback
from onnxq.solvers.factor import Factor, Order, factorise
from onnxq.solvers.float8 import float8_feedback, float8_nearest
from onnxq.solvers.grid import Grid, search_grid
from onnxq.solvers.loss import relative_error, relative_proxy_loss
from onnxq.solvers.mixed import mixed_feedback
from onnxq.solvers.nearest import nearest
from onnxq.solvers.span import min_max_grid, two_sigma_grid
from onnxq.solvers.spread import best_spread, widened
from onnxq.solvers.trellis import trellis_feedback, trellis_nearest


@dataclasses.dataclass(frozen=True)
class Solved:
    """What became of one weight.

    Attributes:
        encodings: one for each member of a stack.
        solver: the solver's name.
        relative_error, proxy_loss: see `onnxq.report.records.WeightRecord`.
        note: why another solver than the planned one was used, or empty.
    """

    encodings: tuple[AnyEncoding, ...]
    solver: str
    relative_error: float
    proxy_loss: float | None
    note: str


def statistics_of(weight: Weight, collected: Collected) -> InputStatistics | None:
    """The statistics of all inputs that a weight is multiplied with, together; None when none was seen."""
    keys = {collected.sites.get(site.name) for site in weight.sites if site.kind == "linear"}
    merged: InputStatistics | None = None
    for key in sorted(key for key in keys if key is not None):
        found = collected.statistics.get(key)
        if isinstance(found, InputStatistics):
            merged = found if merged is None else merged.merge(found)
    return merged


def solve_weight(
    planned: Planned, statistics: InputStatistics | None, store: ResumeStore, trained: EncodingBank | None = None
) -> Solved:
    """Encodes every member of a weight, unless it was solved already or trained to what an encoding decodes to.

    Peak memory: about three copies of the weight in float32, and what the solver states.
    """
    weight, spec = planned.weight, planned.solver
    note = ""
    moment = None if statistics is None else statistics.second_moment
    if spec.name == "error-feedback" and moment is None:
        spec = dataclasses.replace(spec, name="nearest")
        note = "rounded to nearest: calibration saw no input of it"
    encodings, changed, total, losses, anew = [], 0.0, 0.0, [], False
    for member in _members(weight):
        content = content_of(member)
        encoding = store.load(content) if trained is None or not planned.trained else trained.find(content)
        if encoding is None or encoding.format not in planned.formats:
            encoding, anew = _best(member, planned.formats, spec, statistics, planned.rows), True
            store.save(content, encoding)
        decoded = encoding.dequantize()
        energy = float(np.vdot(member, member))
        changed += relative_error(member, decoded) * energy if energy else 0.0
        total += energy
        if moment is not None:
            losses.append(relative_proxy_loss(member, decoded, moment))
        encodings.append(encoding)
    loss = float(np.mean(losses)) if losses else None
    if not anew:  # an earlier run or another graph of the folder solved it, with what it saw
        spec, note = planned.solver, ""
    solver = "training" if planned.trained else spec.name
    return Solved(tuple(encodings), solver, changed / total if total else 0.0, loss, note)


def encode_nearest(planned: Planned) -> tuple[AnyEncoding, ...]:
    """Every member of a weight rounded to nearest, inputs alike: what a quick trial is made of."""
    spec = SolverSpec(name="nearest")
    return tuple(_best(member, planned.formats, spec, None, planned.rows) for member in _members(planned.weight))


def _members(weight: Weight) -> Iterator[np.ndarray]:
    for index in range(weight.batch):
        yield weight.rows(index * weight.n, (index + 1) * weight.n)


def _best(
    member: np.ndarray,
    formats: Sequence[AnyFormat],
    spec: SolverSpec,
    statistics: InputStatistics | None,
    rows: np.ndarray | None,
) -> AnyEncoding:
    """The encoding with the least loss among formats of one price; rows are stored in an order, or as they lie."""
    domains: dict[Any, _Domain] = {}
    encodings = [_encode(member, format, spec, statistics, domains, rows) for format in formats]
    if len(encodings) == 1:
        return encodings[0]
    return min(encodings, key=lambda encoding: _loss(member, encoding, statistics))


def encode(member: np.ndarray, format: AnyFormat, spec: SolverSpec, statistics: InputStatistics | None) -> AnyEncoding:
    """A weight [N, K] in a format, by the solver that the format and the recipe call for.

    Memory: in a frame the second moment is carried along, which takes two more matrices [K', K'].
    """
    return _encode(member, format, spec, statistics, {})


@dataclasses.dataclass(frozen=True, eq=False)
class _Domain:
    """A weight where a solver sees it, its own inputs or a frame's coefficients; formats there share what is found.

    Attributes:
        weight: float32 [N, K].
        moment: second moment of what it is multiplied with, [K, K]; None where the solver needs none.
        importance: mean squares of it, [K]; None for all alike.
        spec: the solver.
    """

    weight: np.ndarray
    moment: np.ndarray | None
    importance: np.ndarray | None
    spec: SolverSpec

    @functools.cached_property
    def factor(self) -> Factor:
        """Of the second moment."""
        assert self.moment is not None
        return factorise(self.moment, self.weight.shape[1], self.spec.damping, Order(self.spec.order))


def _encode(
    member: np.ndarray,
    format: AnyFormat,
    spec: SolverSpec,
    statistics: InputStatistics | None,
    domains: dict[Any, _Domain],
    rows: np.ndarray | None = None,
) -> AnyEncoding:
    """As `encode`, with the domains that other formats of the weight met, to which it may add one.

    Planes of rows may differ, and `rows` then says in which order they are stored.
    """
    moment = None if statistics is None or spec.name == "nearest" else statistics.second_moment
    importance = None if statistics is None else statistics.diagonal
    if not isinstance(format, FramedFormat):
        domain = domains.setdefault(None, _Domain(member, moment, importance, spec))
        if isinstance(format, MixedFormat):
            return mixed_feedback(member, format, None if moment is None else domain.factor, refit=spec.refit)
        if isinstance(format, Float8Format):
            if domain.moment is None:
                return float8_nearest(member, format, importance)
            return float8_feedback(member, format, domain.factor)
        if isinstance(format, BinaryFormat):
            fit = BinaryFit.GREEDY if spec.levels == "greedy" else BinaryFit.ALTERNATING
            if domain.moment is None:
                return binary_codes(member, format, importance, rows=rows, fit=fit)
            return binary_feedback(member, format, domain.factor, rows=rows)
        return _encode_plain(domain, format)
    inputs, outputs = frames_of(format, *member.shape)
    key = (inputs.key, None if outputs is None else outputs.key)
    if key not in domains:
        # Mixing makes all coefficients alike, so none is more important under nearest rounding.
        carried = None if moment is None else inputs.carry(moment)
        domains[key] = _Domain(into_frames(member, inputs, outputs), carried, None, spec)
    return FramedEncoding(format, _encode_plain(domains[key], format.inner), inputs, outputs)


def _encode_plain(domain: _Domain, format: UniformFormat | CodebookFormat) -> UniformEncoding | CodebookEncoding:
    weight, spec = domain.weight, domain.spec
    if domain.moment is None:
        if isinstance(format, CodebookFormat):
            return trellis_nearest(weight, format)
        grid, weight = _grid_by_rule(weight, format, spec)
        return nearest(weight, format, domain.importance, grid=grid)
    factor = domain.factor
    if isinstance(format, CodebookFormat):
        spread = best_spread(weight, format, factor)
        return trellis_feedback(weight, format, factor, spread=spread, refit=spec.refit, sweeps=spec.sweeps)
    grid, weight = _grid_by_rule(weight, format, spec)
    if grid is None and (spec.order == "activation" or format.one_scale):  # in natural order grids are found on the way
        spread = best_spread(weight, format, factor)
        grid = widened(search_grid(weight, format, factor.importance()), spread)
    # Fitting steps row by row would part those that are one.
    refit = spec.refit and not format.one_scale
    return error_feedback(weight, format, factor, grid=grid, refit=refit, sweeps=spec.sweeps)


def _grid_by_rule(weight: np.ndarray, format: UniformFormat, spec: SolverSpec) -> tuple[Grid | None, np.ndarray]:
    """The grid of a published rule and the weight as the rule wants it; no grid where it is to be searched."""
    if spec.levels == "two-sigma":
        return two_sigma_grid(weight, format)
    return min_max_grid(weight, format) if spec.levels == "min-max" else None, weight


def _loss(member: np.ndarray, encoding: AnyEncoding, statistics: InputStatistics | None) -> float:
    """The best measure of the output's error that the statistics allow."""
    decoded = encoding.dequantize()
    if statistics is None:
        return relative_error(member, decoded)
    if statistics.second_moment is None:
        root = np.sqrt(statistics.diagonal)
        return relative_error(member * root, decoded * root)
    return relative_proxy_loss(member, decoded, statistics.second_moment)


def dequantized_roots(weight: Weight, encodings: Sequence[AnyEncoding]) -> dict[str, np.ndarray]:
    """The stored tensors of a weight with its decoded values in them, by initializer name."""
    matrix = np.concatenate([encoding.dequantize() for encoding in encodings])
    roots: dict[str, np.ndarray] = {}
    for site in weight.sites:
        if site.root.name is not None and site.root.name not in roots:
            roots[site.root.name] = site.layout.undo(matrix)
    return roots
