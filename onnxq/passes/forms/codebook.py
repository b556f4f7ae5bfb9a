"""The custom-op form of codebook weights: CodebookMatMul. Look-ups have none."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import ops
from onnxq.formats.codebook import CodebookEncoding
from onnxq.passes.forms.base import SharedArray, StoredWeight, constant
from onnxq.passes.forms.kernel import INT8_ACTIVATIONS, packed_arrays, packed_attributes


@dataclasses.dataclass(frozen=True)
class CodebookForm:
    """Packed codes and the table that gives their levels.

    Attributes:
        accuracy_level: as of `KernelForm`.
    """

    accuracy_level: int = INT8_ACTIVATIONS
    name: str = "CodebookMatMul"

    def arrays(self, encoding: CodebookEncoding) -> dict[str, np.ndarray]:
        """See `Form.arrays`."""
        return packed_arrays(encoding)

    def shared_arrays(self, encoding: CodebookEncoding) -> dict[str, SharedArray]:
        """See `Form.shared_arrays`."""
        format = encoding.format
        return {"table": SharedArray(f"onnxq.table.{format.bits}.{format.window}", format.table)}

    def attributes(self, encoding: CodebookEncoding) -> dict[str, Any]:
        """See `Form.attributes`."""
        return {**packed_attributes(encoding), "window": encoding.format.window}

    def linear(self, tape: ir.tape.Tape, x: ir.Value, weight: StoredWeight, bias: ir.Value | None) -> ir.Value:
        """See `Form.linear`."""
        if bias is None:
            bias = constant(tape, np.zeros(1, np.float32))
        return tape.op(
            "CodebookMatMul",
            [x, *(weight.tensors[role] for role in ("packed", "table", "scales", "zero_points")), bias],
            {**weight.attributes, "accuracy_level": self.accuracy_level},
            domain=ops.DOMAIN,
        )

    def table(self, tape: ir.tape.Tape, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        """See `Form.table`."""
        raise NotImplementedError("recipes give weights that look-ups read a uniform grid")

    def functions(self, weight: StoredWeight, *, linear: bool, table: bool) -> tuple[str, ...]:
        """See `Form.functions`."""
        return ("CodebookMatMul",)
