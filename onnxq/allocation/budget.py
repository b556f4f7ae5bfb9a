"""One choice per weight, from measured rate-distortion curves, under a ceiling.

Each weight offers points (bits, loss). The best choice for a multiplier lies on the lower convex hull of its points,
so walking all hulls at once by falling gain per bit is the Lagrangian solution for every budget in turn; what the
last step leaves over is then spent on single moves that still fit. Sizes come from the formats alone.
"""

from __future__ import annotations

import dataclasses
import heapq
import re
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

from onnxq.errors import BudgetError

T = TypeVar("T")

_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kKmMgG]?)(i?)[bB]?\s*")
_TRIALS = 16
"""Large steps that are tried at the others' expense."""

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3}


@dataclasses.dataclass(frozen=True)
class Point(Generic[T]):
    """One way to store a weight.

    Attributes:
        bits: its exact price, side data and padding counted.
        loss: its distortion, in the same unit for every weight.
        choice: what it stands for, such as a format.
    """

    bits: int
    loss: float
    choice: T


def parse_size(text: str) -> int:
    """Bytes in a size such as ``20MB`` (powers of 1000) or ``20MiB`` (powers of 1024).

    Raises:
        BudgetError: not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise BudgetError(f"{text!r} is no size. Write a number and a unit, such as 20MB or 512KiB.")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[unit.lower()])


def lower_hull(points: Sequence[Point[T]]) -> list[Point[T]]:
    """The points that are best for some multiplier, by rising bits and falling loss."""
    hull: list[Point[T]] = []
    for point in sorted(points, key=lambda p: (p.bits, p.loss)):
        if hull and point.loss >= hull[-1].loss:
            continue
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: Point[T], b: Point[T]) -> float:
    """Loss saved per bit."""
    return (a.loss - b.loss) / (b.bits - a.bits)


def allocate(curves: Mapping[str, Sequence[Point[T]]], budget_bits: int) -> dict[str, Point[T]]:
    """Chooses a point of every curve so that the bits stay within the budget and the summed loss is small.

    A step that is due but too large for what is left, as with a table that is half of the model, is tried once more
    with its weight set to it from the start and the others on the rest, and kept where that is better.

    Args:
        curves: the points of each weight; at least one each.
        budget_bits: ceiling of the summed bits.

    Raises:
        BudgetError: the cheapest points together are above the budget; the message says the floor.
    """
    hulls = {name: lower_hull(points) for name, points in curves.items()}
    floor = sum(hull[0].bits for hull in hulls.values())
    if floor > budget_bits:
        raise BudgetError(
            f"The budget of {budget_bits / 8:,.0f} bytes for {len(hulls)} weights is below the floor of "
            f"{floor / 8:,.0f} bytes, the cheapest that the allowed formats come to."
        )
    start = dict.fromkeys(hulls, 0)
    best, blocked = _walk(curves, hulls, start, budget_bits)
    for _ in range(_TRIALS):
        if not blocked:
            break
        (name, index), *blocked = blocked
        raised = {**start, name: index}
        if sum(hulls[key][at].bits for key, at in raised.items()) > budget_bits:
            continue
        picks, next_blocked = _walk(curves, hulls, raised, budget_bits)
        if _loss(picks) < _loss(best):
            best, start, blocked = picks, raised, next_blocked
    return best


def allocate_priced(
    curves: Mapping[str, Sequence[Point[T]]], budget_bits: int, prices: Mapping[str, float]
) -> dict[str, Point[T]]:
    """As `allocate`, where a bit of some weights is dearer than one of others, and the ceiling is of plain bits.

    Args:
        curves, budget_bits: see `allocate`.
        prices: what a bit of each weight counts against its loss, such as 1 and how often it is read; above 0.

    Raises:
        BudgetError: see `allocate`.
    """
    best = allocate(curves, budget_bits)
    if len(set(prices.values())) < 2:
        return best
    priced = {
        name: [Point(round(point.bits * prices[name]), point.loss, point) for point in points]
        for name, points in curves.items()
    }
    low = sum(min(point.bits for point in points) for points in priced.values())
    high = sum(max(point.bits for point in points) for points in priced.values())
    found: dict[str, Point[T]] | None = None
    while low < high:
        middle = (low + high + 1) // 2
        picks = {name: point.choice for name, point in allocate(priced, middle).items()}
        fits = sum(point.bits for point in picks.values()) <= budget_bits
        if fits:
            found = picks
        low, high = (middle, high) if fits else (low, middle - 1)
    return best if found is None else found


def cheapest(curves: Mapping[str, Sequence[Point[T]]], loss_ceiling: float) -> dict[str, Point[T]]:
    """Chooses a point of every curve so that the summed loss stays within a ceiling and the bits are few.

    All hulls are walked by falling gain per bit until the loss is small enough; then steps that turn out to be
    unneeded are taken back, the largest first.

    Args:
        curves: the points of each weight; at least one each.
        loss_ceiling: of the summed loss.

    Raises:
        BudgetError: the best points together lose more; the message says how much.
    """
    hulls = {name: lower_hull(points) for name, points in curves.items()}
    least = sum(hull[-1].loss for hull in hulls.values())
    if least > loss_ceiling:
        raise BudgetError(f"The loss of {loss_ceiling:.4g} is below {least:.4g}, that of the widest formats.")
    chosen = dict.fromkeys(hulls, 0)
    loss = sum(hull[0].loss for hull in hulls.values())
    steps = [
        (-_slope(hull[index], hull[index + 1]), name, index + 1)
        for name, hull in hulls.items()
        for index in range(len(hull) - 1)
    ]
    taken = []
    for _, name, index in sorted(steps):  # a hull's slopes fall, so its steps come in order
        if loss <= loss_ceiling:
            break
        loss -= hulls[name][index - 1].loss - hulls[name][index].loss
        chosen[name] = index
        taken.append((hulls[name][index].bits - hulls[name][index - 1].bits, name, index))
    for _, name, index in sorted(taken, reverse=True):
        more = hulls[name][index - 1].loss - hulls[name][index].loss
        if chosen[name] == index and loss + more <= loss_ceiling:
            loss += more
            chosen[name] = index - 1
    return {name: hulls[name][index] for name, index in chosen.items()}


def _loss(picks: Mapping[str, Point[T]]) -> float:
    return sum(point.loss for point in picks.values())


def _walk(
    curves: Mapping[str, Sequence[Point[T]]], hulls: Mapping[str, list[Point[T]]], start: dict[str, int], budget: int
) -> tuple[dict[str, Point[T]], list[tuple[str, int]]]:
    """All hulls at once by falling gain per bit from `start` on; and the steps that did not fit, largest first.

    A weight whose step is too large stays where it is: what lies beyond has less gain and costs more.
    """
    chosen = dict(start)
    spent = sum(hulls[name][index].bits for name, index in chosen.items())
    steps = [
        (-_slope(hulls[name][index], hulls[name][index + 1]), name)
        for name, index in chosen.items()
        if index + 1 < len(hulls[name])
    ]
    heapq.heapify(steps)
    blocked: list[tuple[int, str, int]] = []
    while steps:
        _, name = heapq.heappop(steps)
        hull, index = hulls[name], chosen[name]
        extra = hull[index + 1].bits - hull[index].bits
        if spent + extra > budget:
            blocked.append((extra, name, index + 1))
            continue
        spent += extra
        chosen[name] = index + 1
        if index + 2 < len(hull):
            heapq.heappush(steps, (-_slope(hull[index + 1], hull[index + 2]), name))
    picks = {name: hulls[name][index] for name, index in chosen.items()}
    largest = [(name, index) for _, name, index in sorted(blocked, reverse=True)]
    return _spend_rest(curves, picks, budget - spent), largest


def _spend_rest(curves: Mapping[str, Sequence[Point[T]]], picks: dict[str, Point[T]], rest: int) -> dict[str, Point[T]]:
    """Single moves, off the hull too, that still fit, the greatest saving first."""
    while True:
        moves = [
            (picks[name].loss - point.loss, name, point)
            for name, points in curves.items()
            for point in points
            if point.loss < picks[name].loss and point.bits - picks[name].bits <= rest
        ]
        if not moves:
            return picks
        _, name, point = max(moves, key=lambda move: (move[0], move[1]))
        rest -= point.bits - picks[name].bits
        picks[name] = point
