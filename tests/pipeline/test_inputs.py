"""`quantize` with rounded activations, float8 and 8-bit integers, end to end on a small block of attention and MLP."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxq.calibration import Collected
from onnxq.calibration.clipping import round_with
from onnxq.errors import ModelError, RecipeError
from onnxq.graph import load
from onnxq.passes.attention import attention_products
from onnxq.pipeline import inputs
from onnxq.pipeline.stages import Stages
from onnxq.progress import NullProgress
from onnxq.recipe import ActivationSpec, Float8Spec, GridSpec, LinearPlan, Recipe
from onnxq.report.records import QuantizeReport
from tests.graph import models
from tests.pipeline.test_framequant import DATA, WEIGHTS, WIDTH, block, quantize, recipe

LEVELS = (
    ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
)
SAME_RESULT = 5e-3
"""One file at several optimisation levels: sums in another order turn a few activations to the next code."""
EIGHT_BITS = 0.15
"""Largest relative error of the block's output with 8 bits everywhere."""
SNR_TOLERANCE = 0.01
"""In dB, of sums in float32."""
LOUD, SMALL = 60.0, 1 / 60


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(block(), tmp_path_factory.mktemp("source") / "model.onnx")


def results(path: Path, data: Any, level: Any = LEVELS[-1]) -> list[np.ndarray]:
    """Every output over all of the data."""
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [np.concatenate(parts) for parts in zip(*(session.run(None, feeds) for feeds in data), strict=True)]


def outputs(path: Path, level: Any = LEVELS[-1]) -> np.ndarray:
    """The output of the block."""
    (output,) = results(path, DATA, level)
    return output


