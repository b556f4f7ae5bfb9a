"""Latency of several sessions measured side by side, session creation time and memory.

Machines drift: clocks change, neighbours come and go. So sessions take turns, in an order that rotates, and
ratios are taken within each round; their median says which is faster even where the absolute times wander.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxq.errors import ModelError
from onnxq.evaluation.sessions import Feeds, Model, as_session, library_available


@dataclass(frozen=True)
class Timing:
    """Times of one session in seconds, and its ratios to the first session (1 for the first itself).

    Attributes:
        threads: Of one operator; 0 where ONNX Runtime chose.
        ratio: Median over rounds of this session's time over the first one's; also the 10th and 90th
            percentile.
    """

    name: str
    threads: int
    median: float
    p10: float
    p90: float
    p99: float
    ratio: float
    ratio_p10: float
    ratio_p90: float


@dataclass(frozen=True)
class LatencyReport:
    """Timings in the order the sessions were given.

    Attributes:
        rounds: Measured rounds; each runs every session once.
        shapes: Of the inputs, by name.
        library: Whether the kernel library was there for sessions opened from paths.
    """

    timings: tuple[Timing, ...]
    rounds: int
    shapes: Mapping[str, tuple[int, ...]]
    library: bool


@dataclass(frozen=True)
class LoadReport:
    """Loading one model in fresh processes; medians over them.

    Attributes:
        create_seconds: Creation of the session.
        first_run_seconds: The first run; None where no feeds were given.
        base_bytes: Resident memory with the runtime imported and no model.
        loaded_bytes: Resident memory with the session created (and run once where feeds were given), less
            `base_bytes`.
        peak_bytes: Largest resident memory of the process, less `base_bytes`; None where the platform does
            not tell.
    """

    create_seconds: float
    first_run_seconds: float | None
    base_bytes: int
    loaded_bytes: int
    peak_bytes: int | None
    processes: int


def measure_latency(
    models: Mapping[str, Model],
    feeds: Feeds,
    *,
    rounds: int = 50,
    warmup: int = 5,
    threads: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> LatencyReport:
    """Run every model on the same feeds, in turns.

    Args:
        models: By name; the first is what ratios refer to. Sessions are taken as they are, paths opened with
            `threads`.
        feeds: Inputs; those that a model does not have are left out.
        warmup: Rounds that are not measured.
        clock: Seconds; for tests.

    Raises:
        ModelError: No models, or fewer than three rounds.
    """
    if not models or rounds < 3:
        raise ModelError(f"latency needs at least one model and three rounds, not {len(models)} and {rounds}")
    sessions = {name: as_session(model, threads=threads) for name, model in models.items()}
    own = {n: {i.name: feeds[i.name] for i in s.get_inputs() if i.name in feeds} for n, s in sessions.items()}
    names = list(sessions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            begin = clock()
            sessions[name].run(None, own[name])
            elapsed = clock() - begin
            if turn >= 0:
                times[name].append(elapsed)
    base = np.array(times[names[0]])
    used = {name: session.get_session_options().intra_op_num_threads for name, session in sessions.items()}
    timings = tuple(_timing(name, used[name], np.array(times[name]), base) for name in names)
    return LatencyReport(timings, rounds, {name: value.shape for name, value in feeds.items()}, library_available())


def _timing(name: str, threads: int, seconds: np.ndarray, base: np.ndarray) -> Timing:
    p10, median, p90, p99 = (float(v) for v in np.percentile(seconds, (10, 50, 90, 99)))
    low, middle, high = (float(v) for v in np.percentile(seconds / np.maximum(base, 1e-12), (10, 50, 90)))
    return Timing(name, threads, median, p10, p90, p99, middle, low, high)


def measure_load(
    path: str | Path,
    feeds: Feeds | None = None,
    *,
    threads: int | None = None,
    processes: int = 3,
    library: bool | None = None,
) -> LoadReport:
    """Load a model in fresh processes, one after the other.

    Args:
        library: As in `as_session`.
        feeds: Inputs of one run, so that memory allocated by it counts; None loads only.

    Raises:
        ModelError: No such file, or the model does not load or run.
    """
    model = Path(path)
    if not model.is_file():
        raise ModelError(f"{model} is not a file: give the path of an .onnx file")
    results = []
    with tempfile.TemporaryDirectory(prefix="onnxq-load-") as temporary:
        fed = ""
        if feeds is not None:
            fed = str(Path(temporary) / "feeds.npz")
            np.savez(fed, allow_pickle=False, **dict(feeds))
        command = [
            sys.executable,
            "-m",
            "onnxq.evaluation.load_probe",
            str(model.resolve()),
            str(threads or 0),
            "" if library is None else str(int(library)),
            fed,
        ]
        for _ in range(processes):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                said = done.stderr.strip().splitlines()
                raise ModelError(
                    f"{model} could not be loaded in a fresh process: {said[-1] if said else 'it ended without a word'}"
                )
            results.append(json.loads(done.stdout.splitlines()[-1]))
    peaks = [r["peak"] for r in results]
    return LoadReport(
        create_seconds=statistics.median(r["create"] for r in results),
        first_run_seconds=None if feeds is None else statistics.median(r["first_run"] for r in results),
        base_bytes=int(statistics.median(r["base"] for r in results)),
        loaded_bytes=int(statistics.median(r["loaded"] - r["base"] for r in results)),
        peak_bytes=None if None in peaks else int(statistics.median(r["peak"] - r["base"] for r in results)),
        processes=processes,
    )
