"""The main job on a real model: MiniLM-L6-v2 to ONNX, to 4, 3 and 2 bits, and run in all its lives.

The second model of 2 bits is in a frame (`--recipe framequant`): rotated weights and a trellis code.

    python -m samples.embedding.demo [--folder DIR] [--sentences 500] [--threads 1]

Prints a table: bytes on disk, how near the embeddings of held-out sentences are to those of the float model
(cosine, and rank correlation of the similarities of sentence pairs), and latency with the kernel library, on stock
ONNX Runtime (the same file, through its function bodies) and as `--target stock`. Latencies are medians of
interleaved runs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import onnxq
from onnxq.calibration import open_data, session_inputs
from onnxq.cli.progress import RichProgress
from onnxq.evaluation.latency import measure_latency
from onnxq.evaluation.similarity import compare_embeddings, embed
from onnxq.export import export
from tools.models import cache_folder, fetch

CALIBRATION_SENTENCES = 256
LATENCY_SENTENCES = 1
LATENCY_TOKENS = 32
ROUNDS = 40
RECIPES = {
    ("4 bits", "kernel"): onnxq.uniform_recipe(4),
    ("4 bits", "stock"): onnxq.uniform_recipe(4, target="stock"),
    ("3 bits", "kernel"): onnxq.uniform_recipe(3),  # no stock form has 3 bits
    ("2 bits", "kernel"): onnxq.uniform_recipe(2),
    ("2 bits", "stock"): onnxq.uniform_recipe(2, target="stock"),
    ("2 bits, framequant", "kernel"): onnxq.Recipe.load("framequant"),
}

console = Console()


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; latencies in milliseconds, None where there is no such form."""

    name: str
    bytes: int
    cosine: float
    spearman: float
    library: float | None
    stock: float


def model_bytes(path: Path) -> int:
    """The .onnx file and its external data."""
    data = path.with_name(path.name + ".data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


def main(
    folder: Annotated[Path | None, typer.Option(help="Where models are written; default: in the cache.")] = None,
    sentences: Annotated[int, typer.Option(help="Held-out sentences to compare embeddings on.")] = 500,
    threads: Annotated[int, typer.Option(help="Threads of the timed sessions.")] = 1,
) -> None:
    """Runs the demo."""
    folder = folder or cache_folder() / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    source, text = fetch("minilm"), fetch("reviews")
    exported = folder / "minilm-fp32"
    if not (exported / "model.onnx").exists():
        with console.status("exporting MiniLM-L6-v2 to ONNX"):
            export(source, exported, task="feature-extraction")
    float_model = exported / "model.onnx"

    written: dict[tuple[str, str], Path] = {}
    for (name, target), recipe in RECIPES.items():
        out = folder / f"minilm-{name.replace(', ', '-').replace(' ', '-')}-{target}.onnx"
        console.print(f"quantising to {name} for target {target}")
        onnxq.quantize(
            float_model,
            out,
            recipe=recipe,
            calibration=text / "calibration.txt",
            tokenizer=exported,
            force=True,
            progress=RichProgress(Console(stderr=True)),
        )
        written[name, target] = out

    reference = onnxq.session(float_model, threads=threads)
    held_out = open_data(
        text / "heldout.txt", session_inputs(reference), tokenizer=exported, max_samples=sentences, batch_size=16
    )
    expected = embed(reference, held_out)
    rng = np.random.default_rng(0)
    feeds = {
        entry.name: rng.integers(1000, 20000, (LATENCY_SENTENCES, LATENCY_TOKENS))
        if entry.name == "input_ids"
        else np.full((LATENCY_SENTENCES, LATENCY_TOKENS), int(entry.name == "attention_mask"))
        for entry in reference.get_inputs()
    }
    sessions = {"fp32": reference}
    for (name, target), path in written.items():
        if target == "kernel":
            sessions[f"{name} library"] = onnxq.session(path, threads=threads)
        sessions[f"{name} {target}, stock"] = onnxq.session(path, threads=threads, library=False)
    timed = measure_latency(sessions, feeds, rounds=ROUNDS)
    latency = {timing.name: 1e3 * timing.median for timing in timed.timings}

    rows = [Row("fp32", model_bytes(float_model), 1.0, 1.0, None, latency["fp32"])]
    for (name, target), path in written.items():
        kernel = target == "kernel"
        found = compare_embeddings(
            expected, embed(sessions[f"{name} library" if kernel else f"{name} stock, stock"], held_out)
        )
        rows.append(
            Row(
                name if kernel else f"{name}, --target stock",
                model_bytes(path),
                found.cosine_mean,
                found.spearman,
                latency[f"{name} library"] if kernel else None,
                latency[f"{name} {target}, stock"],
            )
        )
    show(rows, held_out.samples, threads)


def show(rows: list[Row], sentences: int, threads: int) -> None:
    """Prints the table."""
    table = Table(
        title=f"MiniLM-L6-v2, {sentences} held-out sentences; latency of {LATENCY_SENTENCES} x {LATENCY_TOKENS} "
        f"tokens, {threads} thread(s), median of {ROUNDS}"
    )
    for heading in ("model", "bytes on disk", "cosine", "Spearman", "library ms", "stock ms"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.bytes:,}",
            f"{row.cosine:.4f}",
            f"{row.spearman:.4f}",
            "" if row.library is None else f"{row.library:.2f}",
            f"{row.stock:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
