"""Whole translations: time and resident memory of models side by side.

    python -m tools.bench_translate FLOAT OTHER... [--sentences 100] [--beam 1 4] [--rounds 3] [--threads 1]

Folders are those that `tools/translate.py` runs; the first is what the others are compared with. Sentences go one by
one. In each round every model translates all of them, in turns; times are medians of the rounds, ratios medians of the
ratios within a round. Memory is what a process of its own holds after the translations beyond what it held before the
sessions were opened.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

if __package__ in (None, ""):  # run as a script: the folder above holds `onnxq` and `tools`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from onnxq.evaluation.load_probe import resident_bytes
from tools.models import fetch
from tools.translate import Translator, read_pairs

TEXT = "debian-en-pt"


def sentences(count: int) -> list[str]:
    """English held-out sentences."""
    return [source for source, _ in read_pairs(fetch(TEXT), "heldout", count)]


def runs_kernels(folder: Path) -> bool:
    """Whether the folder's decoder has nodes of the kernel library."""
    return b"onnxq" in (folder / "decoder_model.onnx").read_bytes()


def timed(folders: Sequence[Path], lines: Sequence[str], beam: int, rounds: int, threads: int) -> list[list[float]]:
    """Seconds by folder and round."""
    translators = [Translator(folder, library=runs_kernels(folder), threads=threads) for folder in folders]
    for translator in translators:
        translator.translate(lines[:3], beam, 1)
    seconds: list[list[float]] = [[] for _ in folders]
    for _ in range(rounds):
        for index, translator in enumerate(translators):
            started = time.perf_counter()
            translator.translate(lines, beam, 1)
            seconds[index].append(time.perf_counter() - started)
    return seconds


def resident(folder: Path, count: int, threads: int) -> int:
    """Bytes that sessions and translations add to a fresh process."""
    command = [sys.executable, "-m", "tools.bench_translate", str(folder), "--probe"]
    command += ["--sentences", str(count), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])["bytes"])


def probe(folder: Path, count: int, threads: int) -> None:
    """Prints what `resident` reads."""
    import onnxruntime  # noqa: F401 - its own size is nobody's weights
    import sentencepiece  # noqa: F401

    lines = sentences(count)
    before = resident_bytes("VmRSS") or 0
    translator = Translator(folder, library=runs_kernels(folder), threads=threads)
    translator.translate(lines, 1, 1)
    print(json.dumps({"bytes": (resident_bytes("VmRSS") or 0) - before}))


def main() -> None:
    """Measures and shows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--sentences", type=int, default=100)
    parser.add_argument("--beam", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        probe(arguments.folders[0], arguments.sentences, arguments.threads)
        return
    lines = sentences(arguments.sentences)
    table = Table("model", "bytes", "resident MB", *(f"beam {beam}: s, of the first" for beam in arguments.beam))
    times = {
        beam: timed(arguments.folders, lines, beam, arguments.rounds, arguments.threads) for beam in arguments.beam
    }
    for index, folder in enumerate(arguments.folders):
        cells = []
        for beam in arguments.beam:
            ratios = [own / first for own, first in zip(times[beam][index], times[beam][0], strict=True)]
            cells.append(f"{statistics.median(times[beam][index]):.2f}, {statistics.median(ratios):.3f}")
        size = sum(file.stat().st_size for file in folder.glob("*.onnx*"))
        memory = resident(folder, min(20, arguments.sentences), arguments.threads)
        table.add_row(folder.name, f"{size:,}", f"{memory / 1e6:.1f}", *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