def nodes(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


@pytest.mark.parametrize(
    ("name", "target"),
    # Without the library the body of an 8-bit integer weight becomes a product that rounds activations once more.
    [(name, target) for name in ("fp8", "fp8-weight-only") for target in ("kernel", "stock")]
    + [(name, "stock") for name in ("fp8-int8", "int8", "int8-dynamic")],
)
def test_presets_give_one_result_at_every_optimisation_level(
    source: Path, tmp_path: Path, name: str, target: str
) -> None:
    out = tmp_path / "out.onnx"
    report = quantize(source, out, recipe(name, target=target))
    onnx.checker.check_model(str(out), full_check=True)
    assert {record.name.removesuffix(".weight") for record in report.weights} == set(WEIGHTS)
    assert report.check is not None
    assert report.check.relative_errors["y"] < EIGHT_BITS
    plain = outputs(out, LEVELS[0])
    for level in LEVELS[1:]:
        assert np.linalg.norm(outputs(out, level) - plain) < SAME_RESULT * np.linalg.norm(plain)


def test_products_of_one_input_share_its_rounding(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    quantize(source, out, recipe("fp8", target="stock"))
    found = nodes(out)
    assert found["QuantizeLinear"] == 4  # of q, k and v; of o; of up; of down
    assert found["DequantizeLinear"] == 4 + len(WEIGHTS)
    quantize(source, out, recipe("fp8"), force=True)
    assert (nodes(out)["Float8Round"], nodes(out)["Float8MatMul"]) == (4, len(WEIGHTS))


def test_tokens_need_no_data(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = quantize(source, out, recipe("fp8", inputs=ActivationSpec(scale="token")), calibration=None)
    assert nodes(out)["Float8RoundTokens"] == 4
    assert all(record.note == "inputs e4m3fn by token" for record in report.weights)
    assert all(record.snr is None for record in report.weights)
    want = outputs(source)
    assert np.linalg.norm(outputs(out) - want) < EIGHT_BITS * np.linalg.norm(want)


def test_static_scales_need_data(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="give some with --calibration"):
        quantize(source, tmp_path / "out.onnx", recipe("fp8"), calibration=None)
    assert list(tmp_path.iterdir()) == []


def test_an_opset_too_old_is_refused(tmp_path: Path) -> None:
    proto = block()
    proto.opset_import[0].version = 19
    old = models.save(proto, tmp_path / "old.onnx")

    with pytest.raises(ModelError, match="opset 19 is too old"):
        quantize(old, tmp_path / "out.onnx", recipe("fp8", target="stock"), calibration=[DATA[0]])
    assert [path.name for path in tmp_path.iterdir()] == ["old.onnx"]
    quantize(old, tmp_path / "out.onnx", recipe("fp8"))


def test_attention_is_rounded_where_it_is_asked_for(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = quantize(source, out, recipe("fp8", target="stock", inputs=ActivationSpec(attention=True)))
    assert nodes(out)["QuantizeLinear"] == 4 + 4
    assert "4 inputs of attention's products are rounded" in report.notes
    plain = outputs(out, LEVELS[0])
    assert np.linalg.norm(outputs(out) - plain) < SAME_RESULT * np.linalg.norm(plain)


def plans_without_data(path: Path) -> inputs.InputPlans:
    """What is planned for attention alone, by token."""
    chosen = recipe("fp8", inputs=ActivationSpec(scale="token", attention=True))
    return inputs.plan_inputs([], chosen, Stages(load(path), None, None, NullProgress()))


def test_attention_by_token_needs_no_data(tmp_path: Path) -> None:
    source = models.save(onnx.shape_inference.infer_shapes(block()), tmp_path / "shaped.onnx")
    plans = plans_without_data(source)
    assert plans.attention == 4
    assert plans.notes == ("4 inputs of attention's products are rounded",)
    out = tmp_path / "out.onnx"
    chosen = recipe("fp8", inputs=ActivationSpec(scale="token", attention=True))
    quantize(source, out, chosen, calibration=None)
    assert nodes(out)["Float8RoundTokens"] == 4 + 4
    want = outputs(source)
    assert np.linalg.norm(outputs(out) - want) < EIGHT_BITS * np.linalg.norm(want)


def test_attention_that_cannot_be_rounded_is_reported(tmp_path: Path) -> None:
    fused = models.node("MultiHeadAttention", "x x x", "y", "/fused", domain="com.microsoft", num_heads=2)
    plain = models.node("Relu", "x", "y", "/relu")
    sizes = ["b", "s", WIDTH]
    for step, words in ((fused, "fused nodes (1 MultiHeadAttention)"), (plain, "no products of attention")):
        proto = models.model([step], [models.floats("x", sizes)], [models.floats("y", sizes)])
        plans = plans_without_data(models.save(proto, tmp_path / f"{step.op_type}.onnx"))
        assert plans.attention == 0
        (note,) = plans.notes
        assert words in note


def test_attention_that_was_never_run_is_reported(source: Path) -> None:
    stages = Stages(load(source), None, None, NullProgress())
    products = attention_products(stages.loaded.model)
    roundings, notes = inputs._attention(products, ActivationSpec(attention=True), Collected({}, {}), stages, False)
    assert roundings == {}
    assert [note.startswith("calibration saw no values of 4 inputs") for note in notes] == [True]


def loud_model() -> onnx.ModelProto:
    """x -> plain -> y, and the same function with a few loud inputs, whose weights are small: -> loud -> z."""
    weight = models.weight(WIDTH, WIDTH, seed=1) / 12
    scales = np.ones(WIDTH, np.float32)
    scales[:3] = LOUD
    arrays = {"plain": weight, "scales": scales, "loud": weight / scales[:, None]}
    steps = [
        models.node("MatMul", "x plain", "y", "/plain/MatMul"),
        models.node("Mul", "x scales", "scaled", "/scaled"),
        models.node("MatMul", "scaled loud", "z", "/loud/MatMul"),
    ]
    sizes = ["b", WIDTH]
    return models.model(steps, [models.floats("x", sizes)], [models.floats(name, sizes) for name in "yz"], arrays)


GAUSSIAN = [{"x": np.random.default_rng(seed).standard_normal((64, WIDTH)).astype(np.float32)} for seed in range(2)]


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(loud_model(), tmp_path_factory.mktemp("loud") / "model.onnx")


def snr(report: QuantizeReport) -> dict[str, float]:
    return {record.name: record.snr for record in report.weights if record.snr is not None}


def test_each_tensor_takes_the_kind_that_suits_it(loud: Path, tmp_path: Path) -> None:
    report = quantize(loud, tmp_path / "o.onnx", recipe("fp8-int8"), calibration=GAUSSIAN)
    said = {record.name: record.note for record in report.weights}
    assert said["plain"].startswith("inputs uint8 static")
    assert said["loud"].startswith("inputs e4m3fn static")


def test_integers_lose_where_inputs_are_loud_and_float8_does_not(loud: Path, tmp_path: Path) -> None:
    """The paper's finding, on one function written in two ways."""
    integers = snr(quantize(loud, tmp_path / "i.onnx", recipe("int8"), calibration=GAUSSIAN))
    floats = snr(quantize(loud, tmp_path / "f.onnx", recipe("fp8", target="stock"), calibration=GAUSSIAN))
    assert integers["plain"] > floats["plain"] + 3
    assert integers["loud"] < floats["loud"] - 6
    assert floats["loud"] == pytest.approx(floats["plain"], abs=1.5)


def small(plan: LinearPlan, target: Any = "kernel") -> Recipe:
    return Recipe("small", linear=plan, min_elements=64, target=target)


def test_the_ratio_is_that_of_the_products(loud: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = quantize(loud, out, recipe("fp8"), calibration=GAUSSIAN)  # 128 rows: the sample is all of them
    everything = [{"x": np.concatenate([feeds["x"] for feeds in GAUSSIAN])}]
    want, got = results(loud, everything), results(out, everything)
    for name, one, other in zip(("plain", "loud"), want, got, strict=True):
        noise = np.square(other - one, dtype=np.float64).sum()
        expected = 10 * np.log10(np.square(one, dtype=np.float64).sum() / noise)
        assert snr(report)[name] == pytest.approx(expected, abs=SNR_TOLERANCE)


def test_noisy_products_stay_in_float(loud: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    plan = recipe("int8").linear
    report = quantize(loud, out, small(dataclasses.replace(plan, min_snr=25.0), "stock"), calibration=GAUSSIAN)
    assert [record.name for record in report.weights] == ["plain"]
    (kept,) = [record for record in report.kept if record.name == "loud"]
    assert "below min_snr 25" in kept.reason
    stored = {tensor.name for tensor in onnx.load(out, load_external_data=False).graph.initializer}
    assert "loud" in stored
    assert "plain" not in stored


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "int8", "scale": "token"}, "does not go with kind"),
        ({"kind": "e4m3fn", "scale": "dynamic"}, "does not go with kind"),
        ({"kind": "e4m3fn", "clip": "entropy"}, 'for kind "int8"'),
        ({"percentile": 20.0}, "above 50"),
        ({"kind": "fp8"}, "must be one of"),
    ],
)
def test_wishes_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        ActivationSpec(**changes)


def test_a_plan_has_one_domain() -> None:
    with pytest.raises(RecipeError, match="not frame and float8"):
        dataclasses.replace(Recipe.load("framequant").linear, float8=Float8Spec())


@pytest.mark.parametrize("name", ["fp8", "fp8-int8", "fp8-weight-only", "int8", "int8-dynamic"])
def test_recipes_survive_yaml(name: str) -> None:
    chosen = Recipe.load(name)
    assert Recipe.from_yaml(chosen.to_yaml()) == chosen


def test_one_scale_for_a_weight(source: Path, tmp_path: Path) -> None:
    plan = LinearPlan(GridSpec(8, "weight", "integer"), inputs=ActivationSpec("int8"))
    report = quantize(source, tmp_path / "out.onnx", small(plan, "stock"))
    assert all("one scale" in record.format for record in report.weights)
    stored = onnx.load(tmp_path / "out.onnx", load_external_data=False).graph.initializer
    assert all(list(tensor.dims) == [] for tensor in stored if tensor.name.endswith(".weight.scales"))
    assert report.check is not None
    assert report.check.relative_errors["y"] < 2 * EIGHT_BITS


def test_rounding_is_what_the_sample_is_rounded_by(loud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plan_inputs = inputs.plan_inputs

    def note(*arguments: Any) -> Any:
        seen.append(plan_inputs(*arguments))
        return seen[-1]

    monkeypatch.setattr("onnxq.pipeline.write.plan_inputs", note)
    out = tmp_path / "out.onnx"
    quantize(loud, out, recipe("fp8", target="stock"), calibration=GAUSSIAN)
    (plans,) = seen
    found = [inputs.rounding.static for inputs in plans._by_weight.values() if inputs.rounding is not None]
    scales = sorted(scale.scale for scale in found if scale is not None)
    rows = np.concatenate([feeds["x"] for feeds in GAUSSIAN])
    assert scales[0] == pytest.approx(np.abs(rows).max() / 448)
    assert all(np.isfinite(round_with(rows, scale)).all() for scale in found if scale is not None)
