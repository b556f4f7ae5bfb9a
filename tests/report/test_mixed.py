"""Mixed weights read back from a written model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxq.graph import StreamingWriter
from onnxq.report.inspect import Inspection, inspect_model
from onnxq.report.stored import stored_parts
from onnxq.runtime.doctor import diagnose, has_own_nodes
from onnxq.runtime.optimized import read_graph
from tests.encodings import random_mixed
from tests.passes.test_framed_forms import attention, linear
from tests.passes.test_mixed_forms import BAND, Encode, one_order, random_order, rewrite
from tests.runtime.models import without_functions

N, K = 100, 160
ENCODING = random_mixed(N, K, BAND, seed=0)
"""That of the first weight of a model."""


def write(folder: Path, encode: Encode = random_order, proto: onnx.ModelProto | None = None) -> Path:
    """A written model; what its weights decode to is in float.onnx beside it."""
    model, reference = rewrite(linear(N, K) if proto is None else proto, encode)
    ir.save(reference, folder / "float.onnx")
    with StreamingWriter(folder / "small.onnx") as writer:
        writer.finish(model)
    return folder / "small.onnx"


def inspect(path: Path) -> Inspection:
    return inspect_model(path, reference=path.with_name("float.onnx"))


def test_a_weight_is_read_back(tmp_path: Path) -> None:
    found = inspect(write(tmp_path))
    (weight,) = found.weights
    assert (weight.name, weight.shape, weight.kinds, weight.form) == ("w", (N, K), ("linear",), "MixedBitMatMul")
    assert weight.format == ENCODING.format.label()
    assert weight.code_bits == ENCODING.format.mean_depth(N)
    assert 8 * weight.bytes + 32 == ENCODING.cost_bits()  # the gain is an attribute
    assert weight.measured
    assert weight.relative_error == 0


def test_the_matrix_is_what_the_model_computes_with(tmp_path: Path) -> None:
    (part,) = stored_parts(read_graph(write(tmp_path)))
    assert part.decode is not None
    np.testing.assert_array_equal(part.decode(), ENCODING.dequantize())


def test_shared_arrays_belong_to_no_weight(tmp_path: Path) -> None:
    found = inspect(write(tmp_path, one_order, attention()))
    assert len(found.weights) == 3
    assert all(weight.relative_error == 0 for weight in found.weights)
    assert not any(name.startswith("onnxq.") for weight in found.weights for name in weight.tensors)


def test_a_weight_without_codes_is_one(tmp_path: Path) -> None:
    path = write(tmp_path, lambda weight, seed: random_mixed(weight.n, weight.k, BAND, depths=[0]))
    (weight,) = inspect_model(path).weights
    assert weight.code_bits == 0
    assert weight.bytes == 4 * 5 + 4 * K + 4 * 64  # depths, columns, scales
    (part,) = stored_parts(read_graph(path))
    assert not part.decode().any()


@pytest.mark.parametrize("name", ["onnxq.mixed.tables", "onnxq.mixed.steps"])
def test_other_levels_are_not_compared(name: str, tmp_path: Path) -> None:
    proto = onnx.load(write(tmp_path))
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) // 2, name))
    (part,) = stored_parts(ir.from_proto(proto))
    assert part.decode is None
    assert part.label == ENCODING.format.label()


def test_depths_that_can_not_be_are_not_compared(tmp_path: Path) -> None:
    proto = onnx.load(write(tmp_path))
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "w.depths")
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + np.uint8(1), "w.depths"))
    (part,) = stored_parts(ir.from_proto(proto))
    assert part.decode is None
    assert (part.n, part.k) == (N, K)


def test_doctor_knows_the_body_and_its_absence(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert has_own_nodes(path)
    (finding,) = diagnose(path, library=False).findings
    assert (finding.weight, finding.verdict.value) == ("w", "folded")
    assert "decoded to float32" in finding.what
    assert "library" in finding.cure
    assert finding.memory_bytes >= 4 * N * K
    bare = without_functions(path, tmp_path / "bare.onnx")
    assert "lost its function bodies" in diagnose(bare, library=False).broken
