"""Reports and inspections as rich tables for the terminal."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from onnxq.graph import SiteReport
from onnxq.report.inspect import InspectedWeight, Inspection
from onnxq.report.records import FolderReport, KeptRecord, OutputCheck, QuantizeReport, WeightRecord
from onnxq.report.units import bits, count, decibels, duration, noise_decibels, percent, ratio, shape, size

SHORT = 16
"""Up to this many weights each has its row; more are grouped, unless all are asked for."""

T = TypeVar("T")
_QUOTED = re.compile(r"\s*'[^']*'")
_STYLES = ((25.0, "green"), (15.0, "yellow"), (float("-inf"), "red"))


def table(*columns: str, title: str = "", wide: Sequence[str] = ()) -> Table:
    """An empty table; columns that begin with ``>`` are aligned to the right, those in `wide` may wrap."""
    made = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=None,
        pad_edge=False,
    )
    for column in columns:
        name = column.removeprefix(">")
        right = column.startswith(">")
        made.add_column(name, justify="right" if right else "left", no_wrap=right or name not in wide, overflow="fold")
    return made


def grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> dict[Hashable, list[T]]:
    """Items by key, in order of first appearance."""
    groups: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def error_text(relative_error: float | None, mark: str = "") -> Text:
    """A signal-to-noise in green (25 dB or more), yellow or red (below 15 dB)."""
    if relative_error is None:
        return Text("-", style="dim")
    level = noise_decibels(relative_error)
    return Text(decibels(relative_error) + mark, style=next(style for limit, style in _STYLES if level >= limit))


def pooled(errors: Sequence[tuple[float | None, int]]) -> float | None:
    """Mean of squared relative errors, weighted by the number of weights; None where none is known."""
    known = [(error, number) for error, number in errors if error is not None]
    total = sum(number for _, number in known)
    return sum(error * number for error, number in known) / total if total else None


@dataclasses.dataclass(frozen=True)
class Asked:
    """The ceilings that a run was given.

    Attributes:
        size: of the written files in bytes.
        bits, table_bits: of the mean bits of products' weights and of tables.
        max_error: of what is expected of the outputs.
    """

    size: int | None = None
    bits: float | None = None
    table_bits: float | None = None
    max_error: float | None = None


def quantize_report(
    report: QuantizeReport, *, verbose: bool, planned: bool, asked: Asked | None = None
) -> list[RenderableType]:
    """What a run of `quantize` did, or a plan would do."""
    shown: list[RenderableType] = [_headline(report, planned), ""]
    shown.append(_written_weights(report.weights, verbose))
    shown += ["", *kept_table(report.kept)] if report.kept else []
    shown += ["", _means(report)]
    if asked is not None:
        shown += _ceilings(report, asked)
    if report.check is not None:
        shown.append(_check(report.check))
    shown += notes(report.notes)
    if not planned:
        shown.append(Text(f"{duration(report.seconds)}, peak memory {size(report.peak_memory)}", style="dim"))
    return shown


def folder_report(report: FolderReport) -> list[RenderableType]:
    """What all graphs of a folder come to together."""
    line = Text()
    line.append(f"{count(len(report), 'graph')}  {size(report.source_bytes)} → ")
    line.append(size(report.bytes), style="bold green")
    line.append(f"  ({ratio(report.bytes, report.source_bytes)} smaller)" if report.bytes else "")
    shown: list[RenderableType] = [line]
    for item in report.budget:
        if item.what == "size":
            limit, got = f"{item.asked:,.0f} bytes", f"{report.bytes:,} bytes"
        else:
            limit, got = f"{item.asked:g}", f"{item.got:.4g}"
        name = {"size": "size", "bits": "products' bits", "table_bits": "tables' bits"}.get(item.what, "expected error")
        shown.append(Text.assemble((f"{name}: ", "dim"), f"asked for at most {limit}, got {got}"))
    return [*shown, *notes(report.notes)]


def _headline(report: QuantizeReport, planned: bool) -> Text:
    line = Text()
    line.append("plan: " if planned else "wrote ", style="dim")
    line.append(report.output, style="bold")
    line.append(f"  {size(report.source_bytes)} → ")
    line.append(size(report.bytes), style="bold green")
    line.append(f"  ({ratio(report.bytes, report.source_bytes)} smaller)" if report.bytes else "")
    line.append(
        f"   {count(len(report.weights), 'weight')}; {report.calibration or 'no calibration data'}",
        style="dim",
    )
    return line


def _written_weights(weights: Sequence[WeightRecord], verbose: bool) -> Table:
    if verbose or len(weights) <= SHORT:
        made = table(
            "weight",
            "shape",
            "format",
            "as",
            ">before",
            ">after",
            ">bits",
            ">error",
            "note",
            wide=("weight", "note"),
        )
        for w in weights:
            made.add_row(
                escape(w.name), shape(w.shape), w.format, w.form, size(w.source_bytes), size(w.bytes),
                bits(w.bits_per_weight), error_text(w.relative_error), escape(w.note),
            )  # fmt: skip
        return made
    made = table(
        ">weights",
        "format",
        "as",
        "kind",
        ">before",
        ">after",
        ">bits",
        ">error",
        ">worst",
        "worst weight",
        wide=("worst weight",),
    )
    for group in grouped(weights, lambda w: (w.format, w.form, w.kinds)).values():
        first, numbers = group[0], sum(w.shape[0] * w.shape[1] for w in group)
        before, after = sum(w.source_bytes for w in group), sum(w.bytes for w in group)
        worst = max(group, key=lambda w: w.relative_error or 0.0)
        mean = pooled([(w.relative_error, w.shape[0] * w.shape[1]) for w in group])
        made.add_row(
            str(len(group)), first.format, first.form, " + ".join(first.kinds), size(before), size(after),
            bits(8 * after / numbers), error_text(mean), error_text(worst.relative_error), escape(worst.name),
        )  # fmt: skip
    return made


def kept_table(kept: Sequence[KeptRecord]) -> list[RenderableType]:
    """Constants that stayed as they were, one row per reason."""
    made = table(">kept", ">bytes", "reason", "such as", wide=("reason", "such as"))
    groups = grouped(kept, lambda item: _QUOTED.sub("", item.reason))
    for reason, group in sorted(groups.items(), key=lambda pair: -sum(item.bytes for item in pair[1])):
        largest = max(group, key=lambda item: item.bytes)
        made.add_row(
            str(len(group)),
            size(sum(item.bytes for item in group)),
            escape(str(reason)),
            escape(largest.name),
        )
    return [made]


def _means(report: QuantizeReport) -> Text:
    parts = []
    if report.linear_bits is not None:
        parts.append(f"products {bits(report.linear_bits)} bits")
    if report.table_bits is not None:
        parts.append(f"tables {bits(report.table_bits)} bits")
    return Text("mean with all side data: " + ", ".join(parts))


def _ceilings(report: QuantizeReport, asked: Asked) -> list[RenderableType]:
    """Asked and got, for every ceiling that was given."""
    rows: list[tuple[str, str, str]] = []
    if asked.size is not None:
        rows.append(("size", f"{asked.size:,} bytes", f"{report.bytes:,} bytes"))
    if asked.bits is not None:
        rows.append(("products", f"{asked.bits:g} bits", f"{report.linear_bits or 0:.4f} bits"))
    if asked.table_bits is not None:
        rows.append(("tables", f"{asked.table_bits:g} bits", f"{report.table_bits or 0:.4f} bits"))
    rows += [
        ("expected error", f"{item.asked:g}", f"{item.got:.4f}") for item in report.budget if item.what == "max_error"
    ]
    return [Text.assemble((f"{what}: ", "dim"), f"asked for at most {limit}, got {got}") for what, limit, got in rows]


def _check(check: OutputCheck) -> Text:
    outputs = ", ".join(f"{name} {percent(error)}" for name, error in list(check.relative_errors.items())[:6])
    return Text(f"output error on {count(check.samples, 'sample')}: {outputs}")


def notes(sentences: Sequence[str]) -> list[RenderableType]:
    """Notes, each on its own line."""
    return [Text.assemble(("note: ", "yellow"), sentence) for sentence in sentences]


def inspection(found: Inspection, *, verbose: bool) -> list[RenderableType]:
    """Where the bytes of a model are."""
    head = Text()
    head.append(found.path, style="bold")
    head.append(f"  {size(found.file_bytes)}", style="bold green")
    head.append(f"   opset {found.opset}, IR {found.ir_version}, {count(found.nodes, 'node')}", style="dim")
    head.append(f", by {found.producer}" if found.producer else "", style="dim")
    shown: list[RenderableType] = [head]
    if found.report is not None:
        report = found.report
        how = f"quantised by onnxq {report.version} with the recipe '{report.recipe.get('name', '?')}'"
        shown.append(Text(f"{how}; {report.calibration or 'no calibration data'}", style="dim"))
    shown += ["", _where(found), ""]
    shown.append(_inspected_weights(found, verbose))
    if found.kept:
        shown += ["", *kept_table(found.kept)]
    shown += [Text.assemble(("mismatch: ", "bold red"), sentence) for sentence in found.mismatches]
    return shown + notes(found.notes if verbose else found.notes[:8])


def _where(found: Inspection) -> Table:
    """Bytes by format, with a bar."""
    made = table("", ">bytes", ">share", ">bits", "", wide=())
    rows = [
        (
            str(label),
            sum(w.bytes for w in group),
            8 * sum(w.bytes for w in group) / sum(w.shape[0] * w.shape[1] for w in group),
        )
        for label, group in grouped(found.weights, lambda w: w.format).items()
    ]
    rows.sort(key=lambda row: -row[1])
    weights = sum(row[1] for row in rows)
    rest = [
        ("other constants", found.tensor_bytes - weights),
        ("graph, names, padding", found.file_bytes - found.tensor_bytes),
    ]
    for label, taken, mean in [*rows, *((label, taken, None) for label, taken in rest if taken > 0)]:
        share = taken / max(found.file_bytes, 1)
        made.add_row(
            label,
            size(taken),
            percent(share),
            "" if mean is None else bits(mean),
            Text("█" * round(40 * share), style="cyan"),
        )
    return made


def _inspected_weights(found: Inspection, verbose: bool) -> Table:
    total = max(found.file_bytes, 1)
    if verbose or len(found.weights) <= SHORT:
        made = table("weight", "shape", "format", "read by", ">bytes", ">share", ">bits", ">error", wide=("weight",))
        for w in found.weights:
            made.add_row(
                escape(w.name), shape(w.shape), w.format, w.form, size(w.bytes), percent(w.bytes / total),
                bits(w.bits_per_weight), error_text(w.relative_error, "" if w.measured else " *"),
            )  # fmt: skip
        if any(w.relative_error is not None and not w.measured for w in found.weights):
            made.caption = "* as reported by the quantiser; --reference MODEL measures it"
            made.caption_justify = "left"
        return made
    made = table(
        "layer",
        ">weights",
        ">bytes",
        ">share",
        ">bits",
        ">error",
        ">worst",
        "formats",
        wide=("layer", "formats"),
    )
    for layer, group in grouped(found.weights, lambda w: w.layer).items():
        made.add_row(escape(str(layer)), str(len(group)), *_layer_cells(group, total))
    return made


def _layer_cells(group: Sequence[InspectedWeight], total: int) -> tuple[str | Text, ...]:
    taken, numbers = sum(w.bytes for w in group), sum(w.shape[0] * w.shape[1] for w in group)
    worst = max((w.relative_error for w in group if w.relative_error is not None), default=None)
    return (
        size(taken),
        percent(taken / total),
        bits(8 * taken / numbers),
        error_text(pooled([(w.relative_error, w.shape[0] * w.shape[1]) for w in group])),
        error_text(worst),
        ", ".join(dict.fromkeys(w.format for w in group)),
    )


def sites(found: SiteReport) -> list[RenderableType]:
    """Every weight with its sites, and what is no weight."""
    made = table(
        "weight",
        "[N, K]",
        "dtype",
        ">bytes",
        "site",
        "kind",
        "op",
        "through",
        "in",
        wide=("weight", "site", "in"),
    )
    for weight in found.weights:
        stack = f"{weight.batch} x " if weight.batch > 1 else ""
        first = [
            escape(weight.name),
            f"{stack}{weight.n} x {weight.k}",
            weight.dtype.name.lower(),
            size(weight.bytes),
        ]
        for site in weight.sites:
            through = " ".join(node.op_type for node in site.chain)
            side = " (left)" if site.side == "left" else ""
            made.add_row(*first, escape(site.name), site.kind, site.node.op_type + side, through, escape(site.scope))
            first = [""] * 4
    kept = [KeptRecord(s.name, s.shape, s.dtype.name, s.bytes, s.reason) for s in found.skipped]
    return [made, "", *(kept_table(kept) if kept else []), *notes(found.notes)]
