"""Run a model on calibration data and gather statistics of its sites' inputs.

The tapped tensors of one run stay below a byte budget: a first run on the largest feed reports only their shapes,
and the taps are dealt out to chunks by them, in topological order. Each chunk is a model of its own that holds
nothing behind its last tap, and passes over all the data, one feed at a time.

Peak memory: one feed's taps of one chunk (`tap_bytes`), the same again for the largest single tap in float32, the
running totals (`InputAccumulator`, of all taps of a chunk; finished chunks hold a third of that; of `RangeAccumulator`
all stays), and ONNX Runtime's own intermediate tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir

from onnxq.calibration.data import CalibrationData
from onnxq.calibration.extraction import extract
from onnxq.calibration.inputs import Feed
from onnxq.calibration.masks import MaskRules
from onnxq.calibration.ranges import RangeAccumulator
from onnxq.calibration.session import RunSettings, SessionHook, TapSession
from onnxq.calibration.statistics import InputAccumulator, Statistics, TableAccumulator
from onnxq.calibration.taps import GraphIndex, Tap, TapRequest, merge_requests
from onnxq.errors import CalibrationError

TAP_BYTES = 256 << 20
_Accumulator = InputAccumulator | TableAccumulator | RangeAccumulator


class Loaded(Protocol):
    """What is needed of `onnxq.graph.LoadedModel`."""

    @property
    def model(self) -> ir.Model:
        """The graph to tap."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Attributes: done, total: runs of the model; what: a phrase for the reader."""

    done: int
    total: int
    what: str


@dataclasses.dataclass(frozen=True, eq=False)
class Collected(Mapping[str, Statistics]):
    """Statistics by tap key (the tapped tensor's name, prefixed inside subgraphs).

    Attributes:
        statistics: By key; taps that no sample reached are left out.
        sites: Site name -> key.
        notes: What a report should say: unmatched masks, branches that never ran.
        runs: How often the model (or a part of it) was run.
        chunks: Taps per chunk.
    """

    statistics: dict[str, Statistics]
    sites: dict[str, str]
    notes: tuple[str, ...] = ()
    runs: int = 0
    chunks: tuple[int, ...] = ()

    def __getitem__(self, key: str) -> Statistics:
        return self.statistics[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.statistics)

    def __len__(self) -> int:
        return len(self.statistics)

    def site(self, name: str) -> Statistics | None:
        """Of the site of that name; None when it was not asked for or never reached."""
        return self.statistics.get(self.sites.get(name, ""))


def collect(
    loaded_model: Loaded,
    requests: Iterable[TapRequest],
    data: CalibrationData,
    *,
    weight_overrides: Mapping[str, np.ndarray] | None = None,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    session_options: SessionHook | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    tap_bytes: int = TAP_BYTES,
) -> Collected:
    """Statistics of every tensor asked for, padding left out.

    Args:
        loaded_model: Its ``model`` is not changed; weights stay where they are.
        requests: One per site; sites that share an input share the tap.
        data: See `onnxq.calibration.data.open_data`.
        weight_overrides: Initializer name -> array of its shape, used in its place.
        threads: Threads inside an operator.
        progress: Called after every run. An exception raised in it (KeyboardInterrupt as well) ends the collection;
            nothing is left behind, since no temporary files are written.
        session_options: Called with the ``SessionOptions`` before each session is made.
        providers: Execution providers.
        tap_bytes: Budget for the tapped arrays of one run; a single tap above it still runs, alone.

    Raises:
        CalibrationError: a tap can't be reached, the model fails to run, or a tensor is not finite.
    """
    model = loaded_model.model
    requests = tuple(requests)
    taps = merge_requests(GraphIndex(model), requests)
    by_request = {site: tap.key for tap in taps for site in tap.sites}
    if not taps:
        return Collected({}, {})
    run = _Collection(
        model,
        data,
        dict(weight_overrides or {}),
        RunSettings(threads, session_options, tuple(providers)),
        MaskRules(model, taps),
        progress,
    )
    chunks = run.plan(taps, tap_bytes)
    statistics: dict[str, Statistics] = {}
    notes: list[str] = []
    for number, chunk in enumerate(chunks):
        for tap, found in run.gather(chunk, number, len(chunks)):
            if found is None:
                notes.append(f"{tap.describe()} was not reached by any sample; it has no statistics")
            else:
                statistics[tap.key] = found
    notes.extend(run.masks.unmatched.values())
    return Collected(statistics, by_request, tuple(notes), run.runs, tuple(len(c) for c in chunks))


