"""Float8 weights read back from a written model, and what the doctor says of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxq.formats.float8 import Float8Format, Float8Kind
from onnxq.graph import StreamingWriter
from onnxq.report.inspect import inspect_model
from onnxq.report.stored import stored_parts
from onnxq.runtime.doctor import diagnose, has_own_nodes
from onnxq.runtime.optimized import read_graph
from tests.encodings import random_float8
from tests.passes.test_float8_forms import FORMATS, rewrite, tied
from tests.passes.test_framed_forms import linear
from tests.runtime.models import without_functions

N, K = 100, 160


def write(folder: Path, format: Float8Format, *, stock: bool = False, proto: onnx.ModelProto | None = None) -> Path:
    """A written model; what its weights decode to is in float.onnx beside it."""
    model, reference, _ = rewrite(linear(N, K) if proto is None else proto, format, stock=stock)
    ir.save(reference, folder / "float.onnx")
    with StreamingWriter(folder / "small.onnx") as writer:
        writer.finish(model)
    return folder / "small.onnx"


@pytest.mark.parametrize("format", [format for format in FORMATS if not format.powers_of_two], ids=Float8Format.label)
def test_a_weight_is_read_back(format: Float8Format, tmp_path: Path) -> None:
    path = write(tmp_path, format)
    (weight,) = inspect_model(path, reference=path.with_name("float.onnx")).weights
    assert (weight.name, weight.shape, weight.kinds, weight.form) == ("w", (N, K), ("linear",), "Float8MatMul")
    assert (weight.format, weight.code_bits) == (format.label(), 8)
    gain_bits = 32
    assert 8 * weight.bytes + gain_bits == format.cost_bits(N, K)
    assert weight.measured
    assert weight.relative_error == 0
    (part,) = stored_parts(read_graph(path))
    np.testing.assert_array_equal(part.decode(), random_float8(format, N, K).dequantize())


@pytest.mark.parametrize("format", FORMATS, ids=Float8Format.label)
def test_a_weight_of_float8_types_is_read_back(format: Float8Format, tmp_path: Path) -> None:
    path = write(tmp_path, format, stock=True)
    (weight,) = inspect_model(path, reference=path.with_name("float.onnx")).weights
    assert (weight.name, weight.shape, weight.kinds, weight.form) == ("w", (N, K), ("linear",), "DequantizeLinear")
    assert weight.format.startswith(f"float8{format.kind.value} ")
    assert weight.code_bits == 8
    assert weight.relative_error < 1e-12  # scales and gain are one float32 number here


def test_a_table_and_a_product_share_one_weight(tmp_path: Path) -> None:
    path = write(tmp_path, Float8Format(), proto=tied())
    (weight,) = inspect_model(path, reference=path.with_name("float.onnx")).weights
    assert (weight.kinds, weight.form) == (("table", "linear"), "Float8Gather + Float8MatMul")
    assert weight.relative_error == 0


def test_a_kind_that_is_not_known_is_not_compared(tmp_path: Path) -> None:
    proto = onnx.load(write(tmp_path, Float8Format()))
    (bias,) = [attribute for attribute in proto.graph.node[0].attribute if attribute.name == "exponent_bias"]
    bias.i = 11
    (part,) = stored_parts(ir.from_proto(proto))
    assert (part.n, part.k, part.bits, part.decode) == (N, K, 8, None)


def test_doctor_knows_the_body_and_its_absence(tmp_path: Path) -> None:
    path = write(tmp_path, Float8Format(Float8Kind.E5M2, 32))
    assert has_own_nodes(path)
    (finding,) = diagnose(path, library=False).findings
    assert (finding.weight, finding.verdict.value) == ("w", "folded")
    assert "decoded to float32" in finding.what
    assert "library" in finding.cure
    assert finding.memory_bytes >= 4 * N * K
    bare = without_functions(path, tmp_path / "bare.onnx")
    assert "lost its function bodies" in diagnose(bare, library=False).broken


def test_a_table_is_not_decoded_at_every_call(tmp_path: Path) -> None:
    findings = diagnose(write(tmp_path, Float8Format(), proto=tied()), library=False).findings
    table = next(finding for finding in findings if finding.op == "Gather")
    assert (table.weight, table.verdict.value, table.what) == ("w", "fast", "rows decoded as they are looked up")
    assert table.memory_bytes <= 80 * 96 + 4 * 80  # codes, and scales that are expanded


def test_doctor_names_the_cure_of_float8_types(tmp_path: Path) -> None:
    (finding,) = diagnose(write(tmp_path, Float8Format(), stock=True), library=False).findings
    assert (finding.weight, finding.verdict.value, finding.op) == ("w", "slow", "DequantizeLinear")
    assert "float8e4m3fn" in finding.what
    assert "--target kernel" in finding.cure
    assert "session.disable_quant_qdq=1" in finding.cure
