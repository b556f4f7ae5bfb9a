"""Which part of a transformer a weight belongs to: encoder or decoder, attention or feed-forward.

Parts are found by the names that exporters give files and nodes (Marian, BART, T5, Whisper, BERT, GPT and Llama
layouts). Recipes speak of them as ``part:decoder.cross``, `onnxq.sensitivity.scan` measures them one by one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

EMBEDDING, POSITIONS, OTHER = "embedding", "positions", "other"

_POSITIONS = re.compile(r"embed_positions|position_embedding|wpe\b|relative_attention_bias|positional", re.IGNORECASE)
_EMBEDDING = re.compile(
    r"lm_head|embed_tokens|word_embeddings|embed_out|proj_out|shared|wte\b|token_embed|output_projection", re.IGNORECASE
)
_CROSS = re.compile(r"encoder_attn|EncDecAttention|cross_?attn|crossattention", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention|\brnn\b", re.IGNORECASE)
_FFN = re.compile(r"\bfc[12]\b|\bffn?\b|mlp|DenseReluDense|intermediate|feed_?forward|output[./]dense", re.IGNORECASE)
_LAYER = re.compile(r"\b(?:layers?|blocks?|h)[._/](\d+)\b", re.IGNORECASE)
_SIDE = re.compile(r"(?<![a-z])(encoder|decoder)(?!_attn)(?![a-z])", re.IGNORECASE)


def part_of(names: Sequence[str], graph: str, *, look_ups: bool) -> str:
    """The part of a weight, such as "decoder.cross".

    Args:
        names: the weight's, and those of its sites.
        graph: the file name of its model, without suffix; says encoder or decoder where no name does.
        look_ups: whether look-ups read it.

    Returns:
        "embedding", "positions", or attention, cross or ffn, with "encoder." or "decoder." in front where a name or
        the file says so; "other" for what no name tells.
    """
    text = " ".join(names)
    if _POSITIONS.search(text):
        return POSITIONS
    if look_ups or _EMBEDDING.search(text):
        return EMBEDDING
    sides = _SIDE.findall(text) or _SIDE.findall(graph.replace("_", " "))
    side = f"{sides[0].lower()}." if sides else ""
    if _CROSS.search(text):
        return "decoder.cross"
    if _ATTENTION.search(text):
        return f"{side}attention"
    return f"{side}ffn" if _FFN.search(text) else OTHER


def layer_of(names: Sequence[str]) -> int | None:
    """The number of a weight's layer, or None."""
    found = _LAYER.search(" ".join(names))
    return None if found is None else int(found.group(1))
