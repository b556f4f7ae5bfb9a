"""Scales and offsets of an encoding as tensors that can be trained, and weights as functions of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from onnxq.formats.binary import BinaryEncoding
from onnxq.solvers.binary import signs_of

_LARGEST_FLOAT16 = 65504.0


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """Rows with the same number of planes: as they are stored, and which of the weight they are, int64 [R]."""

    planes: int
    stored: slice
    rows: Tensor


class Levels:
    """The levels of every group of one weight.

    Scales are trained relative to where they start, so one rate suits all: scale = start * exp(t). Offsets move in
    units of the first scale. What is 0 stays 0.

    Attributes:
        factors: float32 [b, N, G], the t of scales; rows in stored order.
        shifts: float32 [N, G], of offsets; None where there are none.
    """

    def __init__(self, encoding: BinaryEncoding) -> None:
        self._encoding = encoding
        scales = torch.from_numpy(encoding.scales.astype(np.float32)) * encoding.gain
        self._scales = scales
        self.factors = torch.zeros_like(scales, requires_grad=True)
        self._offsets: Tensor | None = None
        self.shifts: Tensor | None = None
        if encoding.offsets is not None:
            self._offsets = torch.from_numpy(encoding.offsets.astype(np.float32)) * encoding.gain
            self.shifts = torch.zeros_like(self._offsets, requires_grad=True)
        order = torch.arange(len(encoding.codes))
        if encoding.order is not None:
            order = torch.from_numpy(encoding.order.astype(np.int64))
        self._runs = [_Run(planes, stored, order[stored]) for planes, stored in encoding.format.runs()]

    def leaves(self) -> list[Tensor]:
        """What an optimizer trains."""
        return [self.factors] if self.shifts is None else [self.factors, self.shifts]

    def decode(self, latent: Tensor | None = None) -> Tensor:
        """The weight float32 [N, K], differentiable by `leaves`.

        Args:
            latent: [N, K], whose nearest levels are taken; None keeps the codes of the encoding.
        """
        n, k = self._encoding.shape
        parts = [self._decode_run(run, latent) for run in self._runs]
        if len(parts) == 1 and self._encoding.order is None:
            return parts[0]
        return parts[0].new_empty(n, k).index_copy(0, torch.cat([run.rows for run in self._runs]), torch.cat(parts))

    def encode(self, latent: Tensor | None = None) -> BinaryEncoding:
        """The encoding with scales as they are now, rounded to float16, and codes as in `decode`."""
        encoding = self._encoding
        with torch.no_grad():
            found = dataclasses.replace(encoding, scales=self._stored(self._scales * self.factors.exp()))
            if self._offsets is not None and self.shifts is not None:
                found = dataclasses.replace(found, offsets=self._stored(self._moved_offsets()))
            if latent is None:
                return found
            rounded, codes = Levels(found), np.zeros_like(encoding.codes)
            for run in self._runs:
                heights = rounded._heights(run)
                levels, rising = heights.sort(1)
                index = _nearest(levels, self._groups(latent[run.rows]))
                near = rising.gather(1, index).reshape(len(run.rows), -1)[:, : encoding.shape[1]]
                codes[run.stored] = near.to(torch.uint8).numpy()
        return dataclasses.replace(found, codes=codes)

    def _decode_run(self, run: _Run, latent: Tensor | None) -> Tensor:
        heights = self._heights(run)
        if latent is None:
            levels = heights
            index = self._groups(torch.from_numpy(self._encoding.codes[run.stored])).to(torch.int64)
        else:
            levels, _ = heights.sort(1)
            index = _nearest(levels.detach(), self._groups(latent[run.rows]))
        return levels.gather(1, index).reshape(len(run.rows), -1)[:, : self._encoding.shape[1]]

    def _heights(self, run: _Run) -> Tensor:
        """What codes are worth in each group: [R * G, 2**planes]."""
        scales = (self._scales * self.factors.exp())[: run.planes, run.stored]
        signs = torch.from_numpy(signs_of(run.planes, False).astype(np.float32))
        heights = torch.einsum("prg,lp->rgl", scales, signs)
        if self._offsets is not None:
            heights = heights + self._moved_offsets()[run.stored, :, None]
        return heights.reshape(-1, heights.shape[-1])

    def _moved_offsets(self) -> Tensor:
        assert self._offsets is not None, "there are offsets"
        assert self.shifts is not None, "there are offsets"
        return self._offsets + self._scales[0] * self.shifts

    def _groups(self, values: Tensor) -> Tensor:
        """Values of rows [R, K] as those of groups [R * G, S]; the last group of a row is filled up."""
        size, k = self._encoding.format.effective_group(values.shape[1]), values.shape[1]
        filler = self._encoding.format.groups(k) * size - k
        return (functional.pad(values, (0, filler)) if filler else values).reshape(-1, size)

    def _stored(self, values: Tensor) -> np.ndarray:
        scaled = (values.double() / self._encoding.gain).clamp(-_LARGEST_FLOAT16, _LARGEST_FLOAT16)
        stored: np.ndarray = scaled.numpy().astype(np.float16)
        return stored


def _nearest(levels: Tensor, values: Tensor) -> Tensor:
    """Which of rising levels [M, L] is nearest to each value: [M, S] to int64 [M, S]."""
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), values.contiguous())