class _Collection:
    """The state of one `collect`."""

    def __init__(
        self,
        model: ir.Model,
        data: CalibrationData,
        overrides: dict[str, np.ndarray],
        settings: RunSettings,
        masks: MaskRules,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.model, self.data, self.overrides = model, data, overrides
        self.settings, self.masks, self.progress = settings, masks, progress
        self.runs = 0
        self.total = len(data)

    def plan(self, taps: Sequence[Tap], budget: int) -> list[list[Tap]]:
        """Deal the taps out to chunks whose arrays stay below the budget on the largest feed."""
        if len(taps) == 1:
            return [list(taps)]
        self.total += 1
        session = TapSession(extract(self.model, taps, self.overrides, "shapes"), self.settings)
        number = self.data.largest
        feed = next(f for i, f in enumerate(self.data) if i == number)
        shapes = session.run(feed, f"{self.data.name}, feed {number}")
        sizes = [_tap_bytes(tap, shape) for tap, shape in zip(taps, shapes, strict=True)]
        self._ran("measuring activation shapes")
        # A branch that this feed did not take may be taken by another: count it as the largest.
        sizes = [size or max(sizes) for size in sizes]
        chunks: list[list[Tap]] = []
        room = -1
        for tap, size in zip(taps, sizes, strict=True):
            if size > room:
                chunks.append([])
                room = budget
            chunks[-1].append(tap)
            room -= size
        self.total = 1 + len(self.data) * len(chunks)
        return chunks

    def gather(self, chunk: Sequence[Tap], number: int, of: int) -> Iterator[tuple[Tap, Statistics | None]]:
        """Pass over the data once and give each tap's statistics, None where no row was seen."""
        session = TapSession(extract(self.model, chunk, self.overrides, "values"), self.settings)
        sums: list[_Accumulator | None] = [None] * len(chunk)
        what = "collecting statistics" + (f" (part {number + 1} of {of})" if of > 1 else "")
        for batch, feed in enumerate(self.data):
            where = f"{self.data.name}, feed {batch}"
            arrays = session.run(feed, where)
            for place, tap in enumerate(chunk):
                # Popped, so that an array is gone before the next one's float32 copy is made.
                sums[place] = self._add(tap, sums[place], arrays.pop(0), feed, where)
            self._ran(what)
        for place, tap in enumerate(chunk):
            accumulator, sums[place] = sums[place], None
            yield tap, accumulator.finish() if accumulator is not None else None

    def _add(
        self, tap: Tap, total: _Accumulator | None, array: np.ndarray, feed: Feed, where: str
    ) -> _Accumulator | None:
        if not array.size:  # the branch was not taken
            return total
        rows = self._rows(tap, array, feed)
        if not rows.size:
            return total
        try:
            if tap.kind == "table":
                table = total if isinstance(total, TableAccumulator) else TableAccumulator(tap.extent)
                table.add(rows)
                return table
        except CalibrationError as error:
            raise CalibrationError(f"{where}: tap {tap.describe()}: {error}") from error
        if tap.extent is not None and rows.shape[1] != tap.extent:
            raise CalibrationError(
                f"{where}: tap {tap.describe()} has shape {list(array.shape)}, so rows of width {rows.shape[1]}, but "
                f"the site expects {tap.extent}. Is its side ('{tap.side}') right?"
            )
        inputs: InputAccumulator | RangeAccumulator
        if tap.level == "ranges":
            inputs = total if isinstance(total, RangeAccumulator) else RangeAccumulator()
        else:
            inputs = total if isinstance(total, InputAccumulator) else InputAccumulator(rows.shape[1], tap.level)
        inputs.add(rows)
        if not inputs.finite:
            raise CalibrationError(
                f"{where}: tap {tap.describe()} holds NaN or infinity, so its statistics would be worthless. A float16 "
                "model may overflow: calibrate its float32 export; else look for the sample that causes it."
            )
        return inputs

    def _rows(self, tap: Tap, array: np.ndarray, feed: Feed) -> np.ndarray:
        """[n, K] for linear sites, [n] for tables; masked rows are gone."""
        if tap.kind == "table":
            keep = self.masks.keep(tap, array.shape, feed)
            return array.reshape(-1) if keep is None else array.reshape(-1)[keep]
        if array.ndim < 2:
            array = array.reshape(1, -1)
        elif tap.side == "left":
            array = np.swapaxes(array, -1, -2)
        keep = self.masks.keep(tap, array.shape[:-1], feed)
        rows = array.reshape(-1, array.shape[-1])
        return rows if keep is None or keep.all() else rows[keep]

    def _ran(self, what: str) -> None:
        self.runs += 1
        if self.progress is not None:
            self.progress(Progress(self.runs, self.total, what))


def _tap_bytes(tap: Tap, shape: np.ndarray) -> int:
    """Bytes of a tap from its reported shape; in loops one shape per iteration is stacked."""
    if not shape.size:
        return 0
    per_run = np.prod(shape.reshape(-1, shape.shape[-1]), axis=1).sum()
    return int(per_run) * (8 if tap.kind == "table" else 4)
