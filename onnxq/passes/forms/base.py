"""A *form* is how an encoded weight stands in a graph: which initializers, which nodes.

The kernel form is the custom op; the stock forms are ops that ONNX Runtime already runs fast. A form is one class
with the methods of `Form`; `onnxq.passes.forms.choose_form` says which weight takes which.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """A weight as it stands in the written model.

    Attributes:
        name: prefix of its initializers.
        form: how its sites read it.
        shape: (N, K).
        attributes: what the nodes of the form need to know of the encoding.
        tensors: the initializers by role, such as ``"packed"``.
    """

    name: str
    form: Form
    shape: tuple[int, int]
    attributes: Mapping[str, Any]
    tensors: Mapping[str, ir.Value]


@dataclasses.dataclass(frozen=True, eq=False)
class SharedArray:
    """An array that weights share, stored once under a name that its contents decide."""

    name: str
    array: np.ndarray


class Form(Protocol):
    """How an encoding is stored in a graph and read by its sites."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    def arrays(self, encoding: Any) -> dict[str, np.ndarray]:
        """The arrays to store, by role; small dtypes as ml_dtypes."""
        ...

    def shared_arrays(self, encoding: Any) -> Mapping[str, SharedArray]:
        """Arrays that other weights may have too, by role."""
        ...

    def attributes(self, encoding: Any) -> dict[str, Any]:
        """What `linear` and `table` need to know besides the arrays."""
        ...

    def linear(self, tape: ir.tape.Tape, x: ir.Value, weight: StoredWeight, bias: ir.Value | None) -> ir.Value:
        """Appends x [..., K] @ weight.T + bias to the tape; float32."""
        ...

    def table(self, tape: ir.tape.Tape, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        """Appends the look-up of rows to the tape; float32."""
        ...

    def functions(self, weight: StoredWeight, *, linear: bool, table: bool) -> tuple[str, ...]:
        """Names of the onnxq ops whose function bodies the model must carry."""
        ...


def constant(tape: ir.tape.Tape, array: np.ndarray) -> ir.Value:
    """A Constant node of a small array."""
    return tape.op("Constant", [], {"value": ir.tensor(array)})


def digest(array: np.ndarray) -> str:
    """What tells an array from others of its type, for the name of a `SharedArray`."""
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()[:12]
