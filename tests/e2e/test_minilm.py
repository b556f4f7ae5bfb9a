"""A real sentence-embedding model, from its safetensors to every life of the quantised file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxq
from onnxq.calibration import CalibrationData, open_data, session_inputs
from onnxq.evaluation.similarity import compare_embeddings, embed
from onnxq.export import export
from onnxq.graph import find_weights, load
from tests.e2e.test_web import web
from tools.models import fetch
from tools.packages import FetchError
from tools.web import run

pytestmark = pytest.mark.models
__all__ = ["web"]

pytest.importorskip("optimum.exporters.onnx")

COSINE_8_BITS = 0.998
COSINE_4_BITS = 0.97
SPEARMAN_4_BITS = 0.96
COSINE_2_BITS_TWO_LAYERS = 0.965
"""Two of six layers in a frame at 2 bits, tables at 4."""
SAME_FILE_TWO_RUNTIMES = 0.05
"""Kernel and function body round activations to 8 bits in blocks of their own."""


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the exported model."""
    try:
        source = fetch("minilm")
    except FetchError as error:
        pytest.skip(str(error).splitlines()[-1].strip())
    folder = tmp_path_factory.mktemp("minilm") / "onnx"
    export(source, folder, task="feature-extraction")
    return folder


@pytest.fixture(scope="module")
def text() -> Path:
    try:
        return fetch("reviews")
    except FetchError as error:
        pytest.skip(str(error).splitlines()[-1].strip())


@pytest.fixture(scope="module")
def reference(minilm: Path):
    return onnxq.session(minilm / "model.onnx")


@pytest.fixture(scope="module")
def held_out(minilm: Path, text: Path, reference) -> CalibrationData:
    return open_data(text / "heldout.txt", session_inputs(reference), tokenizer=minilm, max_samples=64)


@pytest.fixture(scope="module")
def four_bits(minilm: Path, text: Path) -> Path:
    """The model at 4 bits with a little calibration."""
    recipe = onnxq.uniform_recipe(4)
    out = minilm.parent / "four.onnx"
    with_less_data = onnxq.Recipe.from_dict(recipe.to_dict() | {"calibration": {"max_samples": 48, "max_length": 64}})
    report = onnxq.quantize(
        minilm / "model.onnx", out, recipe=with_less_data, calibration=text / "calibration.txt", tokenizer=minilm
    )
    assert {record.solver for record in report.weights if "linear" in record.kinds} == {"error-feedback"}
    assert report.bytes < 0.15 * report.source_bytes
    return out


def test_every_weight_of_the_model_is_found(minilm: Path) -> None:
    found = find_weights(load(minilm / "model.onnx").model)
    assert sum("linear" in weight.kinds for weight in found.weights) == 36
    assert sum(weight.kinds == ("table",) for weight in found.weights) == 3
    assert all(skipped.reason for skipped in found.skipped)


def test_four_bits_keep_the_embeddings(four_bits: Path, reference, held_out: CalibrationData, library: Path) -> None:
    expected = embed(reference, held_out)
    for with_library in (True, False):
        got = embed(onnxq.session(four_bits, library=with_library), held_out)
        found = compare_embeddings(expected, got)
        assert found.cosine_mean >= COSINE_4_BITS
        assert found.spearman >= SPEARMAN_4_BITS


def test_eight_bits_for_stock_onnx_runtime(minilm: Path, reference, held_out: CalibrationData) -> None:
    out = minilm.parent / "eight.onnx"
    report = onnxq.quantize(minilm / "model.onnx", out, recipe=onnxq.uniform_recipe(8, target="stock"))
    assert {record.form for record in report.weights if "linear" in record.kinds} == {"DequantizeLinear"}
    found = compare_embeddings(embed(reference, held_out), embed(onnxq.session(out, library=False), held_out))
    assert found.cosine_mean >= COSINE_8_BITS


@pytest.fixture(scope="module")
def framed(minilm: Path, text: Path) -> Path:
    """The first two layers at 2 bits in a frame, with a trellis code; the others stay in float, to save time."""
    recipe = onnxq.Recipe.load("framequant").to_dict()
    recipe["rules"] = [{"match": f"*layer.{index}.*", "keep": True} for index in range(2, 6)]
    recipe["calibration"] |= {"max_samples": 64, "max_length": 64}
    out = minilm.parent / "framed.onnx"
    report = onnxq.quantize(
        minilm / "model.onnx",
        out,
        recipe=onnxq.Recipe.from_dict(recipe),
        calibration=text / "calibration.txt",
        tokenizer=minilm,
    )
    linear = [record for record in report.weights if "linear" in record.kinds]
    assert len(linear) == 12
    assert all(record.form == "CodebookMatMul in a frame" for record in linear)
    assert 8 * sum(r.bytes for r in linear) < 2.05 * sum(r.shape[0] * r.shape[1] for r in linear)
    return out


def test_two_bits_in_a_frame(framed: Path, reference, held_out: CalibrationData, library: Path) -> None:
    nodes = [node.op_type for node in onnx.load(framed, load_external_data=False).graph.node]
    # Query, key and value share a transform: four a layer, not six.
    assert nodes.count("FrameAnalysis") == 8
    assert nodes.count("CodebookMatMul") == 12
    expected = embed(reference, held_out)
    for with_library in (True, False):
        got = embed(onnxq.session(framed, library=with_library), held_out)
        assert compare_embeddings(expected, got).cosine_mean >= COSINE_2_BITS_TWO_LAYERS


def test_the_file_runs_in_onnxruntime_web(four_bits: Path, web: Path) -> None:
    ids = np.array([[101, 7592, 2088, 1010, 2129, 2024, 2017, 102]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    expected = onnxq.session(four_bits, library=False).run(["last_hidden_state"], feeds)[0]
    got = run(web, four_bits, feeds).outputs["last_hidden_state"]
    assert np.linalg.norm(got - expected) <= SAME_FILE_TWO_RUNTIMES * np.linalg.norm(expected)
