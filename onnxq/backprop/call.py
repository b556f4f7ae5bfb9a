"""What an operator's function is given besides its input tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onnxq.errors import ModelError

Result = Tensor | tuple[Tensor | None, ...]
"""One output, or all of them in order."""

Op = Callable[..., Result]
"""``op(call, *inputs)``: the inputs as the node lists them, None where one is left out; trailing ones may be absent."""


@dataclass(frozen=True)
class Call:
    """One node, for the function that computes it.

    Attributes:
        op_type: the operator.
        opset: version of its domain's operator set.
        outputs: how many outputs the node lists.
        attributes: by name: int, float, str, tuples of them, tensors; absent ones are absent.
    """

    op_type: str
    opset: int
    outputs: int
    attributes: Mapping[str, Any]

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        return int(self.attributes.get(name, default))

    def number(self, name: str, default: float) -> float:
        """A float attribute."""
        return float(self.attributes.get(name, default))

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        return str(self.attributes.get(name, default))

    def axes(self, given: Tensor | None, name: str = "axes") -> list[int] | None:
        """A list that newer operator sets give as an input and older ones as an attribute; None where absent."""
        if given is not None:
            return integers(given)
        written = self.attributes.get(name)
        return None if written is None else [int(axis) for axis in written]


def integers(tensor: Tensor) -> list[int]:
    """The elements of an integer tensor of any shape."""
    return [int(element) for element in tensor.reshape(-1).tolist()]


def required(tensor: Tensor | None, what: str) -> Tensor:
    """An input that must be there.

    Raises:
        ModelError: it is not.
    """
    if tensor is None:
        raise ModelError(f"its input '{what}' is left out")
    return tensor


def is_float(tensor: Tensor) -> bool:
    """Whether the tensor's type can carry gradients."""
    return torch.is_floating_point(tensor)
