from __future__ import annotations

import math

import numpy as np
import pytest

from onnxq.pipeline.scan import UnitCost


def test_the_factor_is_met_at_what_was_measured() -> None:
    cost = UnitCost((0.01, 0.1), (0.5, 20.0))
    assert cost.factor(0.01) == pytest.approx(50)
    assert cost.factor(0.1) == pytest.approx(200)


def test_between_it_goes_along_logarithms_and_beyond_it_stays() -> None:
    cost = UnitCost((0.01, 0.1), (0.5, 20.0))
    assert cost.factor(math.sqrt(0.01 * 0.1)) == pytest.approx(100)
    assert cost.factor(1e-6) == pytest.approx(50)
    assert cost.factor(10) == pytest.approx(200)


def test_one_width_gives_one_factor() -> None:
    cost = UnitCost((0.02,), (0.1,))
    np.testing.assert_allclose([cost.factor(error) for error in (0.001, 0.02, 1)], 5)
