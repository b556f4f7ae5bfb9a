"""Which rows of a tapped tensor are padding.

Rules:
 1. Masks are the inputs named ``...attention_mask`` of rank 2, [batch, length]; non-zero is kept.
 2. In a model with an encoder's and a decoder's tokens, a tensor that depends on the decoder's tokens takes the
    decoder's mask, any other the encoder's (so keys and values of cross-attention take the encoder's length).
 3. Shapes in front of the width that match: [B, S]; [B*S]; [B, S, ...]; [B, ..., S]; [iterations, B, S] in a loop.
 4. With cached keys and values the mask is longer than the new tokens: its last S columns count.
 5. No match: all rows are used, and that is noted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxq.calibration.inputs import Feed
from onnxq.calibration.taps import Tap, subgraphs

_SUFFIX = "attention_mask"
_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


class MaskRules:
    """The masks of one model, by tap.

    Attributes:
        unmatched: Tap key -> sentence, for taps of a model with masks where none matched.
    """

    def __init__(self, model: ir.Model, taps: Sequence[Tap]) -> None:
        names = [str(i.name) for i in model.graph.inputs]
        self.unmatched: dict[str, str] = {}
        masks = [n for n in names if n.endswith(_SUFFIX)]
        self._tokens = [n for n in _TOKENS if n in names]
        joined = any(n.startswith("decoder_") for n in names)
        split = joined or any(n.startswith("encoder_") for n in names)
        self._masks: dict[str, list[str]] = {}
        if not split:
            self._masks = {t.key: masks for t in taps}
            return
        own = "decoder_" if joined else ""
        decoder_tokens = [n for n in self._tokens if n.startswith(own)]
        dependent = _dependents(model.graph, [i for i in model.graph.inputs if i.name in decoder_tokens])
        decoder_masks = [n for n in masks if n == own + _SUFFIX]
        encoder_masks = [n for n in masks if n not in decoder_masks]
        for tap in taps:
            self._masks[tap.key] = decoder_masks if id(tap.value) in dependent else encoder_masks

    def keep(self, tap: Tap, leading: tuple[int, ...], feed: Feed) -> np.ndarray | None:
        """Which rows count: bool over the flattened `leading` shape, or None for all of them."""
        present = [n for n in self._masks[tap.key] if n in feed and feed[n].ndim == 2]
        if not present:
            return None
        new_tokens = next((feed[n].shape[1] for n in self._tokens if n in feed and feed[n].ndim >= 2), None)
        cached = any(n.startswith("past") and a.size for n, a in feed.items())
        for name in present:
            mask = feed[name] != 0
            if cached and new_tokens is not None and new_tokens < mask.shape[1] and not name.startswith("encoder_"):
                mask = mask[:, mask.shape[1] - new_tokens :]
            rows = _spread(mask, leading)
            if rows is not None:
                return rows
        shapes = ", ".join(f"{n} {list(feed[n].shape)}" for n in present)
        self.unmatched.setdefault(
            tap.key, f"{tap.describe()}: rows {list(leading)} match no mask ({shapes}); all rows were counted"
        )
        return None


def _spread(mask: np.ndarray, leading: tuple[int, ...]) -> np.ndarray | None:
    batch, length = mask.shape
    if leading == (batch * length,):
        return mask.reshape(-1)
    if len(leading) >= 2 and leading[:2] == (batch, length):
        shaped = mask.reshape(batch, length, *(1,) * (len(leading) - 2))
    elif len(leading) >= 3 and (leading[0], leading[-1]) == (batch, length):
        shaped = mask.reshape(batch, *(1,) * (len(leading) - 2), length)
    elif len(leading) == 3 and leading[1:] == (batch, length):
        shaped = mask[None]
    else:
        return None
    return np.broadcast_to(shaped, leading).reshape(-1)


def _dependents(graph: ir.Graph, sources: Sequence[ir.Value]) -> set[int]:
    """Ids of the values that depend on the content of `sources` (Shape and Size do not pass it on)."""
    found = {id(v) for v in sources}

    def walk(part: ir.Graph) -> None:
        for node in part:
            if node.op_type in ("Shape", "Size"):
                continue
            hit = any(id(v) in found for v in node.inputs if v is not None)
            for _, inner in subgraphs(node):
                if hit:
                    found.update(id(v) for v in inner.inputs)
                walk(inner)
                if any(id(v) in found for v in inner.outputs):
                    # Carried values come back in at the next iteration.
                    found.update(id(v) for v in inner.inputs)
                    walk(inner)
                    hit = True
            if hit:
                found.update(id(v) for v in node.outputs)

    walk(graph)
    return found
