"""Inspecting models: bytes from the file, formats of every maker, errors measured against the float model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxq
from onnxq.errors import ModelError
from onnxq.recipe import Recipe, uniform_recipe
from onnxq.report.inspect import Inspection, inspect_model, layer_of
from onnxq.report.records import REPORT_PROPERTY
from onnxq.report.stored import stored_parts
from onnxq.runtime.optimized import read_graph
from tests.graph.models import merged_decoder, save, tied_embedding
from tests.runtime import models

FLOAT32 = 1e-6
"""Two ways to decode one weight in float32, relative to its largest element."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("inspect")
    models.encoder(made / "float.onnx")
    onnxq.quantize(made / "float.onnx", made / "small.onnx", recipe=uniform_recipe(3, 32))
    onnxq.quantize(made / "float.onnx", made / "stock.onnx", recipe=uniform_recipe(4, 32, target="stock"))
    ids = np.arange(64).reshape(4, 16)
    feeds = [{"input_ids": ids, "attention_mask": np.ones_like(ids)}]
    onnxq.quantize(made / "float.onnx", made / "int8.onnx", recipe="int8", calibration=feeds)
    return made


def named(found: Inspection, name: str):
    return next(weight for weight in found.weights if weight.name == name)


def test_a_float_model(folder: Path) -> None:
    found = inspect_model(folder / "float.onnx")
    assert found.weights[0].name == "embed.weight"
    assert found.weight_bits == 32
    assert named(found, "embed.weight").kinds == ("table",)
    assert named(found, "layer.1.up.weight").bytes == 64 * 64 * 4
    assert found.report is None
    assert not found.mismatches
    assert {item.name for item in found.kept} >= {"layer.0.up.bias", "layer.1.down.bias"}


def test_bytes_are_those_of_the_file(folder: Path) -> None:
    found = inspect_model(folder / "small.onnx")
    on_disk = sum(file.stat().st_size for file in folder.glob("small.onnx*"))
    assert found.file_bytes == on_disk
    weight = named(found, "layer.0.up.weight")
    # 3 bits a code, 16 of scale and 8 of zero point per group of 32.
    assert weight.bits_per_weight == 3 + 24 / 32
    assert weight.bytes == 64 * 64 * (3 + 24 / 32) / 8
    assert weight.code_bits == 3
    assert weight.form == "LowBitMatMul"
    assert weight.nodes == ("/layer.0/up/MatMul",)


def test_the_report_it_carries_agrees(folder: Path) -> None:
    found = inspect_model(folder / "small.onnx")
    assert not found.mismatches
    assert found.report is not None
    assert len(found.report.weights) == len(found.weights) == 5
    assert all(weight.relative_error is not None and not weight.measured for weight in found.weights)
    assert Recipe.from_yaml(found.recipe).linear.grid.bits == 3


def test_a_report_that_lies_is_caught(folder: Path, tmp_path: Path) -> None:
    proto = onnx.load(folder / "small.onnx")
    for entry in proto.metadata_props:
        if entry.key == REPORT_PROPERTY:
            told = json.loads(entry.value)
            told["weights"][0]["bytes"] //= 2
            told["weights"][1]["name"] = "gone"
            entry.value = json.dumps(told)
    onnx.save(proto, tmp_path / "lies.onnx")
    found = inspect_model(tmp_path / "lies.onnx")
    assert any("embed.weight" in sentence and "in the report" in sentence for sentence in found.mismatches)
    assert any("'gone'" in sentence for sentence in found.mismatches)


def test_a_report_that_is_no_json_is_said(folder: Path, tmp_path: Path) -> None:
    proto = onnx.load(folder / "small.onnx")
    for entry in proto.metadata_props:
        if entry.key == REPORT_PROPERTY:
            entry.value = "{"
    onnx.save(proto, tmp_path / "broken.onnx")
    found = inspect_model(tmp_path / "broken.onnx")
    assert found.report is None
    assert "can't be read" in found.mismatches[0]
    assert len(found.weights) == 5


@pytest.mark.parametrize("name", ["small.onnx", "stock.onnx", "int8.onnx"])
def test_errors_measured_against_the_float_model_are_those_reported(folder: Path, name: str) -> None:
    reported = inspect_model(folder / name)
    measured = inspect_model(folder / name, reference=folder / "float.onnx")
    assert all(weight.measured for weight in measured.weights)
    for told, found in zip(reported.weights, measured.weights, strict=True):
        assert found.relative_error == pytest.approx(told.relative_error, rel=1e-3)


