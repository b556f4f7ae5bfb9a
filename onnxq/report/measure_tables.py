"""Comparisons and timings for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import RenderableType
from rich.markup import escape
from rich.text import Text

from onnxq.evaluation import LatencyReport, LayerError, LoadReport, OutputComparison, OutputError
from onnxq.report.tables import table
from onnxq.report.units import count, duration, percent, size

_FEW_LAYERS = 40


def comparison(found: OutputComparison, layers: Sequence[LayerError], *, verbose: bool) -> list[RenderableType]:
    """Errors of outputs, and of the tensors between where they were asked for."""
    made = table(
        "output",
        ">relative error",
        ">signal to noise",
        ">cosine",
        ">largest",
        ">argmax agrees",
        wide=("output",),
    )
    for error in found.outputs:
        agreement = "-" if error.agreement is None else percent(error.agreement)
        made.add_row(
            escape(error.name),
            percent(error.relative),
            _snr(error),
            f"{error.cosine:.6f}",
            f"{error.max_abs:.3g}",
            agreement,
        )
    shown: list[RenderableType] = [
        Text(f"{count(found.samples, 'sample')} in {count(found.batches, 'batch', 'batches')}", style="dim"),
        made,
    ]
    if not layers:
        return shown
    chosen = list(layers)
    if not verbose and len(chosen) > _FEW_LAYERS:
        chosen = sorted(chosen, key=lambda layer: layer.error.snr_db)[:_FEW_LAYERS]
        chosen.sort(key=lambda layer: layer.position)
    inner = table(">place", "op", "node", ">signal to noise", "", wide=("node",))
    for layer in chosen:
        inner.add_row(
            str(layer.position),
            layer.operator,
            escape(layer.node or layer.error.name),
            _snr(layer.error),
            _bar(layer.error.snr_db),
        )
    left = (
        f"the worst {len(chosen)} of {len(layers)}; --verbose shows all"
        if len(chosen) < len(layers)
        else "in graph order"
    )
    return [*shown, "", Text(f"tensors between, {left}", style="dim"), inner]


def _snr(error: OutputError) -> Text:
    if math.isinf(error.snr_db):
        return Text("exact" if error.snr_db > 0 else "no signal", style="green" if error.snr_db > 0 else "red")
    return Text(
        f"{error.snr_db:.1f} dB",
        style="green" if error.snr_db >= 20 else "yellow" if error.snr_db >= 10 else "red",
    )


def _bar(snr_db: float) -> Text:
    return Text("█" * max(0, min(30, round(snr_db / 2))) if math.isfinite(snr_db) else "", style="cyan")


def _ratio(value: float) -> Text:
    return Text(f"{value:.3f}", style="green" if value <= 1 else "red")


def latency(found: LatencyReport, loads: Mapping[str, LoadReport], *, library: bool) -> list[RenderableType]:
    """Times side by side: medians, and medians of ratios within rounds."""
    inputs = ", ".join(f"{name} {list(dims)}" for name, dims in found.shapes.items())
    how = "kernel library registered" if library else "without the kernel library"
    head = Text(f"{count(found.rounds, 'round')} in turns; inputs {inputs}; {how}", style="dim")
    made = table(
        "model",
        ">median",
        ">p10",
        ">p90",
        ">ratio",
        ">p10 to p90",
        ">load",
        ">memory",
        ">peak",
        wide=("model",),
    )
    for timing in found.timings:
        load = loads.get(timing.name)
        first = timing is found.timings[0]
        made.add_row(
            escape(timing.name), duration(timing.median), duration(timing.p10), duration(timing.p90),
            Text("1", style="dim") if first else _ratio(timing.ratio),
            "" if first else f"{timing.ratio_p10:.3f} to {timing.ratio_p90:.3f}",
            "-" if load is None else duration(load.create_seconds),
            "-" if load is None else size(load.loaded_bytes),
            "-" if load is None or load.peak_bytes is None else size(load.peak_bytes),
        )  # fmt: skip
    foot = Text(
        "ratio: time over the first model's, median over rounds; memory: above that of the empty process",
        style="dim",
    )
    return [head, made, foot]
