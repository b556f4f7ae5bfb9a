"""How a matrix is read off the tensor that stores it: reshapes and transposes in one normal form.

Exporters put Transpose, Reshape, Squeeze and Unsqueeze between a weight and its use. Two uses see the same
matrix exactly when their layouts are equal, which decides whether they can share one encoding, without
touching the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, ...]


def _squeezed(shape: Shape) -> Shape:
    return tuple(d for d in shape if d != 1)


@dataclass(frozen=True)
class Layout:
    """A view of a stored tensor.

    Normal form: axes of length 1 carry no information, so ``steps`` work on shapes without them, alternate
    between ``("reshape", shape)`` and ``("transpose", perm)``, and hold no step that changes nothing.

    Attributes:
        source: shape of the stored tensor.
        steps: what is done to it, in order.
        shape: shape of the result, axes of length 1 included.
    """

    source: Shape
    steps: tuple[tuple[str, Shape], ...]
    shape: Shape

    @classmethod
    def identity(cls, shape: Shape) -> Layout:
        """The tensor as it is stored."""
        return cls(shape, (), shape)

    def reshaped(self, shape: Shape) -> Layout:
        """Then reshape; the sizes must agree."""
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"cannot reshape {self.shape} to {shape}")
        return Layout(self.source, self._with_reshape(_squeezed(shape)), shape)

    def transposed(self, perm: Shape) -> Layout:
        """Then permute the axes, as ``numpy.transpose`` does."""
        if sorted(perm) != list(range(len(self.shape))):
            raise ValueError(f"{perm} does not permute {len(self.shape)} axes")
        kept = [axis for axis in perm if self.shape[axis] != 1]
        order = sorted(kept)
        inner = tuple(order.index(axis) for axis in kept)
        shape = tuple(self.shape[axis] for axis in perm)
        return Layout(self.source, self._with_transpose(inner), shape)

    def swapped(self) -> Layout:
        """Then swap the last two axes."""
        rank = len(self.shape)
        return self.transposed((*range(rank - 2), rank - 1, rank - 2))

    def apply(self, array: np.ndarray) -> np.ndarray:
        """The view of a stored tensor; a copy only where a reshape follows a transpose."""
        array = array.reshape(_squeezed(self.source))
        for kind, argument in self.steps:
            array = array.reshape(argument) if kind == "reshape" else array.transpose(argument)
        return array.reshape(self.shape)

    def undo(self, view: np.ndarray) -> np.ndarray:
        """The stored tensor whose view is given: `apply` backwards."""
        shapes = [self._shape_after(self.steps[:count]) for count in range(len(self.steps))]
        array = view.reshape(_squeezed(self.shape))
        for (kind, argument), before in zip(reversed(self.steps), reversed(shapes), strict=True):
            array = array.reshape(before) if kind == "reshape" else array.transpose(np.argsort(argument))
        return array.reshape(self.source)

    def _with_reshape(self, shape: Shape) -> tuple[tuple[str, Shape], ...]:
        steps = self.steps
        if steps and steps[-1][0] == "reshape":
            steps = steps[:-1]
        return steps if shape == self._shape_after(steps) else (*steps, ("reshape", shape))

    def _with_transpose(self, perm: Shape) -> tuple[tuple[str, Shape], ...]:
        steps = self.steps
        if steps and steps[-1][0] == "transpose":
            before = steps[-1][1]
            perm = tuple(before[axis] for axis in perm)
            steps = steps[:-1]
        return steps if perm == tuple(range(len(perm))) else (*steps, ("transpose", perm))

    def _shape_after(self, steps: tuple[tuple[str, Shape], ...]) -> Shape:
        shape = _squeezed(self.source)
        for kind, argument in steps:
            shape = argument if kind == "reshape" else tuple(shape[axis] for axis in argument)
        return shape
