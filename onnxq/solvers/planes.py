"""How many planes each row of a table gets: by how often it is looked up, or by what it loses.

`planes_by_frequency` is the paper's: rows in clusters of falling frequency, each with a plane less than the one before.
`planes_by_loss` is ours: the plane goes where it saves most, frequency times squared error, until the budget is spent.
A table that is also an output projection is read whole for every token, so there every row counts (`row_weights`).

Source: Chung et al. (arXiv 2009.07453), algorithm 1.
"""

from __future__ import annotations

import numpy as np

from onnxq.errors import BudgetError
from onnxq.formats.binary import MOST_PLANES, BinaryFormat


def planes_by_frequency(counts: np.ndarray, clusters: int, ratio: float) -> np.ndarray:
    """Planes of rows by algorithm 1.

    Cluster i of the rows in falling frequency holds the share ratio**i / sum_k ratio**k of them, rounded, the last what
    is left, and its rows get `clusters` - i planes.

    Args:
        counts: [N], how often each row is looked up. Of equals the first comes first.
        clusters: how many there are, 1 to 6.
        ratio: sizes of neighbours; 1 makes all alike, more makes more rows narrow.

    Returns:
        int64 [N].

    Raises:
        ValueError: an option is out of range.
    """
    if not 1 <= clusters <= MOST_PLANES or not ratio > 0:
        raise ValueError(f"{clusters=} must be 1 to {MOST_PLANES} and {ratio=} above 0")
    n = len(counts)
    powers = float(ratio) ** np.arange(clusters)
    # Several halves may be rounded up, and leave less than the last of them asks for.
    ends = np.minimum(np.cumsum(np.floor(n * powers / powers.sum() + 0.5)), n).astype(np.int64)
    ends[-1] = n
    planes = np.empty(n, np.int64)
    planes[np.argsort(-counts, kind="stable")] = np.repeat(clusters - np.arange(clusters), np.diff(ends, prepend=0))
    return planes


def row_weights(counts: np.ndarray, every_row: float = 0.0) -> np.ndarray:
    """What a squared error of each row counts: its share of look-ups, and an equal share of `every_row`.

    Args:
        counts: [N], how often each row is looked up.
        every_row: what all rows together count as those that an output projection reads; look-ups count 1.

    Returns:
        float64 [N], summing up to 1 + `every_row`; equal where nothing was counted.

    Raises:
        ValueError: a count or `every_row` is negative.
    """
    if every_row < 0 or counts.min(initial=0) < 0:
        raise ValueError("counts and every_row must not be negative")
    n, total = len(counts), float(counts.sum())
    shares = counts / total if total > 0 else np.full(n, 1 / n)
    weights: np.ndarray = shares + every_row / n
    return weights


def planes_by_loss(
    errors: np.ndarray, weights: np.ndarray, budget_bits: int, k: int, format: BinaryFormat
) -> np.ndarray:
    """Planes of rows that lose least within a budget, everything stored counted.

    Steps of all rows, from a plane to the next, are taken by what they save, so the result is the best of all that have
    as many planes or fewer. Where a row's second step saves more than its first, both are one step.

    Args:
        errors: float [N, P], squared error of rows with 1, 2, ... P planes, as `plane_errors` finds it.
        weights: float [N], what the error of a row counts.
        budget_bits: ceiling.
        k: inputs of the table.
        format: its groups and offsets; its planes don't matter.

    Returns:
        int64 [N].

    Raises:
        BudgetError: a plane for each row is above the budget; the message says the floor.
    """
    n = len(errors)

    def price(planes: np.ndarray) -> int:
        found, _ = BinaryFormat.by_row(planes, format.group_size, offset=format.offset)
        return found.cost_bits(n, k)

    floor = price(np.ones(n, np.int64))
    if floor > budget_bits:
        raise BudgetError(
            f"The budget of {budget_bits / 8:,.0f} bytes for a table [{n}, {k}] is below the floor of "
            f"{floor / 8:,.0f} bytes, which one plane for each row comes to."
        )
    gains = convex_gains(errors * weights[:, None])
    order = np.argsort(-gains, axis=None, kind="stable")
    order = order[: int((gains > 0).sum())]
    rows, saved = order // max(gains.shape[1], 1), gains.ravel()[order]

    def after(steps: int) -> np.ndarray:
        planes: np.ndarray = 1 + np.bincount(rows[:steps], minlength=n)
        return planes

    # All steps may cost less than all but one: an order is stored only where rows differ.
    if price(after(len(order))) <= budget_bits:
        return after(len(order))
    fits, breaks = 0, len(order)
    while breaks - fits > 1:
        middle = (fits + breaks) // 2
        fits, breaks = (middle, breaks) if price(after(middle)) <= budget_bits else (fits, middle)
    while fits and rows[fits] == rows[fits - 1] and saved[fits] == saved[fits - 1]:
        fits -= 1
    return after(fits)


def convex_gains(losses: np.ndarray) -> np.ndarray:
    """What each plane more saves on the lower convex hull of a row's losses: float [N, P] to falling [N, P - 1].

    Steps that only pay together have their mean, by the min-max formula of antitonic regression.
    """
    n, most = losses.shape
    gains = np.empty((n, most - 1))
    for step in range(most - 1):
        means = [
            np.max([(losses[:, first] - losses[:, last]) / (last - first) for last in range(step + 1, most)], axis=0)
            for first in range(step + 1)
        ]
        gains[:, step] = np.min(means, axis=0)
    # Rounding must not put a later step of a row before an earlier one.
    return np.minimum.accumulate(gains, axis=1)
