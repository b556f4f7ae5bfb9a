"""An inspection as one HTML page that needs nothing else: no scripts, no fonts, no network.

Bars are inline SVG, so the page prints, mails and archives as it is.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path

from onnxq.report.inspect import InspectedWeight, Inspection
from onnxq.report.records import KeptRecord
from onnxq.report.tables import grouped, pooled
from onnxq.report.units import bits, count, decibels, noise_decibels, percent, ratio, shape, size

_PALETTE = ("#2f6fab", "#c8553d", "#5b8c5a", "#8a6bb1", "#c79a2b", "#3a9d9d", "#a05195", "#6b7280")
_FULL_SCALE_DB = 40.0
"""Signal-to-noise at which the error column's bar is full."""

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1d2430; --soft: #667085; --line: #e3e7ee; --paper: #ffffff; --bar: #2f6fab; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #313a48; --paper: #14181f; --bar: #6aa5dc; }
}
body { font: 14px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
.soft { color: var(--soft); } .wrong { color: #b42318; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .9rem; }
.card b { display: block; font-size: 1.25rem; }
table { border-collapse: collapse; width: 100%; } .scroll { overflow-x: auto; }
td, th { border-bottom: 1px solid var(--line); padding: .15rem .5rem; white-space: nowrap; }
th { text-align: left; font-weight: 600; color: var(--soft); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.wrap { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
svg { display: block; } svg text { fill: var(--ink); font-size: 11px; }
.track { fill: var(--line); } .fill { fill: var(--bar); }
.key { display: inline-block; width: .8em; height: .8em; border-radius: .15em; margin-right: .35em; }
.legend span { margin-right: 1.2em; white-space: nowrap; }
details { margin: .5rem 0; }
pre { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; }
"""


def write_html(inspection: Inspection, path: str | Path) -> None:
    """Writes the page of an inspection."""
    Path(path).write_text(render_html(inspection), encoding="utf-8")


def render_html(inspection: Inspection) -> str:
    """The page of an inspection as text."""
    name = Path(inspection.path).name
    colours = _colours(inspection.weights)
    parts = [
        f"<h1>{_text(name)}</h1>",
        f'<div class="soft">{_text(_origin(inspection))}</div>',
        _cards(inspection),
        *(f'<p class="wrong">Mismatch: {_text(sentence)}.</p>' for sentence in inspection.mismatches),
        "<h2>Where the bytes are</h2>",
        _strip(inspection, colours),
        "<h2>Layers</h2>",
        _layers(inspection.weights, colours),
        "<h2>Weights</h2>",
        _weights(inspection.weights, inspection.file_bytes, colours),
    ]
    if inspection.kept:
        parts += ["<h2>Other constants</h2>", _kept(inspection.kept)]
    notes = (*(inspection.report.notes if inspection.report else ()), *inspection.notes)
    if notes:
        items = "".join(f"<li>{_text(note)}</li>" for note in notes)
        parts.append(f"<details><summary>{count(len(notes), 'note')}</summary><ul>{items}</ul></details>")
    if inspection.recipe:
        parts.append(f"<details><summary>Recipe</summary><pre>{_text(inspection.recipe)}</pre></details>")
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(name)}: weights</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _colours(weights: Sequence[InspectedWeight]) -> dict[str, str]:
    """One colour per format, the formats with most bytes first; the last one serves all that remain."""
    by_format = {
        str(label): sum(w.bytes for w in group) for label, group in grouped(weights, lambda w: w.format).items()
    }
    order = sorted(by_format, key=lambda label: -by_format[label])
    return {label: _PALETTE[min(index, len(_PALETTE) - 1)] for index, label in enumerate(order)}


def _origin(found: Inspection) -> str:
    said = f"opset {found.opset}, IR {found.ir_version}, {count(found.nodes, 'node')}"
    if found.report is None:
        return said + (f", by {found.producer}" if found.producer else "")
    report = found.report
    return f"{said}; quantised by onnxq {report.version}; {report.calibration or 'no calibration data'}"


def _cards(found: Inspection) -> str:
    cards = [(size(found.file_bytes), "on disk"), (str(len(found.weights)), "weights")]
    if found.weight_bits is not None:
        cards.append((bits(found.weight_bits), "bits per weight, all side data counted"))
    if found.report is not None and found.report.source_bytes:
        cards.append((ratio(found.file_bytes, found.report.source_bytes), "smaller than the source"))
    error = pooled([(w.relative_error, w.shape[0] * w.shape[1]) for w in found.weights])
    if error is not None:
        cards.append((decibels(error), "signal to noise of the weights"))
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{_text(a)}</b>{_text(b)}</div>' for a, b in cards)
        + "</div>"
    )


def _rect(x: float, width: float, height: int, colour: str, title: str) -> str:
    """A piece of a bar, with a tooltip."""
    box = f'x="{x:.2f}" width="{max(width, 0.3):.2f}" height="{height}"'
    return f'<rect {box} fill="{colour}"><title>{_text(title)}</title></rect>'


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    """Rows under heads; a head that begins with ``>`` belongs to a column of numbers."""
    cells = "".join(
        f'<th class="n">{_text(head[1:])}</th>' if head.startswith(">") else f"<th>{_text(head)}</th>" for head in heads
    )
    return f'<div class="scroll"><table><tr>{cells}</tr>{"".join(rows)}</table></div>'


def _number(value: str) -> str:
    return f'<td class="n">{_text(value)}</td>'


def _long(value: str, title: str = "") -> str:
    """A cell of text that may break."""
    return f'<td class="wrap" title="{_text(title)}">{_text(value)}</td>'


def _strip(found: Inspection, colours: dict[str, str]) -> str:
    """One bar of the whole file, by format."""
    total = max(found.file_bytes, 1)
    rows = [
        (label, sum(w.bytes for w in found.weights if w.format == label), colour) for label, colour in colours.items()
    ]
    weights = sum(taken for _, taken, _ in rows)
    rows.append(("other constants", max(found.tensor_bytes - weights, 0), "#9aa4b2"))
    rows.append(("graph, names, padding", max(found.file_bytes - found.tensor_bytes, 0), "#c9d0da"))
    drawn, legend, at = [], [], 0.0
    for label, taken, colour in rows:
        if not taken:
            continue
        width = 1000 * taken / total
        drawn.append(_rect(at, width, 26, colour, f"{label}: {size(taken)}, {percent(taken / total)}"))
        key = f'<i class="key" style="background:{colour}"></i>'
        legend.append(f"<span>{key}{_text(label)} {size(taken)}</span>")
        at += width
    return (
        '<svg viewBox="0 0 1000 26" width="100%" height="26" preserveAspectRatio="none" role="img" '
        f'aria-label="bytes by format">{"".join(drawn)}</svg><p class="legend">{"".join(legend)}</p>'
    )


def _bar(share: float, colour: str, title: str) -> str:
    """A bar on a track of 120 pixels; `share` of 1 fills it."""
    track = '<rect class="track" width="120" height="12"/>'
    filled = _rect(0, 120 * min(max(share, 0.0), 1.0), 12, colour, title)
    return f'<svg width="120" height="12">{track}{filled}</svg>'


def _stacked(group: Sequence[InspectedWeight], most: int, colours: dict[str, str]) -> str:
    """A layer's bytes, each weight in the colour of its format; `most` bytes are 360 pixels."""
    drawn, at = [], 0.0
    for weight in group:
        width = 360 * weight.bytes / max(most, 1)
        title = f"{weight.name}: {size(weight.bytes)}, {bits(weight.bits_per_weight)} bits"
        drawn.append(_rect(at, width - 0.5, 14, colours[weight.format], title))
        at += width
    return f'<svg width="360" height="14">{"".join(drawn)}</svg>'


def _layers(weights: Sequence[InspectedWeight], colours: dict[str, str]) -> str:
    layers = {str(layer): group for layer, group in grouped(weights, lambda w: w.layer).items()}
    most = max((sum(w.bytes for w in group) for group in layers.values()), default=1)
    rows = []
    for layer, group in layers.items():
        taken, numbers = sum(w.bytes for w in group), sum(w.shape[0] * w.shape[1] for w in group)
        error = pooled([(w.relative_error, w.shape[0] * w.shape[1]) for w in group])
        bars = f"<td>{_stacked(group, most, colours)}</td>{_number(size(taken))}"
        mean = f"<td>{_bits_bar(8 * taken / max(numbers, 1))}</td>"
        rows.append(f"<tr>{_long(layer)}{bars}{mean}{_error_cells(error)}</tr>")
    return _table(["layer", "bytes", ">", "bits per weight", "signal to noise", ">"], rows)


def _bits_bar(mean: float) -> str:
    """Bits on a scale that is full at 8, with the number."""
    track = '<rect class="track" width="100" height="12" y="1"/>'
    fill = f'<rect class="fill" width="{100 * min(mean, 8) / 8:.1f}" height="12" y="1"/>'
    return f'<svg width="150" height="14">{track}{fill}<text x="106" y="11">{bits(mean)}</text></svg>'


def _error_cells(error: float | None) -> str:
    """The error as a bar of decibels and as a number."""
    if error is None:
        return '<td></td><td class="n soft">-</td>'
    level = noise_decibels(error)
    colour = "#5b8c5a" if level >= 25 else "#c79a2b" if level >= 15 else "#c8553d"
    share = 1.0 if math.isinf(level) else level / _FULL_SCALE_DB
    return f"<td>{_bar(share, colour, decibels(error))}</td>{_number(decibels(error))}"


def _weights(weights: Sequence[InspectedWeight], total: int, colours: dict[str, str]) -> str:
    most = max((w.bytes for w in weights), default=1)
    rows = []
    for w in weights:
        key = f'<i class="key" style="background:{colours[w.format]}"></i>'
        name = _long(w.name, f"{', '.join(w.tensors)} read by {', '.join(w.nodes)}")
        form = f"<td>{key}{_text(w.format)}</td><td>{_text(w.form)}</td>"
        bar = f"<td>{_bar(w.bytes / max(most, 1), colours[w.format], size(w.bytes))}</td>"
        share = _number(size(w.bytes)) + _number(percent(w.bytes / max(total, 1)))
        numbers = f"{_number(bits(w.bits_per_weight))}{_error_cells(w.relative_error)}"
        rows.append(f"<tr>{name}{_number(shape(w.shape))}{form}{bar}{share}{numbers}</tr>")
    heads = ["weight", ">N x K", "format", "read by", "bytes", ">", ">share", ">bits", "signal to noise", ">"]
    return _table(heads, rows)


def _kept(kept: Sequence[KeptRecord]) -> str:
    rows = []
    for item in kept:
        dtype = f"<td>{_text(item.dtype.lower())}</td>"
        sizes = f"{_number(shape(item.shape))}{dtype}{_number(size(item.bytes))}"
        rows.append(f"<tr>{_long(item.name)}{sizes}{_long(item.reason)}</tr>")
    what = f"{count(len(kept), 'constant')}, {size(sum(item.bytes for item in kept))}"
    heads = ["constant", ">shape", "type", ">bytes", "why it is no weight"]
    return f"<details><summary>{what}</summary>{_table(heads, rows)}</details>"
