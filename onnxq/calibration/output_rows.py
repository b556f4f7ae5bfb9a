"""The outputs that tell how well a model does, and which of their rows count."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxq.calibration.inputs import Feed
from onnxq.calibration.masks import MaskRules
from onnxq.calibration.taps import Tap
from onnxq.errors import ModelError

LOGITS = "logits"


class OutputRows:
    """Some outputs of a model, as rows of their last axis.

    1. Without a choice: ``logits`` where there is such an output, else every output that is no cache (``present...``).
    2. An output of one axis or none is one row.
    3. Rows that are padding by the feed's attention mask don't count.

    Attributes:
        names: the outputs.
    """

    def __init__(self, model: ir.Model, outputs: Sequence[str] | None) -> None:
        values = {str(value.name): value for value in model.graph.outputs}
        if outputs is None:  # rule 1
            proper = tuple(name for name in values if not name.startswith("present"))
            outputs = (LOGITS,) if LOGITS in proper else proper
        unknown = [name for name in outputs if name not in values]
        if unknown or not outputs:
            raise ModelError(f"The model has no output {unknown}; it has {', '.join(values)}.")
        self.names = tuple(outputs)
        self._taps = {name: Tap(name, values[name], "diagonal", "linear", "right", None, (name,)) for name in outputs}
        self._masks = MaskRules(model, list(self._taps.values()))

    @property
    def notes(self) -> tuple[str, ...]:
        """Outputs that no mask fitted so far, in sentences."""
        return tuple(self._masks.unmatched.values())

    def keep(self, name: str, shape: Sequence[int], feed: Feed) -> np.ndarray | None:
        """Which rows of an output of that shape count: bool [rows], or None for all of them."""
        if len(shape) < 2:  # rule 2
            return None
        return self._masks.keep(self._taps[name], tuple(shape[:-1]), feed)
