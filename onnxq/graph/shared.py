"""Weights that several graphs of an exported model hold: an encoder and two decoders store one embedding thrice."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from onnxq.graph.weights import Weight


def content_of(matrix: np.ndarray) -> str:
    """Equal for weights [N, K] whose float32 values are, and for no others."""
    digest = hashlib.blake2b(f"{matrix.shape[0]} {matrix.shape[1]} ".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(matrix, np.float32).view(np.uint8).data)
    return digest.hexdigest()


def contents_of(weight: Weight) -> tuple[str, ...]:
    """`content_of` each matrix of a weight. Memory: one of them in float32."""
    return tuple(content_of(weight.rows(i * weight.n, (i + 1) * weight.n)) for i in range(weight.batch))


@dataclasses.dataclass(frozen=True)
class Shared:
    """The weights of several graphs by what they hold.

    Attributes:
        weights: by graph, every weight with the kinds of its sites in other graphs (`Weight.elsewhere`).
        contents: by graph and weight name, what the weight holds.
        holders: by content, graph and weight name of all that hold it.
    """

    weights: Mapping[str, tuple[Weight, ...]]
    contents: Mapping[tuple[str, str], tuple[str, ...]]
    holders: Mapping[tuple[str, ...], tuple[tuple[str, str], ...]]


def find_shared(found: Mapping[str, list[Weight]]) -> Shared:
    """Compares the weights of several graphs, by graph. Reads each once."""
    contents: dict[tuple[str, str], tuple[str, ...]] = {}
    holders: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
    kinds: dict[tuple[str, ...], dict[str, None]] = defaultdict(dict)
    for graph, weights in found.items():
        for weight in weights:
            content = contents[(graph, weight.name)] = contents_of(weight)
            holders[content].append((graph, weight.name))
            kinds[content].update(dict.fromkeys(weight.kinds))
    joined = {
        graph: tuple(
            dataclasses.replace(weight, elsewhere=tuple(kinds[contents[(graph, weight.name)]])) for weight in weights
        )
        for graph, weights in found.items()
    }
    return Shared(joined, contents, {content: tuple(names) for content, names in holders.items()})
