"""Translation at a few bits, a real model, en to pt: BLEU, chrF and bytes; a scan of sub-layers; bits per word.

    python -m tools.tables.nmt methods scan words [--only PATTERN] [--list] [--markdown]

No retraining. Greedy search on held-out sentences; calibration and token counts from training text. `methods` are whole
models; `scan` rounds one block or kind of sub-layer, greedily fitted planes as in table 1 of Chung et al. (arXiv
2009.07453); `words` rounds the embedding alone, planes by word against planes alike, as in its figure 3.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

import onnxq
from onnxq.calibration.trace import Trace
from onnxq.recipe import (
    BinarySpec,
    LinearPlan,
    Recipe,
    Rule,
    SolverSpec,
    TablePlan,
    WordSpec,
    uniform_recipe,
)
from tools.marian import prepare
from tools.models import cache_folder, fetch
from tools.tables.results import cell_file, load_result, save_result, show_table
from tools.translate import Translator, read_pairs, score

TABLE = "nmt-1"
"""Results of another version of the methods are not taken up again."""
TEXTS = {"Debian": "debian-en-pt", "Bible": "bible-en-pt"}
SENTENCES, SCANNED = 300, 100
"""Held-out sentences of each text, for whole models and for parts of one."""
RECORDED = 128
"""Sentences that calibration is recorded on, half of each text."""

BLOCKS = {
    "embedding": "part:embedding",
    "encoder": "part:encoder.*",
    "encoder attention": "part:encoder.attention",
    "encoder ffn": "part:encoder.ffn",
    "decoder": "part:decoder.*",
    "decoder recurrence": "part:decoder.attention",
    "decoder cross-attention": "part:decoder.cross",
    "decoder ffn": "part:decoder.ffn",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one cell shows.

    Attributes:
        bleu, chrf: by text.
        bytes: of all graphs.
        bits: mean true bits of all weights, side data counted, shared ones once.
        seconds: quantising and translating.
    """

    bleu: dict[str, float]
    chrf: dict[str, float]
    bytes: int
    bits: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Method:
    """A line: a recipe, and what goes with it; None is the float model."""

    recipe: Recipe | None
    options: Mapping[str, float] = dataclasses.field(default_factory=dict)
    sentences: int = SENTENCES

    @property
    def calibrated(self) -> bool:
        """Whether rounding looks at inputs."""
        return self.recipe is not None and self.recipe.linear.solver.name != "nearest"


def methods() -> dict[str, Method]:
    """Whole models."""
    lines: dict[str, Method] = {"float32": Method(None), "INT8 dynamic": Method(Recipe.load("int8-dynamic"))}
    for bits in (4, 3, 2):
        lines[f"uniform {bits} bits"] = Method(uniform_recipe(bits, table_bits=bits))
        planes = BinarySpec(bits)
        lines[f"binary {bits} planes"] = Method(
            Recipe("planes", linear=LinearPlan(binary=planes), tables=TablePlan(binary=planes))
        )
    for bits in (4.0, 3.0, 2.6):
        lines[f"nmt {bits:g} bits"] = Method(Recipe.load("nmt"), {"bits": bits})
    lines["nmt-paper"] = Method(Recipe.load("nmt-paper"))
    return lines


def scan() -> dict[str, Method]:
    """One block at so many planes, the rest in float: the paper's table 1."""
    greedy = LinearPlan(solver=SolverSpec(name="nearest", levels="greedy"), binary=BinarySpec(1))
    lines = {"float32": Method(None, {}, SCANNED)}
    for block, match in BLOCKS.items():
        for planes in (4, 3, 2, 1):
            rules = (Rule("part:positions", keep=True), Rule(match, binary=BinarySpec(planes)), Rule("*", keep=True))
            tables = TablePlan(binary=BinarySpec(planes))
            lines[f"{block}, {planes}"] = Method(Recipe("scan", linear=greedy, tables=tables, rules=rules), {}, SCANNED)
    return lines


def words() -> dict[str, Method]:
    """The embedding alone, by word and alike: the paper's figure 3."""
    specs = {f"alike, {planes}": BinarySpec(planes) for planes in (1, 2, 3)}
    specs |= {
        f"clusters 4, ratio {r}": BinarySpec(4, words=WordSpec("frequency", ratio=r)) for r in (8.0, 4.0, 2.0, 1.0)
    }
    specs |= {
        f"by loss, {mean:g}": BinarySpec(4, words=WordSpec(mean_planes=mean)) for mean in (1.14, 1.32, 1.73, 2.0, 2.5)
    }
    lines = {"float32": Method(None, {}, SCANNED)}
    for name, spec in specs.items():
        rules = (Rule("part:embedding", binary=spec), Rule("*", keep=True))
        plain = LinearPlan(solver=SolverSpec(name="nearest"))
        lines[name] = Method(Recipe("words", linear=plain, rules=rules), {}, SCANNED)
    return lines


TABLES: dict[str, Callable[[], dict[str, Method]]] = {"methods": methods, "scan": scan, "words": words}