def test_another_models_reference_is_refused(folder: Path, tmp_path: Path) -> None:
    other = models.float_product(tmp_path / "other.onnx")
    with pytest.raises(ModelError, match="under the same name"):
        inspect_model(folder / "small.onnx", reference=other)


def test_weights_of_other_tools(tmp_path: Path) -> None:
    expected = {
        models.fused: ("int4 blocks of 32", (models.N, models.K), 4 + 32 / 32),
        models.transposed: ("int4 blocks of 32", (models.N, models.K), 4 + 32 / 32),
        models.float8: ("float8e4m3fn per column", (models.N, models.K), 8 + 32 / models.K),
        models.int8_dynamic: ("int8 product", (models.N, models.K), 8.0),
    }
    for build, (label, shape, bits) in expected.items():
        (weight,) = inspect_model(build(tmp_path / f"{build.__name__}.onnx")).weights
        assert (weight.format, weight.shape, weight.bits_per_weight) == (label, shape, bits)


def test_columns_of_integers_are_told_from_tensors(folder: Path) -> None:
    """Zero points of QDQ weights are constants of nodes, scales stand behind a Cast."""
    labels = {part.name: part.label for part in stored_parts(read_graph(folder / "int8.onnx"))}
    assert labels["layer.0.up.weight"] == "uint8 per column"


@pytest.mark.parametrize("build", [models.fused, models.transposed, models.float8])
def test_a_dequantized_weight_decodes_to_what_the_model_computes_with(build, tmp_path: Path) -> None:
    path = build(tmp_path / "m.onnx")
    (part,) = stored_parts(read_graph(path))
    assert part.decode is not None
    decoded = part.decode()
    options = onnxq.session_options(library=False, config={"session.qdq_matmulnbits_accuracy_level": "1"})
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    computed = session.run(None, {"x": np.eye(models.K, dtype=np.float32)})[0].T
    assert np.abs(decoded - computed).max() <= FLOAT32 * np.abs(computed).max()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_matmulnbits_decodes_to_what_it_computes_with(bits: int, tmp_path: Path) -> None:
    path = models.nbits(tmp_path / "m.onnx", bits=bits, level=1)
    (part,) = stored_parts(read_graph(path))
    assert part.decode is not None
    computed = models.stock_session(path).run(None, {"x": np.eye(256, dtype=np.float32)})[0].T
    assert np.abs(part.decode() - computed).max() <= FLOAT32 * np.abs(computed).max()


@pytest.mark.parametrize("target", ["kernel", "stock"])
def test_a_tied_table_is_one_weight_with_both_kinds(target, tmp_path: Path) -> None:
    path = save(tied_embedding(stored_twice=False, rows=128, width=64), tmp_path / "float.onnx")
    onnxq.quantize(path, tmp_path / "small.onnx", recipe=uniform_recipe(4, 32, target=target))
    (weight,) = inspect_model(tmp_path / "small.onnx").weights
    assert set(weight.kinds) == {"table", "linear"}
    assert len(weight.nodes) == 2


def test_weights_shared_by_branches_count_once(tmp_path: Path) -> None:
    path = save(merged_decoder(rows=64, width=64), tmp_path / "float.onnx")
    onnxq.quantize(path, tmp_path / "small.onnx", recipe=uniform_recipe(4, 32))
    found = inspect_model(tmp_path / "small.onnx")
    assert sum(weight.bytes for weight in found.weights) <= found.file_bytes
    assert not found.mismatches
    assert all(len(weight.nodes) > 1 for weight in found.weights)


def test_a_missing_data_file_is_named(folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "small.onnx"
    alone.write_bytes((folder / "small.onnx").read_bytes())
    if not (folder / "small.onnx.data").exists():
        pytest.fail("the fixture has no external data")
    with pytest.raises(ModelError, match=r"small\.onnx\.data"):
        inspect_model(alone)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("encoder.layer.3.attention.query.weight", "encoder.layer.3"),
        ("/model/layers.11/mlp/up", "model.layers.11"),
        ("lm_head.weight", "lm_head"),
        ("weight", "weight"),
    ],
)
def test_layers(name: str, layer: str) -> None:
    assert layer_of(name) == layer
