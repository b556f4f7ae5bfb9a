"""`quantize` with weights in frames, end to end on a small block of attention and MLP."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import onnxq
from onnxq.formats.codebook import CodebookFormat
from onnxq.formats.framed import FramedFormat
from onnxq.formats.uniform import UniformFormat, ZeroPoint
from onnxq.pipeline import write as pipeline
from onnxq.recipe import FrameSpec, GridSpec, Recipe, Rule
from onnxq.report.inspect import inspect_model
from onnxq.report.records import QuantizeReport
from tests.encodings import relative_error
from tests.graph import models

EQUAL_STEPS = "uniform 2-bit column midrise in"
"""What is kept where a trellis of a few tiles loses to it."""
WIDTH, HIDDEN = 128, 256
WEIGHTS = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "o": (WIDTH, WIDTH)} | {
    "up": (WIDTH, HIDDEN),
    "down": (HIDDEN, WIDTH),
}
TWO_BITS = 0.25
"""Largest relative squared error of a weight at 2 bits, feedback and all."""
SAME_PRODUCT = 1e-4
"""One model on two runtimes with float32 activations."""


def block() -> onnx.ModelProto:
    """x -> q, k, v -> softmax(q k^T) v -> o -> Relu between up and down."""
    nodes = [models.node("MatMul", f"x {name}.weight", name, f"/{name}/MatMul") for name in "qkv"]
    nodes += [
        models.node("Transpose", "k", "kt", "/kt", perm=[0, 2, 1]),
        models.node("MatMul", "q kt", "scores", "/scores"),
        models.node("Softmax", "scores", "shares", "/softmax", axis=-1),
        models.node("MatMul", "shares v", "mixed", "/mixed"),
        models.node("Relu", "mixed", "mixed_r", "/relu"),
        models.node("MatMul", "mixed_r o.weight", "attended", "/o/MatMul"),
        models.node("Tanh", "attended", "t", "/tanh"),
        models.node("MatMul", "t up.weight", "u", "/up/MatMul"),
        models.node("Add", "u up.bias", "ub", "/up/Add"),
        models.node("Relu", "ub", "a", "/act"),
        models.node("MatMul", "a down.weight", "y", "/down/MatMul"),
    ]
    arrays = {f"{name}.weight": models.weight(*shape, seed=i) / 12 for i, (name, shape) in enumerate(WEIGHTS.items())}
    arrays["up.bias"] = models.weight(HIDDEN, seed=9)
    sizes = ["b", "s", WIDTH]
    return models.model(nodes, [models.floats("x", sizes)], [models.floats("y", sizes)], arrays)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(block(), tmp_path_factory.mktemp("source") / "model.onnx")


DATA = [{"x": models.weight(4, 16, 6, seed=seed) @ models.weight(6, WIDTH, seed=90)} for seed in range(4)]


def recipe(name: str = "framequant", **changes: Any) -> Recipe:
    """A preset for small models, with changes to its `linear`."""
    base = dataclasses.replace(Recipe.load(name), min_elements=64)
    target = changes.pop("target", base.target)
    linear = dataclasses.replace(base.linear, **changes)
    return dataclasses.replace(base, linear=linear, target=target)


def quantize(source: Path, out: Path, chosen: Recipe, **options: Any) -> QuantizeReport:
    options.setdefault("calibration", DATA)
    return onnxq.quantize(source, out, recipe=chosen, **options)


def disk(out: Path) -> int:
    return sum(file.stat().st_size for file in out.parent.glob(f"{out.name}*"))


def check_written(source: Path, out: Path, report: QuantizeReport, *, measurable: bool = True) -> None:
    """Bytes, shapes and errors are those of the file."""
    assert report.bytes == disk(out)
    onnx.checker.check_model(str(out), full_check=True)
    assert {record.name for record in report.weights} == {f"{name}.weight" for name in WEIGHTS}
    found = inspect_model(out, reference=source if measurable else None)
    assert not found.mismatches
    assert found.file_bytes == report.bytes
    assert {weight.name: weight.shape for weight in found.weights} == {
        f"{name}.weight": shape[::-1] for name, shape in WEIGHTS.items()
    }
    told = {record.name: record for record in report.weights}
    for weight in found.weights:
        assert weight.relative_error == pytest.approx(told[weight.name].relative_error, rel=1e-3)
        assert weight.measured == measurable


FRAMES = {
    "preset": FrameSpec(),
    "redundant": FrameSpec(1.125),
    "two sides": FrameSpec(1.0, 1.0),
    "both redundant": FrameSpec(1.125, 1.25),
}


@pytest.mark.parametrize("frame", FRAMES)
def test_two_bits_with_a_trellis(frame: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.onnx"
    fed = frame == "preset"
    report = quantize(source, out, recipe(frame=FRAMES[frame]), calibration=DATA if fed else None)
    check_written(source, out, report)
    kinds = {("trellis 2-bit w4 column in", "CodebookMatMul in a frame"), (EQUAL_STEPS, "LowBit in a frame")}
    found = {(record.format.split(" frame ")[0], record.form) for record in report.weights}
    assert found <= kinds
    assert any(record.form.startswith("Codebook") for record in report.weights)
    for record in report.weights:
        assert record.solver == ("error-feedback" if fed else "nearest")
        assert record.relative_error is not None
        assert 0.02 < record.relative_error < TWO_BITS
    if frame == "preset":
        for weight in inspect_model(out).weights:
            # Scales are 16 bits a column of 128 or more.
            assert 2 < weight.bits_per_weight <= 2 + 16 / 128 + 0.05
            assert weight.code_bits == 2
    names = [node.op_type for node in onnx.load(out, load_external_data=False).graph.node]
    assert names.count("FrameAnalysis") == 4  # q, k and v have one
    assert names.count("FrameSynthesis") == (6 if FRAMES[frame].output_redundancy else 0)
    x = DATA[0]["x"]
    assert np.isfinite(onnxq.session(out, library=False).run(None, {"x": x})[0]).all()


def test_the_report_says_what_redundancy_became(source: Path, tmp_path: Path) -> None:
    def notes(redundancy: float, **options: Any) -> dict[str, str]:
        chosen = recipe("framequant-paper", frame=FrameSpec(redundancy))
        report = quantize(source, tmp_path / "s.onnx", chosen, calibration=None, force=True, **options)
        return {record.name: record.note for record in report.weights}

    assert notes(1.125)["q.weight"] == "redundancy 1 for 1.125, with 128 inputs"
    assert notes(1.125, plan_only=True)["q.weight"] == "redundancy 1 for 1.125, with 128 inputs"
    assert notes(1.125, plan_only=True)["down.weight"] == ""
    assert set(notes(1.25, plan_only=True).values()) == {""}


def test_the_published_recipe(source: Path, tmp_path: Path) -> None:
    report = quantize(source, tmp_path / "s.onnx", recipe("framequant-paper"))
    check_written(source, tmp_path / "s.onnx", report)
    assert {record.format for record in report.weights} == {
        "uniform 2-bit column per-group-integer in frame 1.125",
    }
    equal = recipe(frame=FrameSpec(1.125), grid=GridSpec(2, "column"))
    ours = quantize(source, tmp_path / "t.onnx", equal)
    assert sum(r.proxy_loss or 0 for r in ours.weights) < sum(r.proxy_loss or 0 for r in report.weights)


@pytest.mark.parametrize("preset", ["framequant", "framequant-paper"])
@pytest.mark.parametrize("frame", FRAMES)
def test_stock_onnx_runtime_runs_it_without_functions(frame: str, preset: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.onnx"
    report = quantize(source, out, recipe(preset, frame=FRAMES[frame], target="stock"))
    assert report.bytes == disk(out)
    written = onnx.load(out, load_external_data=False)
    onnx.checker.check_model(str(out), full_check=True)
    assert not written.functions
    assert {node.domain for node in written.graph.node} == {"", "com.microsoft"}
    assert all(record.format.startswith("uniform 2-bit column") for record in report.weights)
    assert all("in a frame" in record.form for record in report.weights)
    if preset == "framequant":
        assert all("equal steps: no table of levels serves it" in record.note for record in report.weights)
    check_written(source, out, report, measurable=False)
    assert {weight.code_bits for weight in inspect_model(out).weights} == {2}


@pytest.mark.parametrize("target", ["kernel", "stock"])
def test_wide_codes_in_a_frame_change_nothing(target: str, source: Path, tmp_path: Path) -> None:
    """8 bits in frames on both sides: graph, frames and solver agree."""
    eight_bits = 0.08  # a softmax of large scores is steep
    chosen = recipe(frame=FrameSpec(1.125, 1.25), grid=GridSpec(8, "column"), target=target)
    quantize(source, tmp_path / "s.onnx", chosen)
    x = DATA[0]["x"]
    expected = models.run(source, {"x": x})[0]
    got = onnxq.session(tmp_path / "s.onnx", library=False).run(None, {"x": x})[0]
    assert relative_error(got, expected) <= eight_bits


def test_the_kernel_library_computes_the_same(source: Path, library: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "s.onnx", recipe(frame=FrameSpec(1.125, 1.25), activations="float32"), calibration=None)
    x = DATA[0]["x"]
    exact = {"session.qdq_matmulnbits_accuracy_level": "1"}
    stock, kernel = (
        ort.InferenceSession(
            str(tmp_path / "s.onnx"),
            onnxq.session_options(library=use, config=exact),
            providers=["CPUExecutionProvider"],
        ).run(None, {"x": x})[0]
        for use in (False, True)
    )
    assert relative_error(kernel, stock) <= SAME_PRODUCT


def test_a_frame_helps_where_few_inputs_are_loud(tmp_path: Path) -> None:
    proto = block()
    loud = models.weight(WIDTH, WIDTH) / 12
    loud[5] *= 40
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(loud, "q.weight"))
    source = models.save(proto, tmp_path / "loud.onnx")
    errors = {}
    for name, frame in (("framed", FrameSpec()), ("plain", None)):
        report = quantize(source, tmp_path / f"{name}.onnx", recipe(frame=frame), calibration=None)
        errors[name] = next(record.relative_error for record in report.weights if record.name == "q.weight")
    assert errors["framed"] < 0.5 * errors["plain"]


def test_few_outputs_take_equal_steps(tmp_path: Path) -> None:
    """A classifier's head has too short runs for a trellis."""
    proto = models.model(
        [models.node("MatMul", "x head.weight", "y", "head")],
        [models.floats("x", ["b", 256])],
        [models.floats("y", ["b", 9])],
        {"head.weight": models.weight(256, 9)},
    )
    source = models.save(proto, tmp_path / "m.onnx")
    (record,) = quantize(source, tmp_path / "s.onnx", recipe(), calibration=None).weights
    assert record.format == "uniform 2-bit column midrise in frame 1"
    assert record.relative_error is not None
    assert record.relative_error < TWO_BITS