def training_text(folder: Path) -> Path:
    """English sentences of both training texts, for token counts."""
    path = folder / "english.txt"
    lines = [source for text in TEXTS.values() for source, _ in read_pairs(fetch(text), "train")]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recorded(folder: Path) -> Trace:
    """The trace of training sentences, recorded once and kept."""
    kept = cache_folder() / "tables" / TABLE / f"trace-{RECORDED}"
    if not Trace.is_in(kept):
        lines = []
        for text in TEXTS.values():
            pairs = read_pairs(fetch(text), "train")
            step = max(1, len(pairs) // (RECORDED // len(TEXTS)))
            lines += [source for source, _ in pairs[::step][: RECORDED // len(TEXTS)]]
        Translator(folder, library=False, threads=1).record(lines, kept)
    return Trace(kept)


def run(method: Method, folder: Path) -> Cell:
    """Quantises and translates."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        out, bits = folder, 32.0
        size = sum(file.stat().st_size for file in folder.glob("*.onnx*"))
        if method.recipe is not None:
            out = Path(scratch) / "out"
            counts = training_text(Path(scratch)) if method.recipe.counts_words else None
            report = onnxq.quantize_folder(
                folder,
                out,
                recipe=method.recipe,
                calibration=recorded(folder) if method.calibrated else None,
                token_counts=counts,
                curves=cache_folder() / "curves",
                threads=1,
                **method.options,  # type: ignore[arg-type]
            )
            size = report.bytes
            weights = [weight for graph in report.values() for weight in graph.weights]
            elements = sum(weight.shape[0] * weight.shape[1] for weight in weights)
            bits = 8 * sum(weight.bytes for weight in weights) / elements
        translator = Translator(out, library=method.recipe is not None and method.recipe.target == "kernel", threads=1)
        bleu, chrf = {}, {}
        for name, text in TEXTS.items():
            pairs = read_pairs(fetch(text), "heldout", method.sentences)
            scores = score(translator.translate([source for source, _ in pairs]), [target for _, target in pairs])
            bleu[name], chrf[name] = scores.bleu, scores.chrf
    return Cell(bleu, chrf, size, bits, time.monotonic() - started)


def fill(table: str, only: Sequence[str], console: Console) -> None:
    """Computes the cells that are asked for and not known."""
    folder = prepare()
    for name, method in TABLES[table]().items():
        file = cell_file(TABLE, table, name, 0)
        if file.is_file() or not any(fnmatch.fnmatchcase(f"{table} {name}", pattern) for pattern in only):
            continue
        cell = run(method, folder)
        save_result(file, cell)
        console.print(f"{table} {name}: {_scores(cell)}, {cell.bytes:,} bytes, {cell.seconds:.0f} s")


def _scores(cell: Cell) -> str:
    return ", ".join(f"{text} {cell.bleu[text]:.2f} / {cell.chrf[text]:.2f}" for text in cell.bleu)


def show(table: str, console: Console, *, markdown: bool) -> None:
    """One line a method; for the scan one line a block."""
    found = {name: load_result(cell_file(TABLE, table, name, 0), Cell) for name in TABLES[table]()}
    if table == "scan":
        headings = ["rounded", *(f"{planes} planes" for planes in (4, 3, 2, 1))]
        rows = [
            [block, *("" if (cell := found[f"{block}, {p}"]) is None else _bleu(cell) for p in (4, 3, 2, 1))]
            for block in BLOCKS
        ]
        if (whole := found["float32"]) is not None:
            rows.insert(0, ["nothing", _bleu(whole), "", "", ""])
        show_table("BLEU, " + " / ".join(TEXTS), headings, rows, "", console, markdown=markdown)
        return
    float_bytes = None if (full := load_result(cell_file(TABLE, "methods", "float32", 0), Cell)) is None else full.bytes
    rows = []
    for name, cell in found.items():
        if cell is None:
            continue
        ratio = "" if float_bytes is None else f"{float_bytes / cell.bytes:.1f}"
        scores = [f"{cell.bleu[text]:.2f} / {cell.chrf[text]:.2f}" for text in TEXTS]
        rows.append([name, f"{cell.bits:.2f}", f"{cell.bytes:,}", ratio, *scores])
    headings = ["method", "bits", "bytes", "smaller", *(f"{text}, BLEU / chrF" for text in TEXTS)]
    show_table(table, headings, rows, "", console, markdown=markdown)


def _bleu(cell: Cell) -> str:
    return " / ".join(f"{value:.1f}" for value in cell.bleu.values())


def main() -> None:
    """Fills and shows the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tables", nargs="+", choices=tuple(TABLES))
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns over 'table method'")
    parser.add_argument("--list", action="store_true", help="show what is known and compute nothing")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    arguments = parser.parse_args()
    console = Console(width=160)
    for table in arguments.tables:
        if not arguments.list:
            fill(table, arguments.only, console)
        show(table, console, markdown=arguments.markdown)


if __name__ == "__main__":
    main()
