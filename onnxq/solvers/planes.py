"""How many planes each row of a table gets: by how often it is looked up, or by what it loses.

`planes_by_frequency` is the paper's: rows in clusters of falling frequency, each with a plane less than the one before.
`planes_by_loss` and `planes_by_mean` are ours: the plane goes where it saves most, frequency times squared error, until
so many bits, or planes of a row on average, are spent. What planes save is measured, or of a large table estimated from
some of its rows (`row_errors`).

A table that is also an output projection is read whole for every token, so there every row counts (`row_weights`).

Source: Chung et al. (arXiv 2009.07453), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxq.errors import BudgetError
from onnxq.formats.binary import MOST_PLANES, BinaryFormat
from onnxq.solvers.binary import BinaryFit, plane_errors

_MEASURED_ELEMENTS = 1 << 19
"""Of the rows that every number of planes is tried on."""


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
    return _most_steps(errors, weights, lambda planes: price(planes) <= budget_bits)


def planes_by_mean(errors: np.ndarray, weights: np.ndarray, mean: float) -> np.ndarray:
    """The same with a ceiling of the planes of a row on average, 1 or more.

    Args:
        errors, weights: as of `planes_by_loss`.
        mean: the ceiling.

    Returns:
        int64 [N].

    Raises:
        ValueError: the ceiling is below one plane.
    """
    if not mean >= 1:
        raise ValueError(f"rows have a plane at least: {mean=} must be 1 or more")
    return _most_steps(errors, weights, lambda planes: bool(planes.sum() <= mean * len(errors)))


def _most_steps(errors: np.ndarray, weights: np.ndarray, fits: Callable[[np.ndarray], bool]) -> np.ndarray:
    """Planes of rows, int64 [N], after all steps, those that save most first, that fit; no step always does."""
    n = len(errors)
    gains = convex_gains(errors * weights[:, None])
    order = np.argsort(-gains, axis=None, kind="stable")
    order = order[: int((gains > 0).sum())]
    rows, saved = order // max(gains.shape[1], 1), gains.ravel()[order]

    def after(steps: int) -> np.ndarray:
        planes: np.ndarray = 1 + np.bincount(rows[:steps], minlength=n)
        return planes

    # All steps may cost less than all but one: an order is stored only where rows differ.
    if fits(after(len(order))):
        return after(len(order))
    taken, breaks = 0, len(order)
    while breaks - taken > 1:
        middle = (taken + breaks) // 2
        taken, breaks = (middle, breaks) if fits(after(middle)) else (taken, middle)
    while taken and rows[taken] == rows[taken - 1] and saved[taken] == saved[taken - 1]:
        taken -= 1
    return after(taken)


def row_errors(
    weight: np.ndarray,
    format: BinaryFormat,
    *,
    fit: BinaryFit = BinaryFit.ALTERNATING,
    most_elements: int = _MEASURED_ELEMENTS,
) -> np.ndarray:
    """Squared error of every row with 1 to 6 planes, float64 [N, 6]: `plane_errors` at a bounded cost.

    One plane is tried on every row, more on evenly spaced ones. What more planes lose at the others follows from what
    one does, both as shares of a row's squares: heavy tails cost at every width. The relation is a power law, fitted to
    the rows that are measured.

    Args:
        weight: float [N, K].
        format: for groups and offsets; its planes don't matter.
        fit: see `BinaryFit`.
        most_elements: of the rows that are measured.

    Raises:
        ValueError: see `binary_codes`.
    """
    n, k = weight.shape
    count = max(most_elements // k, 2)
    if n <= count:
        return plane_errors(weight, format, fit=fit)
    picked = np.unique(np.linspace(0, n - 1, count).astype(np.int64))
    part = BinaryFormat.of(len(picked), 1, format.group_size, offset=format.offset)
    measured = plane_errors(weight[picked], part, fit=fit)
    first = plane_errors(weight, format, most=1, fit=fit)[:, 0]
    squares = np.einsum("nk,nk->n", weight, weight, dtype=np.float64)
    shares = np.divide(first, squares, out=np.zeros(n), where=squares > 0)
    errors = np.zeros((n, MOST_PLANES))
    errors[:, 0] = first
    known = (shares[picked] > 0) & (measured > 0).all(axis=1)
    if known.any():
        rows = picked[known]
        inputs = np.stack([np.log(shares[rows]), np.ones(len(rows))], axis=1)
        wanted = np.log(measured[known, 1:] / squares[rows, None])
        powers, levels = np.linalg.lstsq(inputs, wanted, rcond=None)[0]
        errors[:, 1:] = squares[:, None] * np.exp(levels) * shares[:, None] ** np.maximum(powers, 0)
    errors[picked] = measured
    return np.minimum.accumulate(errors, axis=1)


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
