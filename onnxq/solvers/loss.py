"""How far a weight has moved, in itself and in what its layer puts out."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

# Elements of a block of rows, so that temporaries stay small beside the weight.
_BLOCK_ELEMENTS = 1 << 22


def relative_error(weight: np.ndarray, approximation: np.ndarray) -> float:
    """||W - V||**2 / ||W||**2 of a weight W and its approximation V, both [N, K].

    A weight of zeros gives 0 when the approximation is zero as well, and infinity when it is not.
    """
    return _ratio(_energies(weight - approximation, None).sum(), _energies(weight, None).sum())


def relative_proxy_loss(weight: np.ndarray, approximation: np.ndarray, second_moment: np.ndarray) -> float:
    """tr(D H D^T) / tr(W H W^T) with D = W - V: how far the layer's output moves, in mean squares.

    Args:
        weight: float [N, K].
        approximation: float [N, K].
        second_moment: float [K, K], the mean of x x^T over inputs x.
    """
    changed = _energies(weight - approximation, second_moment).sum()
    return _ratio(changed, _energies(weight, second_moment).sum())


def _energies(rows: np.ndarray, second_moment: np.ndarray | None) -> np.ndarray:
    """Energies r H r^T of the rows r, float64 [N]; H is the identity where it is None."""
    parts = []
    for block in _blocks(rows):
        image = block if second_moment is None else block @ second_moment
        parts.append(np.einsum("nk,nk->n", image, block, dtype=np.float64))
    return np.concatenate(parts)


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    height = max(1, _BLOCK_ELEMENTS // rows.shape[1])
    for start in range(0, rows.shape[0], height):
        yield rows[start : start + height]


def _ratio(part: float, whole: float) -> float:
    if whole > 0:
        return float(part / whole)
    return 0.0 if part == 0 else math.inf
