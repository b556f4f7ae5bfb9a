"""Folders whose graphs share weights and work together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnxq
from onnxq.calibration.trace import Trace
from onnxq.errors import BudgetError, CalibrationError
from onnxq.pipeline import write
from onnxq.recipe import BinarySpec, GridSpec, LinearPlan, Recipe, Rule, TablePlan
from onnxq.report.records import FolderReport
from tests.graph import models
from tests.pair import DECODER, ENCODER, generate, make_folder, open_pair, record, sentences

SMALL = Recipe("small", min_elements=64)
BINARY = Recipe(
    "planes",
    linear=LinearPlan(binary=BinarySpec(3)),
    tables=TablePlan(binary=BinarySpec(4)),
    min_elements=64,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "pair")


@pytest.fixture
def trace(folder: Path, tmp_path: Path) -> Trace:
    return record(folder, tmp_path / "trace")


def quantized(folder: Path, out: Path, recipe: Recipe = SMALL, **options: object) -> FolderReport:
    return onnxq.quantize_folder(folder, out, recipe=recipe, **options)  # type: ignore[arg-type]


def stored(path: Path) -> dict[str, np.ndarray]:
    proto = onnx.load(path)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def location(tensor: onnx.TensorProto) -> str | None:
    """The data file of an initializer; None inside the model."""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), None)


def table_of(report: FolderReport, graph: str, name: str) -> str:
    (record,) = (weight for weight in report[graph].weights if weight.name == name)
    return record.format


@pytest.mark.parametrize("recipe", [SMALL, BINARY])
def test_a_shared_table_is_stored_alike(folder: Path, trace: Trace, tmp_path: Path, recipe: Recipe) -> None:
    """Solved once, by the decoder's statistics, with which its head is multiplied."""
    report = quantized(folder, tmp_path / "out", recipe, calibration=trace)
    assert table_of(report, ENCODER, "table") == table_of(report, DECODER, "shared")
    (encoders,) = (weight for weight in report[ENCODER].weights if weight.name == "table")
    assert encoders.kinds == ("table",)
    assert encoders.solver == "error-feedback"
    first, second = (onnx.load(tmp_path / "out" / name, load_external_data=False) for name in (DECODER, ENCODER))
    assert {location(tensor) for tensor in first.graph.initializer} <= {None, f"{DECODER}.data"}
    codes = max((tensor for tensor in second.graph.initializer if "table" in tensor.name), key=lambda t: sum(t.dims))
    assert location(codes) == f"{DECODER}.data"
    one, other = stored(tmp_path / "out" / ENCODER), stored(tmp_path / "out" / DECODER)
    pairs = [(one[f"table.{role}"], array) for name, array in other.items() if (role := name.partition("shared.")[2])]
    assert len(pairs) >= 2
    for left, right in pairs:
        np.testing.assert_array_equal(left, right)


def test_the_result_translates(folder: Path, trace: Trace, tmp_path: Path) -> None:
    quantized(folder, tmp_path / "out", onnxq.uniform_recipe(8), calibration=trace)
    quick = dataclasses.replace(onnxq.uniform_recipe(8), min_elements=64)
    quantized(folder, tmp_path / "eight", quick, calibration=trace)
    before, after = open_pair(folder), open_pair(tmp_path / "eight")
    alike = [generate(ids, *before) == generate(ids, *after) for ids in sentences(8, seed=5)]
    assert sum(alike) >= 6


def test_every_graph_is_checked_on_its_own_feeds(folder: Path, trace: Trace, tmp_path: Path) -> None:
    report = quantized(folder, tmp_path / "out", calibration=trace)
    for graph, outputs in ((ENCODER, {"memory"}), (DECODER, {"logits", "new_state"})):
        check = report[graph].check
        assert check is not None
        assert set(check.relative_errors) == outputs


def test_rules_speak_of_parts(folder: Path, tmp_path: Path) -> None:
    rules = (
        Rule("part:encoder.*", grid=GridSpec(8)),
        Rule("part:decoder.cross", binary=BinarySpec(2)),
        Rule("part:embedding", keep=True),
    )
    report = quantized(folder, tmp_path / "out", dataclasses.replace(SMALL, rules=rules))
    formats = {weight.name: weight.format for graph in report.values() for weight in graph.weights}
    assert formats["decoder.layers.0.encoder_attn.v_proj"] == "binary 2-bit"
    assert formats["encoder.layers.0.fc1"].startswith("uniform 8-bit")
    assert formats["decoder.layers.0.rnn.W"].startswith("uniform 4-bit")
    assert {"table", "shared"}.isdisjoint(formats)


