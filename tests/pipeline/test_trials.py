"""What a few solved weights say of the curves of their kind."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from onnxq.allocation.budget import Point
from onnxq.calibration import InputStatistics
from onnxq.graph import find_weights, load
from onnxq.pipeline import trials
from onnxq.pipeline.plan import Planned, make_plan
from onnxq.pipeline.solve import encode
from onnxq.pipeline.trials import Trials, kind_of, picked
from onnxq.recipe import FrameSpec, GridSpec, LinearPlan, Recipe, Rule
from onnxq.sensitivity import Sensitivities, WeightSensitivity
from tests.graph import models
from tests.pipeline.test_framequant import WEIGHTS, block

N = K = 128


@pytest.fixture
def planned(tmp_path) -> dict[str, Planned]:
    found = find_weights(load(models.save(block(), tmp_path / "model.onnx")).model)
    framed = LinearPlan(GridSpec(2, "column"), FrameSpec())
    chosen = Recipe("r", alternatives=(framed,), rules=(Rule("v.weight", grid=GridSpec(4)),), min_elements=64)
    plan = make_plan(found, chosen, calibrated=True)
    return {item.weight.name.removesuffix(".weight"): item for item in plan.planned}


def sensitivities(reached: int = 1, scale: float = 1.0) -> Sensitivities:
    weights = {
        f"{name}.weight": WeightSensitivity(
            np.full((1, k), scale, np.float32), np.full(n, scale, np.float32), np.zeros(n, int), reached
        )
        for name, (k, n) in WEIGHTS.items()
    }
    return Sensitivities(weights, "output", ("y",), 1, 1, 1, (), 0.0)


def statistics(moment: np.ndarray) -> InputStatistics:
    diagonal = np.diagonal(moment).copy()
    return InputStatistics(100, moment, diagonal, np.zeros_like(diagonal), np.sqrt(diagonal))


def identity() -> InputStatistics:
    return statistics(np.eye(K, dtype=np.float32))


def solved_loss(item: Planned, moments: InputStatistics) -> float:
    """Of the weight at four bits, under the identity."""
    weight = item.weight.matrix()
    errors = [weight - encode(weight, format, item.solver, moments).dequantize() for format in item.formats]
    return min(float(np.square(error, dtype=np.float64).sum()) for error in errors)


def test_the_picked_are_spread_over_those_that_count(planned: dict[str, Planned], monkeypatch) -> None:
    items = list(planned.values())
    monkeypatch.setattr(trials, "MOST", 3)
    assert picked(items, sensitivities()) == {items[0].weight.name, items[-1].weight.name, items[2].weight.name}
    assert picked(items, sensitivities(reached=0)) == frozenset()
    assert picked(items, None) == frozenset()
    nearest = [dataclasses.replace(item, solver=dataclasses.replace(item.solver, name="nearest")) for item in items]
    assert picked(nearest, sensitivities()) == frozenset()


@pytest.mark.parametrize("share", [1.0, 1.25])
def test_a_curve_is_corrected_by_what_came_over_what_was_expected(planned: dict[str, Planned], share: float) -> None:
    item, moments = planned["q"], identity()
    found = Trials(sensitivities())
    (uniform, framed) = item.options
    cost = item.cost_bits
    curve = [
        Point(cost, solved_loss(uniform, moments) / share, uniform),
        Point(framed.cost_bits, 7.0, dataclasses.replace(framed, solver=item.solver)),
    ]
    found.add(item, curve[:1], (moments, None))
    assert found.corrections == {kind_of(uniform): pytest.approx(share, rel=1e-5)}
    first, second = found.corrected(curve)
    assert first.loss == pytest.approx(share * curve[0].loss, rel=1e-5)
    assert second.loss == 7.0  # of a kind that was not tried
    assert kind_of(framed) != kind_of(uniform)


def test_errors_count_as_they_cancel_on_the_other_half_of_the_data(planned: dict[str, Planned]) -> None:
    """Errors that are the same at all inputs, on inputs that are all alike: K times what independent ones would do."""
    error = np.ones((4, K))
    alike, apart = statistics(np.ones((K, K), np.float32)), identity()
    rows = np.ones(4, np.float32)
    assert trials._share(error, rows, apart, None) == pytest.approx(1)
    assert trials._share(error, rows, alike, None) == pytest.approx(K)
    assert trials._share(error, rows, apart, alike) == pytest.approx((3 * K + 1) / 4)


def test_the_kind_that_did_best_keeps_what_it_expects(planned: dict[str, Planned]) -> None:
    item, moments = planned["q"], identity()
    uniform, framed = item.options
    found = Trials(sensitivities())
    curve = [
        Point(uniform.cost_bits, solved_loss(uniform, moments) / 0.5, uniform),
        Point(framed.cost_bits, solved_loss(framed, moments) / 0.6, framed),
    ]
    found.add(item, curve, (moments, None))
    assert found.corrections == {kind_of(uniform): pytest.approx(1.0), kind_of(framed): pytest.approx(1.2, rel=1e-4)}


def test_no_trial_raises_a_kind_by_more_than_half(planned: dict[str, Planned]) -> None:
    item, moments = planned["q"], identity()
    found = Trials(sensitivities())
    found.add(item, [Point(item.cost_bits, 1e-6, item.options[0])], (moments, None))
    assert found.corrections == {kind_of(item): pytest.approx(1.5)}


def test_without_whole_second_moments_nothing_is_tried(planned: dict[str, Planned]) -> None:
    found = Trials(sensitivities())
    plain = dataclasses.replace(identity(), second_moment=None)
    for moments in ((None, None), (plain, None)):
        found.add(planned["q"], [Point(1, 1.0, planned["q"])], moments)
    assert found.corrections == {}
