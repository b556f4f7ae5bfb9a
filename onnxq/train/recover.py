"""Read planes off values that are sums of planes already: the levels of a group tell its scales."""

from __future__ import annotations

import numpy as np

from onnxq.formats.binary import BinaryEncoding, BinaryFormat
from onnxq.formats.uniform import choose_gain
from onnxq.solvers.binary import signs_of
from onnxq.solvers.grid import largest_magnitude


def recover_planes(matrix: np.ndarray, format: BinaryFormat, order: np.ndarray | None = None) -> BinaryEncoding | None:
    """The encoding that a matrix was decoded from, as far as its values show it; None if no row looks like one.

    A group of b planes has 2**b values at most, and they are symmetric about its offset. Twice the sum of the flipped
    scales is what lies between a level and the highest, so scales are peeled off from the least. Levels that no weight
    of a group takes may hide a scale: such rows come out as others, so callers must compare.

    Args:
        matrix: float32 [N, K].
        format: of the encoding.
        order: rows as they are stored, int32 [N]; None for natural.
    """
    n, k = matrix.shape
    gain = choose_gain(np.asarray(largest_magnitude(matrix)))
    size, groups = format.effective_group(k), format.groups(k)
    values = matrix if order is None else matrix[order]
    codes = np.zeros((n, k), np.uint8)
    scales = np.zeros((len(format.planes), n, groups), np.float16)
    offsets = np.zeros((n, groups), np.float16) if format.offset else None
    met = False
    for planes, rows in format.runs():
        for group in range(groups):
            inputs = slice(group * size, min((group + 1) * size, k))
            part = values[rows, inputs]
            few = _distinct(part) <= 1 << planes
            for row in np.flatnonzero(few):
                found = _read_group(part[row].astype(np.float64) / gain, planes, offset=format.offset)
                if found is None:
                    continue
                met, at = True, rows.start + row
                codes[at, inputs], scales[:planes, at, group] = found[0], found[1]
                if offsets is not None:
                    offsets[at, group] = found[2]
    if not met:
        return None
    return BinaryEncoding(format, codes, scales, offsets, None if order is None else order.astype(np.int32), gain)


def _distinct(values: np.ndarray) -> np.ndarray:
    """How many different values each row has, int [N]."""
    ordered = np.sort(values, axis=1)
    counts: np.ndarray = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)
    return counts


def _read_group(values: np.ndarray, planes: int, *, offset: bool) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Codes, scales (falling) and offset of one group; None if float16 can't hold what is found."""
    middle = (values.max() + values.min()) / 2 if offset else 0.0
    levels = np.unique(np.abs(values - middle))
    highest = levels[-1]
    # Levels of both signs, as what is flipped between them and the highest: sums of some scales.
    flipped = np.unique(np.concatenate([highest - levels, highest + levels])) / 2
    sums, found = np.zeros(1), []
    for _ in range(planes):
        rest = np.setdiff1d(flipped, sums)
        if not len(rest):
            break
        found.append(rest[0])
        sums = np.unique(np.concatenate([sums, sums + rest[0]]))
    scales = np.zeros(planes)
    scales[: len(found)] = found[::-1]
    stored = scales.astype(np.float16)
    if not np.array_equal(stored.astype(np.float64), scales):
        return None
    heights = signs_of(planes, False) @ scales + middle
    codes = np.abs(values[:, None] - heights).argmin(axis=1).astype(np.uint8)
    return codes, stored, middle
