"""The custom-op form of mixed weights: MixedBitMatMul. Look-ups have none."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import ops
from onnxq.formats.mixed import MixedEncoding, steps, tables
from onnxq.passes.forms.base import SharedArray, StoredWeight, constant, digest
from onnxq.passes.forms.kernel import INT8_ACTIVATIONS

_ROLES = ("packed", "depths", "columns", "scales", "order", "tables", "steps")


@dataclasses.dataclass(frozen=True)
class MixedForm:
    """Codes of all depths, and what tells them apart. Weights that read one tensor may have one order.

    Attributes:
        accuracy_level: as of `KernelForm`.
    """

    accuracy_level: int = INT8_ACTIVATIONS
    name: str = "MixedBitMatMul"

    def arrays(self, encoding: MixedEncoding) -> dict[str, np.ndarray]:
        """See `Form.arrays`."""
        packed = encoding.pack()
        return {
            "packed": packed.packed,
            "depths": packed.depths,
            "columns": packed.columns,
            "scales": packed.scales,
        }

    def shared_arrays(self, encoding: MixedEncoding) -> dict[str, SharedArray]:
        """See `Form.shared_arrays`."""
        order = encoding.format.inputs()
        return {
            "order": SharedArray(f"onnxq.order.{digest(order)}", order),
            "tables": SharedArray("onnxq.mixed.tables", tables()),
            "steps": SharedArray("onnxq.mixed.steps", steps()),
        }

    def attributes(self, encoding: MixedEncoding) -> dict[str, Any]:
        """See `Form.attributes`."""
        n, k = encoding.shape
        return {
            "K": k,
            "N": n,
            "band": encoding.format.band,
            "gain": float(encoding.gain),
            "layout_version": ops.LAYOUT_VERSION,
        }

    def linear(self, tape: ir.tape.Tape, x: ir.Value, weight: StoredWeight, bias: ir.Value | None) -> ir.Value:
        """See `Form.linear`."""
        if bias is None:
            bias = constant(tape, np.zeros(1, np.float32))
        return tape.op(
            "MixedBitMatMul",
            [x, *(weight.tensors[role] for role in _ROLES), bias],
            {**weight.attributes, "accuracy_level": self.accuracy_level},
            domain=ops.DOMAIN,
        )

    def table(self, tape: ir.tape.Tape, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        """See `Form.table`."""
        raise NotImplementedError("recipes give weights that look-ups read a uniform grid")

    def functions(self, weight: StoredWeight, *, linear: bool, table: bool) -> tuple[str, ...]:
        """See `Form.functions`."""
        return ("MixedBitMatMul",)
