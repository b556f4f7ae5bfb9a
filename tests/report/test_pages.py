"""The HTML page, node data and tables: complete, well formed, and safe against names from strangers."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

import onnxq
from onnxq.recipe import uniform_recipe
from onnxq.report import tables, units
from onnxq.report.html import render_html, write_html
from onnxq.report.inspect import Inspection, inspect_model
from onnxq.report.node_data import node_data, write_node_data
from onnxq.report.records import KeptRecord, QuantizeReport, WeightRecord
from tests.runtime import models


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    folder = tmp_path_factory.mktemp("pages")
    models.encoder(folder / "float.onnx")
    onnxq.quantize(folder / "float.onnx", folder / "small.onnx", recipe=uniform_recipe(3, 32))
    return inspect_model(folder / "small.onnx")


class Balance(HTMLParser):
    """Checks that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(found: Inspection, tmp_path: Path) -> None:
    write_html(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|<link|@import|url\(|src=", page)
    parser = Balance()
    parser.feed(page)
    assert not parser.open


def test_the_page_shows_every_weight_with_bars(found: Inspection) -> None:
    page = render_html(found)
    for weight in found.weights:
        assert weight.name in page
        assert units.decibels(weight.relative_error) in page
    assert page.count("<svg") >= 3 * len(found.weights)
    assert "layer.0" in page
    assert "error-feedback" in page  # the recipe


def test_names_are_escaped(found: Inspection) -> None:
    bad = "<script>alert('x')</script> [red]"
    weights = (dataclasses.replace(found.weights[0], name=bad, format=bad), *found.weights[1:])
    changed = dataclasses.replace(found, path=bad, weights=weights, notes=(bad,), mismatches=(bad,), recipe=bad)
    assert "<script" not in render_html(changed)
    assert bad in shown(tables.inspection(changed, verbose=True))


def test_an_empty_model_has_a_page(found: Inspection) -> None:
    empty = dataclasses.replace(found, weights=(), kept=(), report=None, recipe="", file_bytes=0, tensor_bytes=0)
    assert "</html>" in render_html(empty)
    assert shown(tables.inspection(empty, verbose=False))


@pytest.mark.parametrize("metric", ["bits", "bytes", "error"])
def test_node_data_has_a_number_for_every_reader(found: Inspection, metric, tmp_path: Path) -> None:
    write_node_data(found, tmp_path / "nodes.json", metric)
    data = json.loads((tmp_path / "nodes.json").read_text())
    assert data == node_data(found, metric)
    outputs = {output for weight in found.weights for output in weight.outputs}
    assert set(data["results"]) == outputs
    assert all(isinstance(entry["value"], int | float) for entry in data["results"].values())
    assert [stop["stop"] for stop in data["gradient"]] == [0, 1]


def shown(parts) -> str:
    console = Console(file=StringIO(), width=200)
    for part in parts:
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined]


def weight(index: int, error: float) -> WeightRecord:
    return WeightRecord(
        name=f"layer.{index}.weight",
        kinds=("linear",),
        sites=1,
        shape=(64, 64),
        format="uniform 3-bit g32",
        form="LowBit",
        solver="nearest",
        source_bytes=16384,
        bytes=1920,
        relative_error=error,
        proxy_loss=None,
        note="",
        seconds=0.1,
    )


def report(count: int) -> QuantizeReport:
    kept = tuple(KeptRecord(f"b{i}", (64,), "FLOAT", 256, f"bias of Gemm '/layer.{i}/Gemm'") for i in range(3))
    return QuantizeReport(
        source="float.onnx",
        output="small.onnx",
        source_bytes=10**6,
        bytes=10**5,
        version="1",
        recipe={"name": "uniform"},
        calibration="",
        weights=tuple(weight(i, 0.01 * (i + 1) / count) for i in range(count)),
        kept=kept,
        notes=("look",),
        seconds=3.0,
        peak_memory=10**8,
    )


def test_many_weights_are_grouped_unless_all_are_asked_for() -> None:
    short = shown(tables.quantize_report(report(40), verbose=False, planned=False))
    assert "layer.39.weight" in short  # the worst
    assert "layer.7.weight" not in short
    long = shown(tables.quantize_report(report(40), verbose=True, planned=False))
    assert all(f"layer.{i}.weight" in long for i in range(40))


def test_kept_constants_are_grouped_by_reason() -> None:
    text = shown(tables.quantize_report(report(2), verbose=False, planned=False))
    (line,) = [line for line in text.splitlines() if "bias of Gemm" in line]
    assert line.split()[:2] == ["3", "768"]


def test_ceilings_are_shown_beside_what_was_got() -> None:
    asked = tables.Asked(bits=4.0, size=200_000)
    text = shown(tables.quantize_report(report(2), verbose=False, planned=False, asked=asked))
    assert "asked for at most 4 bits, got 3.7500 bits" in text
    assert "asked for at most 200,000 bytes, got 100,000 bytes" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(999, "999 B"), (20_000_000, "20.0 MB"), (123_456_789, "123 MB"), (2_500_000_000, "2.5 GB")],
)
def test_sizes(value: int, text: str) -> None:
    assert units.size(value) == text


def test_decibels() -> None:
    assert units.decibels(0.01) == "20.0 dB"
    assert units.decibels(0.0) == "exact"
    assert units.decibels(None) == "-"
