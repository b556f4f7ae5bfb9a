"""Weights in portions, each with the statistics that it needs: second moments are large, so not all fit at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from onnxq.calibration import (
    CalibrationData,
    Collected,
    InputStatistics,
    SequentialCalibration,
    TapRequest,
    collect,
    requests_for,
    statistics_bytes,
)
from onnxq.calibration.collect import Progress as Runs
from onnxq.calibration.statistics import Level
from onnxq.graph import LoadedModel, Weight
from onnxq.pipeline.plan import Planned
from onnxq.pipeline.solve import statistics_of
from onnxq.progress import Progress

STATISTICS_BYTES = 256 << 20
"""Second moments that are held at a time; more inputs mean more passes over the calibration data."""


@dataclasses.dataclass(frozen=True, eq=False)
class Halves:
    """Statistics of two halves of the data; of data that is one batch the second is missing."""

    first: Collected | None
    second: Collected | None

    def of(self, weight: Weight) -> tuple[InputStatistics | None, InputStatistics | None]:
        """What each half saw of a weight's inputs."""
        first, second = (None if half is None else statistics_of(weight, half) for half in (self.first, self.second))
        return (second, None) if first is None else (first, second)


@dataclasses.dataclass(frozen=True)
class Stages:
    """Calibration of a model, as often as its data has to be run.

    Attributes:
        loaded: the model.
        data: None gathers nothing.
        threads: of the runs; None leaves it to ONNX Runtime.
        progress: follows the runs.
    """

    loaded: LoadedModel
    data: CalibrationData | None
    threads: int | None
    progress: Progress

    def portions(
        self, items: Sequence[Planned], level: Callable[[Planned], Level]
    ) -> Iterator[tuple[list[Planned], Collected | None]]:
        """The items in their order, each portion with its statistics at the level that is asked for each."""
        if self.data is None:
            yield list(items), None
            return
        levels = {item.weight.name: level(item) for item in items}
        portion: list[Planned] = []
        for item in items:
            if portion and statistics_bytes(_requests([*portion, item], levels)) > STATISTICS_BYTES:
                yield portion, self.collect(_requests(portion, levels))
                portion = []
            portion.append(item)
        yield portion, self.collect(_requests(portion, levels))

    def by_halves(
        self, items: Sequence[Planned], level: Callable[[Planned], Level]
    ) -> Iterator[tuple[list[Planned], Halves]]:
        """The same with the statistics of two halves of the data: what one half taught can be tried on the other."""
        halves = None if self.data is None else self.data.halves()
        if halves is None:
            for portion, collected in self.portions(items, level):
                yield portion, Halves(collected, None)
            return
        first, second = (dataclasses.replace(self, data=half) for half in halves)
        for (portion, one), (_, other) in zip(first.portions(items, level), second.portions(items, level), strict=True):
            yield portion, Halves(one, other)

    def collect(self, requests: list[TapRequest]) -> Collected | None:
        """One pass over the data, or several where taps are large; None where nothing is asked for."""
        assert self.data is not None
        if all(request.level == "none" for request in requests):
            return None
        return collect(self.loaded, requests, self.data, threads=self.threads, progress=self._follow())

    def in_sequence(
        self, items: Sequence[Planned]
    ) -> Iterator[tuple[list[Planned], Collected | None, SequentialCalibration]]:
        """The items block by block, statistics from quantised predecessors, which the caller puts in.

        A weight comes with the block of its last site; statistics of its earlier sites are kept until then.
        """
        assert self.data is not None
        pending = {item.weight.name: item for item in items}
        requests = _requests(items, {name: item.statistics_level for name, item in pending.items()})
        sequence = SequentialCalibration(
            self.loaded, requests, self.data, threads=self.threads, progress=self._follow()
        )
        waiting = {
            name: {site.name for site in item.weight.sites if site.kind == "linear"} for name, item in pending.items()
        }
        seen = Collected({}, {})
        with sequence:
            unasked = [item for name, item in pending.items() if not waiting[name] or item.statistics_level == "none"]
            for item in unasked:
                del pending[item.weight.name]
            yield unasked, None, sequence
            for block, collected in sequence:
                seen = Collected({**seen.statistics, **collected.statistics}, {**seen.sites, **collected.sites})
                done = {request.site_name for request in block.requests}
                ready = []
                for name in list(pending):
                    waiting[name] -= done
                    if not waiting[name]:
                        ready.append(pending.pop(name))
                yield ready, seen, sequence
                used = {seen.sites.get(site) for name in pending for site in waiting[name]}
                seen = Collected({key: value for key, value in seen.statistics.items() if key in used}, seen.sites)

    def _follow(self) -> Any:
        """Passes the runs of a collection on to whoever follows."""

        def follow(runs: Runs) -> None:
            if runs.done <= 1:
                self.progress.start("calibrating", runs.total)
            self.progress.advance(1, runs.what)

        return follow


def _requests(items: Sequence[Planned], levels: dict[str, Level]) -> list[TapRequest]:
    return requests_for([item.weight for item in items], lambda weight: levels[weight.name])
