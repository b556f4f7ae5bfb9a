from __future__ import annotations

import math

import numpy as np
import pytest

from onnxq.solvers.loss import relative_error, relative_proxy_loss
from tests.solvers.cases import gaussian


def test_a_loss_by_hand() -> None:
    """d = (1, -1) cancels under inputs that are always equal, and counts double under inputs that oppose."""
    weight, moved = np.array([[3.0, 4.0]], np.float32), np.array([[2.0, 5.0]], np.float32)
    assert relative_error(weight, moved) == pytest.approx(2 / 25)
    equal = np.ones((2, 2), np.float32)
    assert relative_proxy_loss(weight, moved, equal) == 0
    opposed = np.array([[1, -1], [-1, 1]], np.float32)
    assert relative_proxy_loss(weight, moved, opposed) == pytest.approx(4 / 1)


def test_the_proxy_is_the_change_of_the_output() -> None:
    inputs, weight, moved = gaussian(200, 24), gaussian(7, 24, 1), gaussian(7, 24, 2)
    second_moment = inputs.T @ inputs / len(inputs)
    expected = np.mean((inputs @ (weight - moved).T) ** 2) / np.mean((inputs @ weight.T) ** 2)
    assert relative_proxy_loss(weight, moved, second_moment) == pytest.approx(expected, rel=1e-4)


def test_nothing_of_nothing_is_nothing() -> None:
    zeros, ones = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    assert relative_error(zeros, zeros) == 0
    assert relative_error(zeros, ones) == math.inf
