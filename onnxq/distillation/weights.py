"""Quantised weights as functions of their scales, and how the nodes of a graph read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from onnxq.formats.uniform import UniformEncoding, round_scales
from onnxq.graph import Site, Weight

_LARGEST_HALF = 65504.0


@dataclass(frozen=True, eq=False)
class Part:
    """One stored matrix of a weight: any format, in a frame or not.

    Attributes:
        scales: float32, any shape; the first axis is the output rows of the stored matrix. The numbers to train.
        decode: scales (a tensor of that shape) to the matrix [N, K] that the runtime computes with; differentiable.
            A frame wraps it: ``lambda scales: synthesis @ inner(scales) @ analysis``.
        round: scales to the nearest ones that the format stores, both float32.
    """

    scales: np.ndarray
    decode: Callable[[Tensor], Tensor]
    round: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class DecodedWeight:
    """A weight of the model and what stands for it.

    Attributes:
        weight: with its sites, found in the model that is distilled.
        parts: one, or one for each member of a stack.
        trained: whether the scales are trained; if not, the decoded matrix just stands in its place.
    """

    weight: Weight
    parts: tuple[Part, ...]
    trained: bool = True

    def decode(self, scales: Sequence[Tensor]) -> Tensor:
        """The matrix [batch * n, k] for these scales of the parts."""
        members = [part.decode(own) for part, own in zip(self.parts, scales, strict=True)]
        return members[0] if len(members) == 1 else torch.cat(members)


def uniform_weight(weight: Weight, encodings: Sequence[UniformEncoding], *, trained: bool = True) -> DecodedWeight:
    """A weight that is stored in the uniform format."""
    return DecodedWeight(weight, tuple(uniform_part(encoding) for encoding in encodings), trained)


def uniform_part(encoding: UniformEncoding) -> Part:
    """A uniform encoding; codes and zero points are fixed."""
    return Part(
        encoding.effective_scales(),
        uniform_decoder(encoding),
        lambda scales: with_scales(encoding, scales).effective_scales(),
    )


def with_scales(encoding: UniformEncoding, scales: np.ndarray) -> UniformEncoding:
    """The encoding with other effective scales [N, G], rounded to what the format stores."""
    largest = _LARGEST_HALF * encoding.gain
    return replace(encoding, scales=round_scales(np.clip(scales, -largest, largest), encoding.gain))


def uniform_decoder(encoding: UniformEncoding) -> Callable[[Tensor], Tensor]:
    """Effective scales [N, G] to the matrix [N, K] of a uniform encoding.

    Autograd keeps one byte per weight of it (the codes, shared by all calls), not the two floats of the plain formula.
    """
    _, k = encoding.shape
    group = encoding.format.effective_group(k)
    padding = encoding.format.groups(k) * group - k
    codes = F.pad(torch.from_numpy(encoding.codes.copy()), (0, padding))
    zeros = torch.from_numpy(encoding.format.zero_of(encoding.zero_points))

    def decode(scales: Tensor) -> Tensor:
        decoded: Tensor = _Decode.apply(scales, codes, zeros, group, k)  # type: ignore[no-untyped-call]
        return decoded

    return decode


class _Decode(torch.autograd.Function):
    """(code - zero) * scale, differentiable by the scale: the gradient is the sum of slope * (code - zero)."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor, codes: Tensor, zeros: Tensor, group: int, k: int) -> Tensor:
        ctx.save_for_backward(codes, zeros)
        ctx.group = group
        return _levels(codes, zeros, group).mul_(scales[..., None]).reshape(codes.shape)[:, :k]

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        codes, zeros = ctx.saved_tensors
        levels = _levels(codes, zeros, ctx.group)
        slope = F.pad(slopes[0], (0, codes.shape[1] - slopes[0].shape[1])).reshape(levels.shape)
        return levels.mul_(slope).sum(-1), None, None, None, None


def _levels(codes: Tensor, zeros: Tensor, group: int) -> Tensor:
    """Codes [N, G * group] less their zeros, float32 [N, G, group]."""
    return codes.reshape(codes.shape[0], -1, group).float().sub_(zeros[..., None])


def operand(site: Site, matrix: Tensor) -> Tensor:
    """What a site's node reads where its weight is the matrix [batch * n, k]: shape ``site.shape``."""
    if site.kind == "table":
        return matrix.reshape(site.shape)
    if site.node.op_type == "Gemm":
        flag = site.node.attributes.get_int("transA" if site.weight_input == 0 else "transB", 0)
        transposed = bool(flag) == (site.weight_input == 0)
    else:
        transposed = site.weight_input == 1
    stack = matrix.reshape(*site.shape[:-2], site.n, site.k)
    return (stack.transpose(-1, -2) if transposed else stack).reshape(site.shape)
