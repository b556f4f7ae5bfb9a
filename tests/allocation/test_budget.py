from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.allocation.budget import Point, allocate, allocate_priced, cheapest, lower_hull, parse_size
from onnxq.errors import BudgetError

CURVE = st.lists(st.tuples(st.integers(1, 50), st.floats(0, 10)), min_size=1, max_size=5).map(
    lambda pairs: [Point(bits, loss, index) for index, (bits, loss) in enumerate(pairs)]
)


@pytest.mark.parametrize(
    ("text", "size"),
    [("20MB", 20_000_000), ("20 MiB", 20 * 1024**2), ("1.5k", 1500), ("7", 7), ("2GB", 2 * 10**9), ("3b", 3)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "20 apples", "-3MB", "1..2k"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(BudgetError, match="is no size"):
        parse_size(text)


def test_hull_by_hand() -> None:
    points = [Point(bits, loss, None) for bits, loss in [(1, 10.0), (2, 9.0), (3, 2.0), (4, 2.5), (5, 1.0)]]
    assert [(p.bits, p.loss) for p in lower_hull(points)] == [(1, 10.0), (3, 2.0), (5, 1.0)]


def test_bits_go_where_they_save_most() -> None:
    curves = {
        "steep": [Point(1, 10.0, "a"), Point(2, 1.0, "b")],
        "flat": [Point(1, 10.0, "a"), Point(2, 9.0, "b")],
    }
    picks = allocate(curves, 3)
    assert (picks["steep"].choice, picks["flat"].choice) == ("b", "a")


def test_the_rest_is_spent() -> None:
    """(2, 5) is off the hull, but all that fits."""
    curves = {"w": [Point(1, 10.0, "a"), Point(2, 8.0, "b"), Point(4, 0.0, "c")]}
    assert allocate(curves, 3)["w"].choice == "b"


def test_a_large_step_is_taken_at_the_expense_of_small_ones() -> None:
    """The table's step saves less per bit than every small one, and more than all small ones behind it."""
    small = [Point(0, 10.0, 0), Point(1, 5.0, 1), Point(2, 4.9, 2)]
    curves = {"table": [Point(10, 30.0, 0), Point(20, 10.0, 1)], **{f"w{i}": small for i in range(10)}}
    picks = allocate(curves, 29)
    assert picks["table"].choice == 1
    assert sum(picks[f"w{i}"].choice for i in range(10)) == 9


def test_below_the_floor_the_floor_is_said() -> None:
    with pytest.raises(BudgetError, match=r"budget of 1 bytes.*floor of 2 bytes"):
        allocate({"a": [Point(8, 1.0, None)], "b": [Point(8, 1.0, None), Point(16, 0.0, None)]}, 8)


@given(st.lists(CURVE, min_size=1, max_size=3), st.integers(1, 160))
def test_the_budget_is_a_ceiling_and_the_loss_is_near_the_best(lists: list[list[Point]], budget: int) -> None:
    curves = {str(index): points for index, points in enumerate(lists)}
    floor = sum(min(point.bits for point in points) for points in lists)
    if floor > budget:
        with pytest.raises(BudgetError):
            allocate(curves, budget)
        return
    picks = allocate(curves, budget)
    loss = sum(point.loss for point in picks.values())
    assert sum(point.bits for point in picks.values()) <= budget
    best = min(
        sum(point.loss for point in choice)
        for choice in itertools.product(*lists)
        if sum(point.bits for point in choice) <= budget
    )
    # The Lagrangian misses the best by less than one step of one weight.
    largest_step = max(max(p.loss for p in points) - min(p.loss for p in points) for points in lists)
    assert loss <= best + largest_step + 1e-9


def test_the_cheapest_within_a_loss_by_hand() -> None:
    """The table's large step saves most per bit and is enough alone: what was taken before it goes back."""
    curves = {
        "small": [Point(1, 3.0, "a"), Point(2, 1.5, "b")],
        "table": [Point(10, 10.0, "a"), Point(20, 0.5, "b")],
    }
    picks = cheapest(curves, 4.0)
    assert (picks["small"].choice, picks["table"].choice) == ("a", "b")


# Whole losses: sums of them are exact in any order.
WHOLE = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 100)), min_size=1, max_size=5).map(
    lambda pairs: [Point(bits, float(loss), index) for index, (bits, loss) in enumerate(pairs)]
)


@given(st.dictionaries(st.sampled_from("abc"), WHOLE, min_size=1), st.integers(0, 300))
def test_the_cheapest_holds_its_ceiling_and_is_near_the_best(curves: dict[str, list[Point[int]]], room: int) -> None:
    least = sum(min(point.loss for point in points) for points in curves.values())
    ceiling = least + room
    picks = cheapest(curves, ceiling)
    assert sum(point.loss for point in picks.values()) <= ceiling
    spent = sum(point.bits for point in picks.values())
    best = min(
        sum(point.bits for point in choice)
        for choice in itertools.product(*curves.values())
        if sum(point.loss for point in choice) <= ceiling
    )
    # No more than one step of one hull too many.
    hulls = [lower_hull(points) for points in curves.values()]
    widest = max((b.bits - a.bits for hull in hulls for a, b in itertools.pairwise(hull)), default=0)
    assert best <= spent <= best + widest


def test_a_loss_below_the_least_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"below 1, that of the widest"):
        cheapest({"w": [Point(1, 2.0, None), Point(2, 1.0, None)]}, 0.5)


def test_dear_bits_are_spent_last() -> None:
    curves = {
        "dear": [Point(1, 10.0, "a"), Point(2, 4.0, "b"), Point(3, 1.0, "c")],
        "cheap": [Point(1, 10.0, "a"), Point(2, 5.0, "b"), Point(3, 2.0, "c")],
    }

    def choices(budget: int, price: float) -> dict[str, str]:
        picks = allocate_priced(curves, budget, {"dear": price, "cheap": 1.0})
        return {name: point.choice for name, point in picks.items()}

    assert choices(3, 1.0) == {"dear": "b", "cheap": "a"}
    assert choices(3, 8.0) == {"dear": "a", "cheap": "b"}
    assert choices(6, 8.0) == {"dear": "c", "cheap": "c"}
