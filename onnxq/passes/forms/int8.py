"""Products of 8-bit weights with 8-bit activations, in the arrangements that stock ONNX Runtime fuses.

    static   QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear       MatMulIntegerToFloat
    dynamic  DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul (-> Add)         DynamicQuantizeMatMul

The static form's own part is the right half; a `Rounding` to uint8 puts the left one in front. Codes are uint8 about
128, as `UniformEncoding` has them. ONNX Runtime's products with int8 weights saturate on x86 processors without VNNI,
where pairs of products are added in 16 bits; those with uint8 weights are exact everywhere, and up to a third slower
(docs/stock_onnxruntime.md).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq.formats.uniform import UniformEncoding, ZeroPoint
from onnxq.passes.forms.base import SharedArray, StoredWeight, constant
from onnxq.passes.forms.framed import TRANSFORM_PROPERTY

_ZERO = 128


def int8_refusal(encoding: UniformEncoding) -> str | None:
    """Why an encoding has no form for 8-bit activations, or None."""
    format = encoding.format
    if format.bits != 8:
        return f"products with 8-bit activations have 8-bit weights, not {format.bits}-bit"
    if format.groups(encoding.shape[1]) > 1:
        return "products with 8-bit activations have one scale a column"
    if format.zero_point is not ZeroPoint.INTEGER:
        return f"products with 8-bit activations have zero at level 128, not {format.zero_point.value}"
    return None


@dataclasses.dataclass(frozen=True)
class _Int8Form:
    """What both forms store.

    Attributes:
        signed: store int8 codes about zero. Faster, exact on processors with VNNI and on ARM, and the only one that
            some other providers take.
    """

    signed: bool = False

    def arrays(self, encoding: UniformEncoding) -> dict[str, np.ndarray]:
        """See `Form.arrays`; one scale where all columns have the same."""
        refusal = int8_refusal(encoding)
        if refusal is not None:
            raise ValueError(refusal)
        scales = encoding.effective_scales()[:, 0]
        half = scales.astype(np.float16)
        if np.array_equal(half.astype(np.float32), scales):
            scales = half
        if (scales == scales[0]).all():
            scales = np.array(scales[0])
        codes = np.ascontiguousarray(encoding.codes.T)
        if self.signed:
            codes = (codes.astype(np.int16) - _ZERO).astype(np.int8)
        return {"codes": codes, "scales": scales}

    def shared_arrays(self, encoding: UniformEncoding) -> dict[str, SharedArray]:
        """See `Form.shared_arrays`."""
        return {}

    def attributes(self, encoding: UniformEncoding) -> dict[str, Any]:
        """See `Form.attributes`: the shape of the scales."""
        return {"scales": self.arrays(encoding)["scales"].shape}

    def table(self, tape: ir.tape.Tape, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        """See `Form.table`."""
        raise NotImplementedError("a table takes the block form: a dequantised table would be float32 at run time")

    def functions(self, weight: StoredWeight, *, linear: bool, table: bool) -> tuple[str, ...]:
        """See `Form.functions`."""
        return ()

    def _scales(self, tape: ir.tape.Tape, weight: StoredWeight) -> ir.Value:
        scales = weight.tensors["scales"]
        if scales.dtype == ir.DataType.FLOAT:
            return scales
        return tape.op("Cast", [scales], {"to": int(ir.DataType.FLOAT)})


@dataclasses.dataclass(frozen=True)
class Int8StaticForm(_Int8Form):
    """DequantizeLinear(codes [K, N], scales [N] or one) straight into MatMul."""

    @property
    def name(self) -> str:
        """See `Form.name`."""
        return "DequantizeLinear, 8-bit activations"

    def linear(self, tape: ir.tape.Tape, x: ir.Value, weight: StoredWeight, bias: ir.Value | None) -> ir.Value:
        """See `Form.linear`."""
        shape: tuple[int, ...] = weight.attributes["scales"]
        inputs = [weight.tensors["codes"], self._scales(tape, weight)]
        if not self.signed:
            inputs.append(constant(tape, np.full(shape, _ZERO, np.uint8)))
        product = tape.op("MatMul", [x, tape.op("DequantizeLinear", inputs, {"axis": 1} if shape else {})])
        if bias is None:
            return product
        # ONNX Runtime makes MatMul and Add of a matrix a Gemm, which then computes in float with weights that it
        # dequantises at every call. A Sum it leaves alone.
        matrix = x.shape is None or len(x.shape) == 2
        return tape.op("Sum" if matrix else "Add", [product, bias])


@dataclasses.dataclass(frozen=True)
class Int8DynamicForm(_Int8Form):
    """MatMulInteger with activations rounded to uint8 by the range that each call has."""

    @property
    def name(self) -> str:
        """See `Form.name`."""
        return "MatMulInteger"

    def linear(self, tape: ir.tape.Tape, x: ir.Value, weight: StoredWeight, bias: ir.Value | None) -> ir.Value:
        """See `Form.linear`."""
        codes, step, zero = tape.op_multi_out("DynamicQuantizeLinear", [x], num_outputs=3)
        tape.nodes[-1].metadata_props[TRANSFORM_PROPERTY] = "rounding"
        inputs = [codes, weight.tensors["codes"], zero]
        if not self.signed:
            inputs.append(constant(tape, np.array(_ZERO, np.uint8)))
        sums = tape.op("Cast", [tape.op("MatMulInteger", inputs)], {"to": int(ir.DataType.FLOAT)})
        # The scales are multiplied first: the fusion knows this order only.
        product = tape.op("Mul", [sums, tape.op("Mul", [step, self._scales(tape, weight)])])
        return product if bias is None else tape.op("Add", [product, bias])
