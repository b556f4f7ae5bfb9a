"""How far a model's outputs are from the float model's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from onnxq.backprop import TorchGraph
from onnxq.calibration.inputs import Feed
from onnxq.calibration.output_rows import LOGITS, OutputRows
from onnxq.errors import CalibrationError


class Objective:
    """A loss over some outputs: their sum, each 0 where the models agree.

    1. Without a choice: ``logits`` where there is such an output, else every float output that is no cache
       (see `onnxq.calibration.output_rows.OutputRows`).
    2. Outputs named ``logits``: the Kullback-Leibler divergence of the float model's distribution from ours, in nats,
       averaged over rows.
    3. Others: the squared error divided by the squares of the float model's.
    4. Rows that are padding by the feed's attention mask don't count.

    Attributes:
        outputs: their names.
    """

    def __init__(self, graph: TorchGraph, outputs: tuple[str, ...] | None) -> None:
        self._rules = OutputRows(graph.model, outputs)
        self.outputs = self._rules.names

    def loss(self, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], feed: Feed) -> Tensor:
        """The loss of one batch, a scalar.

        Args:
            found: the quantised model's outputs.
            wanted: the float model's.
            feed: for the mask.

        Raises:
            CalibrationError: no output is a float tensor, or it has no rows that count.
        """
        parts = []
        for name in self.outputs:
            if wanted[name].is_floating_point():
                ours, theirs = self._rows(name, found[name], feed), self._rows(name, wanted[name], feed)
                parts.append(_divergence(ours, theirs) if name == LOGITS else _relative_error(ours, theirs))
        if not parts:
            raise CalibrationError(
                f"None of the outputs {', '.join(self.outputs)} is a float tensor: nothing to match."
            )
        return torch.stack(parts).sum()

    def _rows(self, name: str, output: Tensor, feed: Feed) -> Tensor:
        """The output as rows that count (rule 4)."""
        keep = self._rules.keep(name, output.shape, feed)
        rows = output.reshape(1, -1) if output.dim() < 2 else output.reshape(-1, output.shape[-1])
        return rows if keep is None else rows[torch.from_numpy(np.ascontiguousarray(keep))]


def _divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    wanted = torch.log_softmax(theirs, -1)
    return (wanted.exp() * (wanted - torch.log_softmax(ours, -1))).sum(-1).mean()


def _relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours - theirs).square().sum() / theirs.square().sum().clamp_min(torch.finfo(theirs.dtype).tiny)