def test_one_size_for_all_graphs(folder: Path, trace: Trace, tmp_path: Path) -> None:
    eight = quantized(folder, tmp_path / "eight", dataclasses.replace(onnxq.uniform_recipe(8), min_elements=64))
    size = int(0.95 * eight.bytes)
    report = quantized(folder, tmp_path / "out", calibration=trace, size=size)
    files = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.onnx*"))
    assert report.bytes == files <= size
    (ceiling,) = report.budget
    assert (ceiling.what, ceiling.asked) == ("size", size)
    assert any("sub-layers were measured on 12 samples" in note for note in report.notes)
    with pytest.raises(BudgetError, match="below the floor"):
        quantized(folder, tmp_path / "none", calibration=trace, size=1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eight", "out", "pair", "trace"]


def test_bits_go_where_the_results_suffer(folder: Path, trace: Trace, tmp_path: Path) -> None:
    """The decoder's cross-attention is scaled down: nearly nothing of the encoder reaches the results."""
    proto = onnx.load(folder / DECODER)
    (cross,) = (tensor for tensor in proto.graph.initializer if tensor.name == "onnx::MatMul_6")
    cross.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(cross) / 100, cross.name))
    onnx.save(proto, folder / DECODER)
    deaf = record(folder, tmp_path / "deaf")
    quantized(folder, tmp_path / "out", calibration=deaf, bits=3.5)
    report = quantized(folder, tmp_path / "again", calibration=deaf, bits=3.5, curves=tmp_path / "curves")
    bits = {weight.name: weight.bits_per_weight for graph in report.values() for weight in graph.weights}
    assert bits["encoder.layers.0.fc1"] < bits["decoder.layers.0.rnn.W"]
    assert report.budget[0].got <= 3.5
    kept = quantized(folder, tmp_path / "kept", calibration=deaf, bits=3.0, curves=tmp_path / "curves")
    assert any("measured by an earlier run" in note for note in kept.notes)


def test_an_error_decides_the_size(folder: Path, trace: Trace, tmp_path: Path) -> None:
    loose = quantized(folder, tmp_path / "loose", calibration=trace, max_error=0.5)
    tight = quantized(folder, tmp_path / "tight", calibration=trace, max_error=0.02)
    assert loose.bytes < tight.bytes
    assert tight.budget[0].got <= 0.02
    with pytest.raises(BudgetError, match="not known without a trace"):
        quantized(folder, tmp_path / "none", max_error=0.1)


def test_an_interrupted_folder_goes_on(
    folder: Path, trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve, solved = write.solve_weight, []

    def interrupted(planned, *rest):  # type: ignore[no-untyped-def]
        if len(solved) == 4:
            raise KeyboardInterrupt
        solved.append(planned.weight.name)
        return solve(planned, *rest)

    monkeypatch.setattr(write, "solve_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantized(folder, tmp_path / "out", calibration=trace)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.resume", "pair", "trace"]
    monkeypatch.setattr(write, "solve_weight", solve)
    report = quantized(folder, tmp_path / "out", calibration=trace)
    # One of the four is held by both graphs.
    assert any("3 weights were solved already" in note for graph in report.values() for note in graph.notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pair", "trace"]


def test_a_graph_that_would_grow_is_carried_over(folder: Path, tmp_path: Path) -> None:
    small = models.model(
        [models.node("MatMul", "x w", "y", "/fc/MatMul")],
        [models.floats("x", ["b", 32])],
        [models.floats("y", ["b", 16])],
        {"w": models.weight(32, 16)},
    )
    models.save(small, folder / "tiny.onnx", external=True)
    report = quantized(folder, tmp_path / "out")
    assert (tmp_path / "out" / "tiny.onnx").read_bytes() == (folder / "tiny.onnx").read_bytes()
    assert (tmp_path / "out" / "tiny.onnx.data").read_bytes() == (folder / "tiny.onnx.data").read_bytes()
    tiny = report["tiny.onnx"]
    assert tiny.bytes == tiny.source_bytes
    assert tiny.weights == ()
    assert "no fewer than its" in tiny.kept[-1].reason


def test_data_by_graph(folder: Path, trace: Trace, tmp_path: Path) -> None:
    feeds = {DECODER: list(trace.feeds(DECODER))}
    report = quantized(folder, tmp_path / "out", calibration=feeds)
    solvers = {weight.name: weight.solver for graph in report.values() for weight in graph.weights}
    assert solvers["decoder.layers.0.rnn.W"] == "error-feedback"
    assert solvers["encoder.layers.0.fc1"] == "nearest"
    named = tmp_path / "data"
    named.mkdir()
    np.savez(named / "encoder_model.npz", ids=np.stack([ids[:4] for ids in sentences(6)]))
    report = quantized(folder, tmp_path / "named", calibration=named)
    assert report[ENCODER].calibration == "6 samples of encoder_model.npz"
    with pytest.raises(CalibrationError, match=r"data for other\.onnx"):
        quantized(folder, tmp_path / "none", calibration={"other.onnx": feeds[DECODER]})
