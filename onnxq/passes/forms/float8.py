"""The forms of float8 weights: our ops, and DequantizeLinear of the float8 types of ONNX.

`Float8Form` is Float8MatMul and Float8Gather. `Float8QdqForm` is what GPU and NPU providers read; ONNX Runtime's CPU
provider runs it too, but decodes all of a weight again at every call (`docs/stock_onnxruntime.md`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import ops
from onnxq.formats.float8 import Float8Encoding
from onnxq.passes.forms.base import SharedArray, StoredWeight, constant

OLDEST_QDQ_OPSET = 21
"""First opset whose DequantizeLinear takes blocks; those of earlier ones have float8 from opset 19 on."""


def qdq_refusal(opset: int, *, tables: bool) -> str | None:
    """Why a weight can't be read through DequantizeLinear, or had better not be, or None."""
    if opset < OLDEST_QDQ_OPSET:
        return f"DequantizeLinear of float8 weights needs opset {OLDEST_QDQ_OPSET}: export again with --opset 21"
    if tables:
        return "ONNX Runtime has look-ups of float8 rows from 1.31 on only, and runs the function in all versions"
    return None


@dataclasses.dataclass(frozen=True)
class Float8Form:
    """Float8MatMul and Float8Gather over one set of arrays: codes uint8 [N, K] and scales float16."""

    name: str = "Float8"

    def arrays(self, encoding: Float8Encoding) -> dict[str, np.ndarray]:
        """See `Form.arrays`."""
        return {"codes": encoding.codes, "scales": encoding.scales}

    def shared_arrays(self, encoding: Float8Encoding) -> dict[str, SharedArray]:
        """See `Form.shared_arrays`."""
        return {}

    def attributes(self, encoding: Float8Encoding) -> dict[str, Any]:
        """See `Form.attributes`."""
        n, k = encoding.shape
        return {
            "K": k,
            "N": n,
            "mantissa_bits": encoding.format.kind.mantissa_bits,
            "exponent_bias": encoding.format.kind.bias,
            "group_size": encoding.format.effective_group(k),
            "gain": float(encoding.gain),
            "layout_version": ops.LAYOUT_VERSION,
        }

    def linear(self, tape: ir.tape.Tape, x: ir.Value, weight: StoredWeight, bias: ir.Value | None) -> ir.Value:
        """See `Form.linear`."""
        if bias is None:
            bias = constant(tape, np.zeros(1, np.float32))
        inputs = [x, weight.tensors["codes"], weight.tensors["scales"], bias]
        return tape.op("Float8MatMul", inputs, weight.attributes, domain=ops.DOMAIN)

    def table(self, tape: ir.tape.Tape, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        """See `Form.table`."""
        inputs = [indices, weight.tensors["codes"], weight.tensors["scales"]]
        return tape.op("Float8Gather", inputs, weight.attributes, domain=ops.DOMAIN)

    def functions(self, weight: StoredWeight, *, linear: bool, table: bool) -> tuple[str, ...]:
        """See `Form.functions`."""
        return ("Float8MatMul",) * linear + ("Float8Gather",) * table


@dataclasses.dataclass(frozen=True)
class Float8QdqForm:
    """DequantizeLinear(codes [K, N]) in front of MatMul, without a zero point: float8 has but 0.

    Scales are float32 [N], one number, or [blocks, N] with axis 0. Look-ups have no such form.
    """

    name: str = "DequantizeLinear"

    def arrays(self, encoding: Float8Encoding) -> dict[str, np.ndarray]:
        """See `Form.arrays`."""
        codes, scales = encoding.codes.view(encoding.format.kind.dtype), encoding.effective_scales()
        if encoding.format.one_scale:
            scales = scales.reshape(())
        elif scales.shape[1] == 1:
            scales = scales.reshape(-1)
        return {"codes": np.ascontiguousarray(codes.T), "scales": np.asarray(scales.T, order="C")}

    def shared_arrays(self, encoding: Float8Encoding) -> dict[str, SharedArray]:
        """See `Form.shared_arrays`."""
        return {}

    def attributes(self, encoding: Float8Encoding) -> dict[str, Any]:
        """See `Form.attributes`."""
        _, k = encoding.shape
        if encoding.format.one_scale:
            return {}
        if encoding.format.groups(k) == 1:
            return {"axis": 1}
        return {"axis": 0, "block_size": encoding.format.effective_group(k)}

    def linear(self, tape: ir.tape.Tape, x: ir.Value, weight: StoredWeight, bias: ir.Value | None) -> ir.Value:
        """See `Form.linear`."""
        matrix = tape.op("DequantizeLinear", list(weight.tensors.values()), weight.attributes)
        product = tape.op("MatMul", [x, matrix])
        return product if bias is None else tape.op("Add", [product, bias])

    def table(self, tape: ir.tape.Tape, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        """See `Form.table`."""
        raise NotImplementedError("a table takes Float8Form: a dequantised table would be float32 at run time")

    def functions(self, weight: StoredWeight, *, linear: bool, table: bool) -> tuple[str, ...]:
        """See `Form.functions`."""
        return ()
