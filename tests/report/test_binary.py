"""Binary codes read back from a written model, and what the doctor says of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxq.formats.binary import BinaryEncoding
from onnxq.graph import StreamingWriter
from onnxq.graph.weights import Weight
from onnxq.passes.forms.planes import PLANES_PROPERTY
from onnxq.report.inspect import inspect_model
from onnxq.report.stored import stored_parts
from onnxq.runtime.doctor import diagnose
from onnxq.runtime.optimized import read_graph
from tests.encodings import random_binary
from tests.passes.test_binary_forms import by_row, rewrite, tied
from tests.passes.test_framed_forms import linear

N, K = 100, 160


def plain(weight: Weight, seed: int) -> BinaryEncoding:
    """Two planes everywhere, whole rows."""
    return random_binary([2] * weight.n, weight.k, seed=seed)


def write(folder: Path, proto: onnx.ModelProto, encode=plain, *, stock: bool = False) -> Path:
    """A written model; what its weights decode to is in float.onnx beside it."""
    model, reference = rewrite(proto, encode, stock=stock)
    ir.save(reference, folder / "float.onnx")
    with StreamingWriter(folder / "small.onnx") as writer:
        writer.finish(model)
    return folder / "small.onnx"


@pytest.mark.parametrize("encode", [plain, by_row])
def test_a_weight_is_read_back(encode, tmp_path: Path) -> None:
    path = write(tmp_path, linear(N, K), encode)
    (weight,) = inspect_model(path, reference=path.with_name("float.onnx")).weights
    assert (weight.name, weight.shape, weight.kinds, weight.form) == ("w", (N, K), ("linear",), "BinaryCodeMatMul")
    assert weight.measured
    assert weight.relative_error == 0
    (part,) = stored_parts(read_graph(path))
    assert part.label.startswith("binary 2-bit" if encode is plain else "binary 2.")
    assert weight.code_bits == 2 if encode is plain else 2 < weight.code_bits < 3
    assert part.decode().shape == (N, K)


def test_a_table_and_a_product_share_one_weight(tmp_path: Path) -> None:
    path = write(tmp_path, tied())
    (weight,) = inspect_model(path, reference=path.with_name("float.onnx")).weights
    assert (weight.kinds, weight.form) == (("table", "linear"), "MixedBitGather + BinaryCodeMatMul")
    assert weight.relative_error == 0


def test_planes_that_no_row_can_have_are_not_compared(tmp_path: Path) -> None:
    proto = onnx.load(write(tmp_path, linear(N, K)))
    (rows,) = [attribute for attribute in proto.graph.node[0].attribute if attribute.name == "plane_rows"]
    rows.ints[:] = [50, 100]
    (part,) = stored_parts(ir.from_proto(proto))
    assert (part.n, part.k, part.bits, part.decode) == (N, K, 2, None)


def test_the_doctor_knows_the_body(tmp_path: Path) -> None:
    (finding,) = diagnose(write(tmp_path, linear(N, K)), library=False).findings
    assert (finding.weight, finding.verdict.value) == ("w", "folded")
    assert np.isclose(finding.memory_bytes, 4 * N * K, rtol=0.1)


@pytest.mark.parametrize("encode", [plain, by_row])
def test_stock_ops_are_read_back(encode, tmp_path: Path) -> None:
    path = write(tmp_path, tied(150, 64), encode, stock=True)
    inspected = inspect_model(path, reference=path.with_name("float.onnx"))
    (weight,) = inspected.weights
    assert (weight.name, weight.shape, weight.kinds) == ("e", (150, 64), ("table", "linear"))
    assert set(weight.form.split(" + ")) == {"Gather", "MatMulNBits"}
    assert weight.relative_error == 0
    assert not inspected.kept
    assert weight.code_bits == 2 if encode is plain else 2 < weight.code_bits < 3


@pytest.mark.parametrize("wrong", ['"planes": [9, 3]', '"tensors": {"signs": "none"}', "{"])
def test_a_layout_that_does_not_fit_is_not_ours(wrong: str, tmp_path: Path) -> None:
    proto = onnx.load(write(tmp_path, linear(N, K), stock=True))
    (node,) = (node for node in proto.graph.node if node.op_type == "MatMulNBits")
    (about,) = (entry for entry in node.metadata_props if entry.key == PLANES_PROPERTY)
    about.value = wrong if wrong == "{" else json.dumps({**json.loads(about.value), **json.loads("{" + wrong + "}")})
    for part in stored_parts(ir.from_proto(proto)):
        assert not part.label.startswith("binary")


def test_the_doctor_finds_stock_products_fast(tmp_path: Path) -> None:
    found = diagnose(write(tmp_path, linear(N, K), by_row, stock=True), library=False).findings
    assert {(finding.weight, finding.verdict.value) for finding in found} == {("w", "fast")}
