"""What stock ONNX Runtime makes of the stock forms: fused, and right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxq.formats.uniform import UniformFormat, ZeroPoint
from onnxq.passes.forms import BlockForm, DequantizeForm, Form, KernelForm, Readers, StoredWeight, choose_form
from onnxq.passes.forms.stock import dequantize_refusal
from tests.encodings import random_encoding, relative_error

FLOAT32_SUMMATION = 2e-6
INT8_ACTIVATIONS = 0.02
WHOLE = [ZeroPoint.INTEGER, ZeroPoint.PER_GROUP_INTEGER]


def run_form(form: Form, encoding, *, linear: bool, table: bool, path: Path, opset: int = 25):
    """Outputs (product, look-up) for fixed inputs, what numpy says, and the optimised graph's operators."""
    n, k = encoding.shape
    tensors = {
        role: ir.Value(
            name=role, const_value=ir.tensor(array, name=role), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape(array.shape),
        )
        for role, array in form.arrays(encoding).items()
    }  # fmt: skip
    weight = StoredWeight("w", form, encoding.shape, form.attributes(encoding), tensors)
    tape = ir.tape.Tape()
    feeds, inputs, outputs, expected = {}, [], [], []
    rng = np.random.default_rng(0)
    decoded = encoding.dequantize()
    if linear:
        inputs.append(ir.val("x", dtype=ir.DataType.FLOAT, shape=("m", k)))
        feeds["x"] = rng.standard_normal((5, k)).astype(np.float32)
        outputs.append(form.linear(tape, inputs[-1], weight, None))
        outputs[-1].shape = ir.Shape(("m", n))
        expected.append(feeds["x"] @ decoded.T)
    if table:
        inputs.append(ir.val("ids", dtype=ir.DataType.INT64, shape=("a",)))
        feeds["ids"] = rng.integers(0, n, 7)
        outputs.append(form.table(tape, inputs[-1], weight))
        outputs[-1].shape = ir.Shape(("a", k))
        expected.append(decoded[feeds["ids"]])
    for output in outputs:
        output.dtype = ir.DataType.FLOAT
    graph = ir.Graph(
        inputs, outputs, nodes=tape.nodes, initializers=list(tensors.values()),
        opset_imports={"": opset, "com.microsoft": 1}, name="form",
    )  # fmt: skip
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path / "optimized.onnx")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    got = ort.InferenceSession(model, options).run(None, feeds)
    optimized = [node.op_type for node in onnx.load(path / "optimized.onnx").graph.node]
    return got, expected, optimized


@pytest.mark.parametrize("zero_point", WHOLE)
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dequantize_form_is_fused(bits: int, group_size: int | None, zero_point: ZeroPoint, tmp_path: Path) -> None:
    for n, k in [(64, 384), (48, 100)]:
        encoding = random_encoding(UniformFormat(bits, group_size, zero_point), n, k)
        (got,), (expected,), operators = run_form(DequantizeForm(), encoding, linear=True, table=False, path=tmp_path)
        assert operators == ["MatMulNBits"]
        assert relative_error(got, expected) <= FLOAT32_SUMMATION


@pytest.mark.parametrize("zero_point", WHOLE)
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_block_form_serves_product_and_lookup(
    bits: int, group_size: int | None, zero_point: ZeroPoint, tmp_path: Path
) -> None:
    encoding = random_encoding(UniformFormat(bits, group_size, zero_point), 50, 384)
    got, expected, operators = run_form(BlockForm(), encoding, linear=True, table=True, path=tmp_path, opset=17)
    assert sorted(operators) == ["GatherBlockQuantized", "MatMulNBits"]
    assert relative_error(got[0], expected[0]) <= INT8_ACTIVATIONS
    np.testing.assert_array_equal(got[1], expected[1])


@pytest.mark.parametrize("readers", [Readers(2, 0, False), Readers(1, 0, True), Readers(1, 1, False)])
def test_what_is_read_twice_or_from_a_branch_is_no_dequantize_form(readers: Readers) -> None:
    encoding = random_encoding(UniformFormat(4, 64, ZeroPoint.INTEGER), 48, 128)
    form, _ = choose_form(encoding, stock=True, opset=25, readers=readers, accuracy_level=4)
    assert form == BlockForm(flat=readers.tables > 0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_block_form_of_products_alone_needs_no_reshape(bits: int, tmp_path: Path) -> None:
    encoding = random_encoding(UniformFormat(bits, 64, ZeroPoint.PER_GROUP_INTEGER), 50, 100)
    (got,), (expected,), operators = run_form(BlockForm(flat=False), encoding, linear=True, table=False, path=tmp_path)
    assert operators == ["MatMulNBits"]
    assert relative_error(got, expected) <= INT8_ACTIVATIONS


@pytest.mark.parametrize("n", [47, 49, 50])
def test_two_bits_avoid_the_shapes_that_onnx_runtime_fuses_wrongly(n: int, tmp_path: Path) -> None:
    encoding = random_encoding(UniformFormat(2, 64, ZeroPoint.INTEGER), n, 128)
    form, _ = choose_form(encoding, stock=True, opset=25, readers=Readers(1, 0, False), accuracy_level=4)
    assert isinstance(form, BlockForm)
    (got,), (expected,), _ = run_form(form, encoding, linear=True, table=False, path=tmp_path)
    assert relative_error(got, expected) <= INT8_ACTIVATIONS
    # When this fails, ONNX Runtime has mended its fusion and the refusal can go.
    (wrong,), _, _ = run_form(DequantizeForm(), encoding, linear=True, table=False, path=tmp_path)
    assert relative_error(wrong, expected) > 0.1
    assert dequantize_refusal(encoding, 25)


@pytest.mark.parametrize(
    ("format", "reason"),
    [
        (UniformFormat(3, 32, ZeroPoint.INTEGER), "2, 4 and 8 bits, not 3"),
        (UniformFormat(2, 32, ZeroPoint.MIDRISE), "whole zero points, or midrise ones and one group a row"),
        (UniformFormat(4, 32, ZeroPoint.PER_GROUP), "whole zero points at 4 bits, not per-group"),
    ],
)
def test_formats_without_a_stock_form_stay_functions_and_say_why(format: UniformFormat, reason: str) -> None:
    encoding = random_encoding(format, 48, 128)
    form, note = choose_form(encoding, stock=True, opset=25, readers=Readers(1, 0, False), accuracy_level=4)
    assert isinstance(form, KernelForm)
    assert note == f"left as a function: stock ONNX Runtime needs {reason}" or reason in note


def test_a_table_whose_rows_are_no_whole_blocks_stays_a_function() -> None:
    encoding = random_encoding(UniformFormat(4, 64, ZeroPoint.INTEGER), 48, 100)
    form, note = choose_form(encoding, stock=True, opset=25, readers=Readers(0, 1, False), accuracy_level=4)
    assert isinstance(form, KernelForm)
    assert "rows of 100 are not whole blocks of 64" in note
