"""Binary codes read back from a written model, and what the doctor says of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxq.formats.binary import BinaryEncoding
from onnxq.graph import StreamingWriter
from onnxq.graph.weights import Weight
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


def write(folder: Path, proto: onnx.ModelProto, encode=plain) -> Path:
    """A written model; what its weights decode to is in float.onnx beside it."""
    model, reference = rewrite(proto, encode)
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
