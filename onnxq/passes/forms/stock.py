"""Forms that stock ONNX Runtime runs fast by itself.

`DequantizeForm` is standard ONNX: a blocked DequantizeLinear on [K, N] with axis 0 straight into MatMul, the one
arrangement that ONNX Runtime fuses, and that GPU and NPU providers read. `BlockForm` is ONNX Runtime's own pair
MatMulNBits and GatherBlockQuantized over one initializer: for tables, for weights tied between a table and a product
(a DequantizeLinear with two readers is not fused), and for 2 bits below opset 25.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxq.formats.packing import ceil_div
from onnxq.formats.uniform import UniformEncoding, UniformFormat, ZeroPoint
from onnxq.passes.forms.base import SharedArray, StoredWeight, constant

_UNSIGNED = {2: ml_dtypes.uint2, 4: ml_dtypes.uint4, 8: np.uint8}
_SIGNED = {2: ml_dtypes.int2, 4: ml_dtypes.int4, 8: np.int8}
OLDEST_OPSET = {2: 25, 4: 21, 8: 21}
"""First opset whose DequantizeLinear takes blocks of the width."""
_FAST_BLOCKS = (128, 64, 32)
_SCALE_BITS = 16


def stock_refusal(encoding: UniformEncoding) -> str | None:
    """Why an encoding has no stock form, or None."""
    bits = encoding.format.bits
    if bits not in _UNSIGNED:
        return f"stock ONNX Runtime has 2, 4 and 8 bits, not {bits}"
    zero_point = encoding.format.zero_point
    if zero_point is ZeroPoint.MIDRISE and encoding.format.groups(encoding.shape[1]) > 1:
        return "stock ONNX Runtime needs whole zero points, or midrise ones and one group a row"
    if zero_point is ZeroPoint.PER_GROUP and bits != 8:
        return f"stock ONNX Runtime needs whole zero points at {bits} bits, not {zero_point.value}"
    return None


def dequantize_refusal(encoding: UniformEncoding, opset: int) -> str | None:
    """Why an encoding can't be a DequantizeLinear that ONNX Runtime fuses rightly, or None."""
    bits = encoding.format.bits
    if opset < OLDEST_OPSET[bits]:
        return f"DequantizeLinear takes {bits}-bit blocks from opset {OLDEST_OPSET[bits]} on"
    if encoding.format.zero_point is ZeroPoint.MIDRISE:
        return "DequantizeLinear has whole zero points"
    if bits == 2 and encoding.shape[0] % 4:
        # Seen with ONNX Runtime 1.32: the fusion reads four codes to a byte along N as if rows began whole bytes.
        return "ONNX Runtime fuses 2-bit weights wrongly when N is no multiple of 4"
    return None


def block_size(encoding: UniformEncoding) -> int:
    """The widest block that ONNX Runtime has a fast kernel for and that a group is made of."""
    return _block_size(encoding.format, encoding.shape[1])


def _block_size(format: UniformFormat, k: int) -> int:
    group = format.effective_group(k)
    return next(block for block in _FAST_BLOCKS if group % block == 0)


def stock_cost_bits(format: UniformFormat, n: int, k: int) -> int:
    """Bits on disk of a weight [N, K] in the larger of its stock forms: every block has a scale and a zero point."""
    block = _block_size(format, k)
    blocks = ceil_div(k, block)
    sides = blocks * _SCALE_BITS + 8 * ceil_div(blocks * format.bits, 8)
    half_step = 32 if format.zero_point is ZeroPoint.MIDRISE else 0
    return n * (blocks * block * format.bits + sides + half_step)


