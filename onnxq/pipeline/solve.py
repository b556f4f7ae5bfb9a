"""From a planned weight and its statistics to its encoding, one weight in memory at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from onnxq.calibration import Collected, InputStatistics
from onnxq.formats.uniform import UniformEncoding
from onnxq.graph import Weight
from onnxq.pipeline.plan import Planned
from onnxq.pipeline.resume import ResumeStore
from onnxq.solvers.error_feedback import Order, error_feedback
from onnxq.solvers.loss import relative_error, relative_proxy_loss
from onnxq.solvers.nearest import nearest


@dataclasses.dataclass(frozen=True)
class Solved:
    """What became of one weight.

    Attributes:
        encodings: one for each member of a stack.
        solver: the solver's name.
        relative_error, proxy_loss: see `onnxq.report.records.WeightRecord`.
        note: why another solver than the planned one was used, or empty.
    """

    encodings: tuple[UniformEncoding, ...]
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


def solve_weight(planned: Planned, statistics: InputStatistics | None, store: ResumeStore) -> Solved:
    """Encodes every member of a weight.

    Peak memory: about three copies of the weight in float32, and what the solver states.
    """
    weight, spec = planned.weight, planned.solver
    note = ""
    uses_moment = spec.name == "error-feedback"
    if uses_moment and (statistics is None or statistics.second_moment is None):
        uses_moment = False
        if "linear" in weight.kinds:
            note = "rounded to nearest: calibration saw no input of it"
    encodings, changed, total, losses = [], 0.0, 0.0, []
    for name, member in _members(weight):
        encoding = store.load(name)
        if encoding is None or encoding.format != planned.format:
            encoding = _encode(member, planned, statistics, uses_moment)
            store.save(name, encoding)
        decoded = encoding.dequantize()
        energy = float(np.vdot(member, member))
        changed += relative_error(member, decoded) * energy if energy else 0.0
        total += energy
        if statistics is not None and statistics.second_moment is not None:
            losses.append(relative_proxy_loss(member, decoded, statistics.second_moment))
        encodings.append(encoding)
    solver = spec.name if uses_moment else "nearest"
    loss = float(np.mean(losses)) if losses else None
    return Solved(tuple(encodings), solver, changed / total if total else 0.0, loss, note)


def _members(weight: Weight) -> Iterator[tuple[str, np.ndarray]]:
    for index in range(weight.batch):
        name = weight.name if weight.batch == 1 else f"{weight.name}.{index}"
        yield name, weight.rows(index * weight.n, (index + 1) * weight.n)


def _encode(
    member: np.ndarray, planned: Planned, statistics: InputStatistics | None, uses_moment: bool
) -> UniformEncoding:
    if uses_moment:
        assert statistics is not None
        assert statistics.second_moment is not None
        spec = planned.solver
        return error_feedback(
            member,
            planned.format,
            statistics.second_moment,
            damping=spec.damping,
            order=Order(spec.order),
            refit=spec.refit,
            sweeps=spec.sweeps,
        )
    return nearest(member, planned.format, None if statistics is None else statistics.diagonal)


def dequantized_roots(weight: Weight, encodings: Sequence[UniformEncoding]) -> dict[str, np.ndarray]:
    """The stored tensors of a weight with its decoded values in them, by initializer name."""
    matrix = np.concatenate([encoding.dequantize() for encoding in encodings])
    roots: dict[str, np.ndarray] = {}
    for site in weight.sites:
        if site.root.name is not None and site.root.name not in roots:
            roots[site.root.name] = site.layout.undo(matrix)
    return roots
