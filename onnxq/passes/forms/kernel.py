"""The custom-op form: LowBitMatMul and LowBitGather over one set of packed arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import ops
from onnxq.formats.codebook import CodebookEncoding
from onnxq.formats.uniform import UniformEncoding
from onnxq.passes.forms.base import SharedArray, StoredWeight, constant

FLOAT_ACTIVATIONS = 1
INT8_ACTIVATIONS = 4


@dataclasses.dataclass(frozen=True)
class KernelForm:
    """One set of packed arrays, read by both ops.

    Attributes:
        accuracy_level: `FLOAT_ACTIVATIONS` or `INT8_ACTIVATIONS`, the numbers of MatMulNBits.
    """

    accuracy_level: int = INT8_ACTIVATIONS
    name: str = "LowBit"

    def arrays(self, encoding: UniformEncoding) -> dict[str, np.ndarray]:
        """See `Form.arrays`."""
        return packed_arrays(encoding)

    def shared_arrays(self, encoding: UniformEncoding) -> dict[str, SharedArray]:
        """See `Form.shared_arrays`."""
        return {}

    def attributes(self, encoding: UniformEncoding) -> dict[str, Any]:
        """See `Form.attributes`."""
        return packed_attributes(encoding)

    def linear(self, tape: ir.tape.Tape, x: ir.Value, weight: StoredWeight, bias: ir.Value | None) -> ir.Value:
        """See `Form.linear`."""
        if bias is None:
            bias = constant(tape, np.zeros(1, np.float32))
        return tape.op(
            "LowBitMatMul",
            [x, *weight.tensors.values(), bias],
            {**weight.attributes, "accuracy_level": self.accuracy_level},
            domain=ops.DOMAIN,
        )

    def table(self, tape: ir.tape.Tape, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        """See `Form.table`."""
        inputs = [indices, *weight.tensors.values()]
        return tape.op("LowBitGather", inputs, weight.attributes, domain=ops.DOMAIN)

    def functions(self, weight: StoredWeight, *, linear: bool, table: bool) -> tuple[str, ...]:
        """See `Form.functions`."""
        return ("LowBitMatMul",) * linear + ("LowBitGather",) * table


def packed_arrays(encoding: UniformEncoding | CodebookEncoding) -> dict[str, np.ndarray]:
    """What every op of packed codes reads, in kernel order."""
    packed = encoding.pack()
    return {"packed": packed.packed, "scales": packed.scales, "zero_points": packed.zero_points}


def packed_attributes(encoding: UniformEncoding | CodebookEncoding) -> dict[str, Any]:
    """What every op of packed codes has to know besides."""
    n, k = encoding.shape
    return {
        "K": k,
        "N": n,
        "bits": encoding.format.bits,
        "group_size": encoding.format.effective_group(k),
        "gain": float(encoding.gain),
        "layout_version": ops.LAYOUT_VERSION,
    }
