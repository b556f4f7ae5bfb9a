"""The custom-op form of binary weights: BinaryCodeMatMul and MixedBitGather over one set of arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import ops
from onnxq.formats.binary import BinaryEncoding
from onnxq.passes.forms.base import SharedArray, StoredWeight, constant
from onnxq.passes.forms.kernel import INT8_ACTIVATIONS

_ROLES = ("codes", "scales", "offsets", "rank")


@dataclasses.dataclass(frozen=True)
class BinaryForm:
    """Planes one after the other, and what tells them apart: read whole by products, row by row by look-ups.

    Attributes:
        accuracy_level: as of `KernelForm`.
    """

    accuracy_level: int = INT8_ACTIVATIONS
    name: str = "BinaryCode"

    def arrays(self, encoding: BinaryEncoding) -> dict[str, np.ndarray]:
        """See `Form.arrays`."""
        packed = encoding.pack()
        return {"codes": packed.codes, "scales": packed.scales, "offsets": packed.offsets, "rank": packed.rank}

    def shared_arrays(self, encoding: BinaryEncoding) -> dict[str, SharedArray]:
        """See `Form.shared_arrays`."""
        return {}

    def attributes(self, encoding: BinaryEncoding) -> dict[str, Any]:
        """See `Form.attributes`."""
        n, k = encoding.shape
        return {
            "K": k,
            "N": n,
            "plane_rows": list(encoding.format.planes),
            "group_size": encoding.format.effective_group(k),
            "gain": float(encoding.gain),
            "layout_version": ops.LAYOUT_VERSION,
        }

    def linear(self, tape: ir.tape.Tape, x: ir.Value, weight: StoredWeight, bias: ir.Value | None) -> ir.Value:
        """See `Form.linear`."""
        if bias is None:
            bias = constant(tape, np.zeros(1, np.float32))
        return tape.op(
            "BinaryCodeMatMul",
            [x, *(weight.tensors[role] for role in _ROLES), bias],
            {**weight.attributes, "accuracy_level": self.accuracy_level},
            domain=ops.DOMAIN,
        )

    def table(self, tape: ir.tape.Tape, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        """See `Form.table`."""
        inputs = [indices, *(weight.tensors[role] for role in _ROLES)]
        return tape.op("MixedBitGather", inputs, weight.attributes, domain=ops.DOMAIN)

    def functions(self, weight: StoredWeight, *, linear: bool, table: bool) -> tuple[str, ...]:
        """See `Form.functions`."""
        return ("BinaryCodeMatMul",) * linear + ("MixedBitGather",) * table