def block_side_data(encoding: UniformEncoding) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales, float16 or float32 [N, blocks], and whole zero points, uint8 [N, blocks] or None when shared.

    Scales are float16 where the gain can be folded in without loss.
    """
    _, k = encoding.shape
    block = block_size(encoding)
    repeat = encoding.format.effective_group(k) // block
    blocks = ceil_div(k, block)
    scales = np.repeat(encoding.effective_scales(), repeat, axis=1)[:, :blocks]
    half = scales.astype(np.float16)
    if np.array_equal(half.astype(np.float32), scales):
        scales = half
    if encoding.format.zero_point.shared:
        return scales, None
    zeros = encoding.zero_points >> (8 - encoding.format.bits)
    return scales, np.repeat(zeros, repeat, axis=1)[:, :blocks]


def _float_scales(tape: ir.tape.Tape, scales: ir.Value) -> ir.Value:
    if scales.dtype == ir.DataType.FLOAT:
        return scales
    return tape.op("Cast", [scales], {"to": int(ir.DataType.FLOAT)})


def _pack_fields(values: np.ndarray, bits: int) -> np.ndarray:
    """Packs values uint8 [N, C] low-first into bytes [N, ceil(C * bits / 8)]."""
    fields = 8 // bits
    n, columns = values.shape
    padded = np.zeros((n, ceil_div(columns, fields) * fields), np.uint8)
    padded[:, :columns] = values
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed: np.ndarray = np.bitwise_or.reduce(padded.reshape(n, -1, fields) << shifts, axis=2)
    return packed


@dataclasses.dataclass(frozen=True)
class DequantizeForm:
    """DequantizeLinear(codes [K, N], scales [blocks, N], axis 0) straight into MatMul."""

    name: str = "DequantizeLinear"

    def arrays(self, encoding: UniformEncoding) -> dict[str, np.ndarray]:
        """See `Form.arrays`."""
        bits = encoding.format.bits
        scales, zeros = block_side_data(encoding)
        arrays = {"scales": np.ascontiguousarray(scales.T)}
        if zeros is None:
            centred = encoding.codes.astype(np.int16) - (1 << (bits - 1))
            return {"codes": np.ascontiguousarray(centred.T).astype(_SIGNED[bits]), **arrays}
        dtype = _UNSIGNED[bits]
        codes = np.ascontiguousarray(encoding.codes.T).astype(dtype)
        return {"codes": codes, **arrays, "zero_points": np.ascontiguousarray(zeros.T).astype(dtype)}

    def shared_arrays(self, encoding: UniformEncoding) -> dict[str, SharedArray]:
        """See `Form.shared_arrays`."""
        return {}

    def attributes(self, encoding: UniformEncoding) -> dict[str, Any]:
        """See `Form.attributes`."""
        return {"axis": 0, "block_size": block_size(encoding)}

    def linear(self, tape: ir.tape.Tape, x: ir.Value, weight: StoredWeight, bias: ir.Value | None) -> ir.Value:
        """See `Form.linear`."""
        tensors = dict(weight.tensors)
        tensors["scales"] = _float_scales(tape, tensors["scales"])
        matrix = tape.op("DequantizeLinear", list(tensors.values()), weight.attributes)
        product = tape.op("MatMul", [x, matrix])
        return product if bias is None else tape.op("Add", [product, bias])

    def table(self, tape: ir.tape.Tape, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        """See `Form.table`."""
        raise NotImplementedError("a table takes the block form: a dequantised table would be float32 at run time")

    def functions(self, weight: StoredWeight, *, linear: bool, table: bool) -> tuple[str, ...]:
        """See `Form.functions`."""
        return ()


@dataclasses.dataclass(frozen=True)
class BlockForm:
    """MatMulNBits and GatherBlockQuantized of the domain com.microsoft over one initializer.

    Attributes:
        flat: store codes as [N, K * bits / 8] for look-ups; products then reshape them, and ONNX Runtime holds both
            shapes in memory. Otherwise they are stored as products want them, [N, blocks, block * bits / 8].
        accuracy_level: of MatMulNBits; 4 computes with int8 activations, the only fast one at 2 and 8 bits.
    """

    flat: bool = True
    accuracy_level: int = 4

    @property
    def name(self) -> str:
        """See `Form.name`."""
        return "GatherBlockQuantized, MatMulNBits" if self.flat else "MatMulNBits"

    def arrays(self, encoding: UniformEncoding) -> dict[str, np.ndarray]:
        """See `Form.arrays`."""
        n, k = encoding.shape
        bits = encoding.format.bits
        block = block_size(encoding)
        scales, zeros = block_side_data(encoding)
        codes = np.zeros((n, ceil_div(k, block) * block), np.uint8)
        codes[:, :k] = encoding.codes
        if zeros is None:
            zeros = np.full(scales.shape, 1 << (bits - 1), np.uint8)
        packed = _pack_fields(codes, bits)
        half = {}
        if encoding.format.zero_point is ZeroPoint.MIDRISE:
            # scale * (code - 1.5) is scale * (code - 2) and half a step: that times the sum of all inputs.
            half["half_steps"] = encoding.effective_scales()[:, 0] / 2
        return {
            "codes": packed if self.flat else packed.reshape(n, -1, block * bits // 8),
            "scales": np.ascontiguousarray(scales),
            "zero_points": _pack_fields(zeros, bits),
            **half,
        }

    def shared_arrays(self, encoding: UniformEncoding) -> dict[str, SharedArray]:
        """See `Form.shared_arrays`."""
        return {}

    def attributes(self, encoding: UniformEncoding) -> dict[str, Any]:
        """See `Form.attributes`."""
        return {"bits": encoding.format.bits, "block_size": block_size(encoding)}

    def linear(self, tape: ir.tape.Tape, x: ir.Value, weight: StoredWeight, bias: ir.Value | None) -> ir.Value:
        """See `Form.linear`."""
        n, k = weight.shape
        codes = weight.tensors["codes"]
        if self.flat:
            bits, block = weight.attributes["bits"], weight.attributes["block_size"]
            shape = constant(tape, np.array([n, ceil_div(k, block), block * bits // 8], np.int64))
            codes = tape.op("Reshape", [codes, shape])
        scales = _float_scales(tape, weight.tensors["scales"])
        attributes = {**weight.attributes, "K": k, "N": n, "accuracy_level": self.accuracy_level}
        inputs = [x, codes, scales, weight.tensors["zero_points"]]
        product = tape.op("MatMulNBits", inputs, attributes, domain="com.microsoft")
        if "half_steps" in weight.tensors:
            total = tape.op("ReduceSum", [x, constant(tape, np.array([-1], np.int64))], {"keepdims": 1})
            product = tape.op("Add", [product, tape.op("Mul", [total, weight.tensors["half_steps"]])])
        return product if bias is None else tape.op("Add", [product, bias])

    def table(self, tape: ir.tape.Tape, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        """See `Form.table`."""
        scales = _float_scales(tape, weight.tensors["scales"])
        return tape.op(
            "GatherBlockQuantized",
            [weight.tensors["codes"], indices, scales, weight.tensors["zero_points"]],
            {**weight.attributes, "gather_axis": 0, "quantize_axis": 1},
            domain="com.microsoft",
        )

    def functions(self, weight: StoredWeight, *, linear: bool, table: bool) -> tuple[str, ...]:
        """See `Form.functions`."""
        return ()
