"""Loads one model in this process and prints a line of JSON; started by `measure_load`.

python -m onnxq.evaluation.load_probe MODEL THREADS LIBRARY [FEEDS.npz]

LIBRARY is 1, 0, or empty for "where it is there".
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from onnxq.evaluation.sessions import as_session


def resident_bytes(key: str) -> int | None:
    """A line of `/proc/self/status` in bytes (`VmRSS`: now, `VmHWM`: the peak).

    None where there is no such file.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def peak_bytes() -> int | None:
    """Largest resident memory so far."""
    if (peak := resident_bytes("VmHWM")) is not None:
        return peak
    try:
        import resource
    except ImportError:
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def main(model: str, threads: int, library: bool | None, fed: str) -> dict[str, float | int | None]:
    """Load, run once where there are feeds, and report seconds and bytes."""
    feeds = dict(np.load(fed, allow_pickle=False)) if fed else None
    now = resident_bytes("VmRSS")
    base = (now if now is not None else peak_bytes()) or 0
    begin = time.perf_counter()
    session = as_session(model, threads=threads or None, library=library)
    created = time.perf_counter()
    if feeds is not None:
        session.run(None, {i.name: feeds[i.name] for i in session.get_inputs() if i.name in feeds})
    done = time.perf_counter()
    after = resident_bytes("VmRSS")
    peak = peak_bytes()
    return {
        "create": created - begin,
        "first_run": done - created,
        "base": base,
        "loaded": after if after is not None else (peak or 0),
        "peak": peak,
    }


if __name__ == "__main__":
    path, count, with_library, feeds_file = (*sys.argv[1:], "")[:4]
    result = main(path, int(count), bool(int(with_library)) if with_library else None, feeds_file)
    sys.stdout.write(json.dumps(result) + os.linesep)
