"""Grouping into weights, names, and the account of every constant."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxq.graph import SiteReport, find_weights, load
from onnxq.graph.naming import is_telling, make_unique, node_path
from onnxq.graph.ties import HASH_CHUNK
from tests.graph import models
from tests.graph.models import floats, integers, node, weight


def _report(proto: onnx.ModelProto) -> SiteReport:
    return find_weights(models.as_ir(proto))


def _two_matmuls(first: np.ndarray, second: np.ndarray, chain: onnx.NodeProto | None = None) -> onnx.ModelProto:
    nodes = [node("MatMul", "x onnx::A_1", "h", "/a/MatMul"), node("MatMul", "h w", "y", "/b/MatMul")]
    initializers = {"onnx::A_1": first}
    if chain is None:
        nodes[1].input[1] = "onnx::B_2"
        initializers["onnx::B_2"] = second
    else:
        nodes.insert(0, chain)
    return models.model(nodes, [floats("x", [2, first.shape[0]])], [floats("y", [2, second.shape[1]])], initializers)


def test_every_constant_is_accounted_for() -> None:
    report = _report(models.mlp())
    assert [(w.name, w.n, w.k, w.bytes) for w in report.weights] == [
        ("layers.0.fc1", 16, 8, 512),
        ("layers.0.fc2.weight", 4, 16, 256),
    ]
    assert [(s.name, s.reason) for s in report.skipped] == [
        ("layers.0.fc1.bias", "rank 1: bias or norm parameter"),
        ("layers.0.fc2.bias", "bias of Gemm '/layers.0/fc2/Gemm'"),
    ]
    assert report.weight_bytes == 768
    assert report.notes == []


def test_matrix_is_the_callers_own_float32_copy() -> None:
    found = _report(models.mlp()).weights[0]
    first = found.matrix()
    np.testing.assert_array_equal(first, weight(8, 16, seed=1).T)
    assert first.dtype == np.float32
    assert first.flags.c_contiguous
    first[:] = 0
    np.testing.assert_array_equal(found.matrix(), weight(8, 16, seed=1).T)
    np.testing.assert_array_equal(found.rows(3, 5), weight(8, 16, seed=1).T[3:5])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("external", [False, True])
def test_other_float_types(tmp_path: Path, dtype: type, external: bool) -> None:
    array: np.ndarray = weight(6, 4).astype(dtype)
    code = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    x, y = (onnx.helper.make_tensor_value_info(name, code, [2, d]) for name, d in (("x", 6), ("y", 4)))
    proto = models.model([node("MatMul", "x w", "y", "fc")], [x], [y], {"w": array})
    report = find_weights(load(models.save(proto, tmp_path / "m.onnx", external)).model)
    (found,) = report.weights
    assert found.dtype == ir.DataType(code)
    assert found.bytes == array.nbytes
    np.testing.assert_array_equal(found.matrix(), array.T.astype(np.float32))
    assert any("stored in double" in note for note in report.notes) == (dtype is np.float64)


@pytest.mark.parametrize("stored_twice", [True, False])
def test_tied_embedding_is_one_weight(stored_twice: bool) -> None:
    report = _report(models.tied_embedding(stored_twice))
    (found,) = report.weights
    assert (found.name, found.kinds, found.n, found.k) == ("embed.weight", ("table", "linear"), 20, 8)
    assert found.roots[0].name == "embed.weight"
    assert len(found.roots) == 1 + stored_twice
    assert found.bytes == 20 * 8 * 4 * len(found.roots)
    np.testing.assert_array_equal(found.matrix(), weight(20, 8, seed=5))
    stored_note = [note for note in report.notes if "is stored 2 times (embed.weight, onnx::MatMul_31)" in note]
    assert len(stored_note) == stored_twice


def test_the_tables_copy_comes_first_even_when_the_head_runs_first() -> None:
    table = weight(20, 8)
    proto = models.model(
        [
            node("MatMul", "x onnx::H_1", "l", "/head/MatMul"),
            node("Gather", "embed ids", "e", "/embed/Gather"),
        ],
        [floats("x", [2, 8]), integers("ids", [3])],
        [floats("l", [2, 20]), floats("e", [3, 8])],
        {"onnx::H_1": np.ascontiguousarray(table.T), "embed": table},
    )
    (found,) = _report(proto).weights
    assert [root.name for root in found.roots] == ["embed", "onnx::H_1"]
    assert [site.kind for site in found.sites] == ["linear", "table"]


def test_merged_decoder_is_quantised_once() -> None:
    report = _report(models.merged_decoder())
    assert [(w.name, len(w.sites), w.kinds) for w in report.weights] == [
        ("embed.weight", 4, ("table", "linear")),
        ("decoder.q_proj", 2, ("linear",)),
    ]
    assert report.skipped == []


def test_equal_content_is_tied_only_in_the_same_orientation() -> None:
    square = weight(8, 8)
    assert len(_report(_two_matmuls(square, square.copy())).weights) == 1
    assert len(_report(_two_matmuls(square, np.ascontiguousarray(square.T))).weights) == 2


def test_one_element_apart_is_not_tied() -> None:
    first = weight(64, 64)
    second = first.copy()
    second[17, 41] += 1e-3
    assert len(_report(_two_matmuls(first, second)).weights) == 2


def test_equal_content_in_another_type_is_not_tied() -> None:
    half = weight(8, 8, dtype=np.float16)
    proto = models.model(
        [
            node("Cast", "h", "hf", to=1),
            node("MatMul", "x hf", "a", "/a/MatMul"),
            node("MatMul", "a f", "y", "/b/MatMul"),
        ],
        [floats("x", [2, 8])],
        [floats("y", [2, 8])],
        {"h": half, "f": half.astype(np.float32)},
    )
    assert len(_report(proto).weights) == 2


def test_both_orientations_of_one_matrix_are_two_weights() -> None:
    report = _report(_two_matmuls(weight(8, 8), weight(8, 8), node("Transpose", "onnx::A_1", "w", "/b/Transpose")))
    first, second = report.weights
    assert (first.name, second.name) == ("a", "b")
    np.testing.assert_array_equal(first.matrix(), second.matrix().T)
    assert ["needed in 2 arrangements (a, b)" in note for note in report.notes] == [True]
    assert report.weight_bytes == 8 * 8 * 4  # stored once


def test_a_table_used_the_other_way_round_is_two_weights() -> None:
    proto = models.model(
        [node("Gather", "table ids", "e", "/embed/Gather"), node("MatMul", "p table", "y", "/mix/MatMul")],
        [integers("ids", [3]), floats("p", [2, 20])],
        [floats("e", [3, 8]), floats("y", [2, 8])],
        {"table": weight(20, 8)},
    )
    report = _report(proto)
    assert [(w.name, w.n, w.k) for w in report.weights] == [("table", 20, 8), ("table#2", 8, 20)]
    np.testing.assert_array_equal(report.weights[1].matrix(), weight(20, 8).T)


def test_other_uses_keep_the_float_copy() -> None:
    proto = models.mlp()
    proto.graph.node.append(node("ReduceMax", "layers.0.fc2.weight", "peak", "/peak", keepdims=0))
    proto.graph.output.append(floats("peak", []))
    proto.graph.output.append(floats("onnx::MatMul_7", [8, 16]))
    report = _report(proto)
    assert [w.other_uses for w in report.weights] == [("graph output",), ("used by ReduceMax '/peak'",)]
    assert [("keeps its float copy" in note) for note in report.notes] == [True, True]


def test_batched_constant() -> None:
    proto = models.model(
        [node("MatMul", "x experts", "y", "fc")], [floats("x", [3, 2, 6])], [floats("y", [3, 2, 4])],
        {"experts": weight(3, 6, 4)},
    )  # fmt: skip
    report = _report(proto)
    (found,) = report.weights
    assert (found.batch, found.n, found.k, found.shape) == (3, 4, 6, (3, 6, 4))
    np.testing.assert_array_equal(found.matrix(), weight(3, 6, 4).transpose(0, 2, 1).reshape(12, 6))
    assert report.notes == ["'experts' is a stack of 3 matrices [4, 6]."]


def test_report_is_plain_data() -> None:
    entry = json.loads(json.dumps(_report(models.tied_embedding(stored_twice=False)).to_dict()))
    assert entry["skipped"] == []
    assert entry["weights"][0]["sites"][1] == {
        "name": "/lm_head/MatMul",
        "op": "MatMul",
        "kind": "linear",
        "side": "right",
        "scope": "",
        "initializer": "embed.weight",
        "chain": ["Transpose"],
        "dtype": "FLOAT",
    }


def test_looking_for_ties_needs_little_memory(tmp_path: Path) -> None:
    table = weight(40_000, 256)  # 41 MB
    proto = models.model(
        [node("Gather", "e ids", "h", "/embed/Gather"), node("MatMul", "h onnx::M_1", "y", "/head/MatMul")],
        [integers("ids", [3])],
        [floats("y", [3, 40_000])],
        {"e": table, "onnx::M_1": np.ascontiguousarray(table.T)},
    )
    model = load(models.save(proto, tmp_path / "m.onnx", external=True)).model
    del proto, table
    tracemalloc.start()
    report = find_weights(model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(report.weights) == 1
    assert peak < 1.5 * HASH_CHUNK


@pytest.mark.parametrize(
    ("name", "telling"),
    [
        ("model.layers.0.fc1.weight", True),
        ("W_q", True),
        ("embeddings", True),
        ("fc1", True),
        ("onnx::MatMul_713", False),
        ("onnx::MatMul_713_merged_0", False),
        ("model.embed.weight_merged_0", True),
        ("val_12", False),
        ("transpose_3", False),
        ("1204", False),
        ("/layers.0/Constant_3_output_0", False),
        ("Constant_17", False),
    ],
)
def test_telling_initializer_names(name: str, telling: bool) -> None:
    assert is_telling(name) == telling


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("/layers.0/self_attn/q_proj/MatMul", "layers.0.self_attn.q_proj"),
        ("/layers.0/attn/MatMul_3", "layers.0.attn"),
        ("/fc/Gemm", "fc"),
        ("node_MatMul_34", ""),
        ("MatMul_34", ""),
        ("node_linear_1", ""),
        ("", ""),
    ],
)
def test_node_paths(name: str, path: str) -> None:
    assert node_path(ir.Node("", "MatMul", [], name=name)) == path


def test_node_path_from_the_exporters_metadata() -> None:
    made = ir.Node("", "MatMul", [], name="node_linear_1")
    made.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'model', 'model.head', 'linear_1']"
    assert node_path(made) == "model.head"


def test_unique_names() -> None:
    assert make_unique(["a", "a", "b", "a#2", "a"]) == ["a", "a#3", "b", "a#2", "a#4"]