def test_an_interrupted_run_goes_on_with_frames(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    chosen, out = recipe(frame=FrameSpec(1.125, 1.25)), tmp_path / "s.onnx"
    solve, solved = pipeline.solve_weight, []

    def interrupted(planned, *rest):
        if len(solved) == 3:
            raise KeyboardInterrupt
        solved.append(planned.weight.name)
        return solve(planned, *rest)

    monkeypatch.setattr(pipeline, "solve_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, chosen, calibration=None)
    monkeypatch.undo()
    encoded: list[str] = []
    from onnxq.pipeline import solve as solving

    best = solving._best
    monkeypatch.setattr(solving, "_best", lambda *a: encoded.append("one") or best(*a))
    report = quantize(source, out, chosen, calibration=None)
    assert "went on from an interrupted run: 3 weights were solved already" in report.notes
    assert len(encoded) == len(WEIGHTS) - 3
    quantize(source, tmp_path / "fresh.onnx", chosen, calibration=None)
    assert (tmp_path / "fresh.onnx.data").read_bytes() == (tmp_path / "s.onnx.data").read_bytes()


@pytest.mark.parametrize("target", ["kernel", "stock"])
@pytest.mark.parametrize("preset", ["framequant", "framequant-paper"])
@pytest.mark.parametrize("bits", [2.7, 3.4])
def test_bits_are_a_ceiling_in_a_frame_too(bits: float, preset: str, target: str, source: Path, tmp_path: Path) -> None:
    report = quantize(source, tmp_path / "s.onnx", recipe(preset, target=target), calibration=None, bits=bits)
    assert report.linear_bits is not None
    assert report.linear_bits <= bits
    assert report.linear_bits >= 0.7 * bits


@pytest.mark.parametrize("target", ["kernel", "stock"])
def test_a_size_is_a_ceiling_in_a_frame_too(target: str, source: Path, tmp_path: Path) -> None:
    size = int(0.3 * source.stat().st_size)
    report = quantize(
        source, tmp_path / "s.onnx", recipe(frame=FrameSpec(1.125), target=target), calibration=None, size=size
    )
    assert report.bytes == disk(tmp_path / "s.onnx") <= size


def test_seeds_decide_the_frames(source: Path, tmp_path: Path) -> None:
    files = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        quantize(source, tmp_path / f"{name}.onnx", dataclasses.replace(recipe(), seed=seed), calibration=None)
        files[name] = (tmp_path / f"{name}.onnx.data").read_bytes()
    assert files["a"] == files["b"] != files["c"]


def test_rules_and_tables_with_a_frame(tmp_path: Path) -> None:
    """A tied table's rows are synthesised; a rule's grid is framed too."""
    source = models.save(models.tied_embedding(stored_twice=False, rows=160, width=128), tmp_path / "tied.onnx")
    report = onnxq.quantize(source, tmp_path / "s.onnx", recipe=recipe(frame=FrameSpec(1.25)))
    tied = next(record for record in report.weights if record.kinds == ("table", "linear"))
    assert tied.format == "uniform 2-bit column midrise in frame 1.25"
    assert "equal steps: no table of levels serves it" in tied.note
    found = inspect_model(tmp_path / "s.onnx", reference=source)
    assert not found.mismatches
    for weight in found.weights:
        assert weight.measured
        assert weight.relative_error < 0.2
    rules = (Rule("*", grid=GridSpec(4, 32)),)
    report = onnxq.quantize(source, tmp_path / "r.onnx", recipe=dataclasses.replace(recipe(), rules=rules))
    assert next(r.format for r in report.weights if "linear" in r.kinds) == "uniform 4-bit g32 midrise in frame 1"


@pytest.mark.parametrize("size", [100, 521])
@pytest.mark.parametrize("target", ["kernel", "stock"])
def test_sizes_that_a_frame_pads(size: int, target: str, tmp_path: Path) -> None:
    proto = models.model(
        [
            models.node("MatMul", "x w", "h", "/w"),
            models.node("Relu", "h", "r"),
            models.node("MatMul", "r v", "y", "/v"),
        ],
        [models.floats("x", ["b", "s", size])],
        [models.floats("y", ["b", "s", size])],
        {"w": models.weight(size, 160), "v": models.weight(160, size)},
    )
    source = models.save(proto, tmp_path / "m.onnx")
    chosen = recipe(frame=FrameSpec(1.125, 1.0), grid=GridSpec(8, "column"), target=target)
    report = quantize(source, tmp_path / "s.onnx", chosen, calibration=None)
    x = models.weight(2, 3, size, seed=7)
    got = onnxq.session(tmp_path / "s.onnx", library=False).run(None, {"x": x})[0]
    eight_bits = 0.03
    assert relative_error(got, models.run(source, {"x": x})[0]) <= eight_bits
    if target == "kernel":
        found = inspect_model(tmp_path / "s.onnx", reference=source)
        assert not found.mismatches
        assert [weight.shape for weight in found.weights] == [(160, size), (size, 160)]
        told = {record.name: record.relative_error for record in report.weights}
        for weight in found.weights:
            assert weight.relative_error == pytest.approx(told[weight.name], rel=0.01)


def test_formats_follow_recipe_and_readers() -> None:
    chosen = recipe(frame=FrameSpec(1.1, 1.5))
    grid = chosen.linear.grid
    both, equal = chosen.formats(grid, products=True, look_ups=False)
    assert isinstance(both, FramedFormat)
    assert isinstance(equal, FramedFormat)
    assert equal.inner == UniformFormat(2, None, ZeroPoint.MIDRISE)
    assert (float(both.redundancy), float(both.output_redundancy or 0)) == (1.1, 1.5)
    assert isinstance(both.inner, CodebookFormat)
    (tied,) = chosen.formats(grid, products=True, look_ups=True)
    assert isinstance(tied, FramedFormat)
    assert tied.output_redundancy is None
    assert isinstance(tied.inner, UniformFormat)
    assert not any(isinstance(format, FramedFormat) for format in chosen.formats(grid, products=False, look_ups=True))
    assert both.coefficients(128, 256) == (192, 288)
