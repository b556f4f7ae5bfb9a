"""The trained numbers and the quantised model that they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from onnxq.backprop import TorchGraph
from onnxq.backprop.plan import Operand
from onnxq.distillation.weights import DecodedWeight, operand
from onnxq.graph.tensors import constant_tensor

_UNIT_OF_ZEROS = 0.01  # a vector of zeros says nothing about its size


class Student:
    """A quantised model inside a float one: its weights are decoded from scales that can be trained.

    Everything is trained relative to where it started, from zero on: scale = start * exp(t), vector = start + unit * t
    with the vector's root mean square as unit. So one rate suits all, and decay pulls back to the start.

    Args:
        graph: the float model.
        weights: what stands for its weights.
        vectors: initializers to train.
        per: one factor per group, or per row of the stored matrix.
    """

    def __init__(
        self,
        graph: TorchGraph,
        weights: Sequence[DecodedWeight],
        vectors: Sequence[ir.Value],
        per: Literal["group", "row"],
    ) -> None:
        self._graph = graph
        self._trained = [weight for weight in weights if weight.trained]
        self._fixed: dict[Operand, Tensor] = {}
        with torch.no_grad():
            for weight in weights:
                if not weight.trained:
                    scales = [torch.from_numpy(part.scales) for part in weight.parts]
                    self._fixed.update(_operands(weight, weight.decode(scales)))
        self._starts = [[torch.from_numpy(part.scales) for part in weight.parts] for weight in self._trained]
        self.factors = [
            [_zeros(start if per == "group" else start.reshape(start.shape[0], -1)[:, 0]) for start in parts]
            for parts in self._starts
        ]
        self._vectors = {graph.key(value): value for value in vectors}
        self._vector_starts = {key: graph.constant(value).clone() for key, value in self._vectors.items()}
        self.shifts = {key: _zeros(start) for key, start in self._vector_starts.items()}

    def run(self, feed: dict[str, np.ndarray], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Outputs with the numbers as they are, differentiable by `factors` and `shifts`."""
        vectors = {key: self._vector(key) for key in self.shifts}
        return self._run(feed, outputs, [self._scales(i) for i in range(len(self._trained))], vectors)

    def run_stored(self, feed: dict[str, np.ndarray], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Outputs with the numbers rounded as they are stored; no gradients."""
        scales = [[torch.from_numpy(array) for array in parts] for parts in self.stored_scales().values()]
        vectors = {key: torch.from_numpy(array.astype(np.float32)) for key, array in self.stored_vectors().items()}
        vectors = {key: tensor.to(self._vector_starts[key].dtype) for key, tensor in vectors.items()}
        with torch.no_grad():
            return self._run(feed, outputs, scales, vectors)

    def stored_scales(self) -> dict[str, tuple[np.ndarray, ...]]:
        """The scales of each trained weight's parts, as the format rounds them."""
        with torch.no_grad():
            return {
                weight.weight.name: tuple(
                    part.round(scales.numpy()) for part, scales in zip(weight.parts, self._scales(index), strict=True)
                )
                for index, weight in enumerate(self._trained)
            }

    def stored_vectors(self) -> dict[str, np.ndarray]:
        """The trained vectors in their initializers' types."""
        stored = {}
        with torch.no_grad():
            for key, value in self._vectors.items():
                tensor = constant_tensor(value)
                assert tensor is not None, "only initializers are trained"
                stored[key] = self._vector(key).numpy().astype(tensor.dtype.numpy())
        return stored

    def _scales(self, index: int) -> list[Tensor]:
        pairs = zip(self._starts[index], self.factors[index], strict=True)
        return [start * _spread(factor, start).exp() for start, factor in pairs]

    def _vector(self, key: str) -> Tensor:
        start = self._vector_starts[key]
        size = float(start.square().mean().sqrt())
        return start + (size or _UNIT_OF_ZEROS) * self.shifts[key]

    def _run(
        self,
        feed: dict[str, np.ndarray],
        outputs: Sequence[str],
        scales: Sequence[Sequence[Tensor]],
        vectors: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        operands = dict(self._fixed)
        for weight, own in zip(self._trained, scales, strict=True):
            operands.update(_operands(weight, weight.decode(own)))
        return self._graph.run(feed, values=vectors, operands=operands, outputs=outputs)


def _operands(weight: DecodedWeight, matrix: Tensor) -> dict[Operand, Tensor]:
    return {(site.node, site.weight_input): operand(site, matrix) for site in weight.weight.sites}


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, requires_grad=True)


def _spread(factor: Tensor, start: Tensor) -> Tensor:
    """A factor per row, or per element, as one that multiplies the scales."""
    return factor.reshape(factor.shape + (1,) * (start.dim() - factor.dim()))
