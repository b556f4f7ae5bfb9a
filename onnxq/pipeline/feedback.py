"""What errors at each input will cost once error feedback has done its work, for the curves of an allocation.

Second moments fit the data that they come from: with few tokens for each input, feedback gains less on other data than
on its own, and layers differ in how much less. So the factor of one half of the data is tried on the other half. In
the linear model of the excess, cost(T) = limit * (1 -+ a / T) on own and on other data of T tokens, what all T tokens
give on others is (3 out(T/2) + in(T/2)) / 4.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from onnxq.calibration import InputStatistics
from onnxq.frames import Frame
from onnxq.recipe import SolverSpec
from onnxq.solvers.factor import Order, expected_costs, factorise


@dataclasses.dataclass(frozen=True, eq=False)
class InputCosts:
    """What squared errors at the inputs cost, in units of the mean square of an input; both float64 [K].

    Attributes:
        plain: of errors that stay where they are: the inputs' mean squares.
        fed_back: of errors that later inputs make up for.
    """

    plain: np.ndarray
    fed_back: np.ndarray

    def gain(self, squares: np.ndarray) -> float:
        """By how much feedback lowers the loss of errors with these mean squares, [K]; 1 at least."""
        after = float(squares @ self.fed_back)
        return max(float(squares @ self.plain) / after, 1.0) if after > 0 else 1.0


def input_costs(
    first: InputStatistics, second: InputStatistics | None, spec: SolverSpec, frame: Frame | None = None
) -> InputCosts:
    """The costs from two halves of the data, or of one as far as it goes.

    Memory: three matrices [K', K'] in float64.

    Args:
        first, second: of the same inputs. Without second moments nothing is fed back.
        spec: damping and order of the feedback.
        frame: what the weight is rounded in; costs are then those of coefficients.
    """
    if first.second_moment is None or spec.name == "nearest":
        both = first if second is None else first.merge(second)
        plain = _scaled(both.diagonal.astype(np.float64))
        return InputCosts(plain, plain)
    moment = _moment(first, frame)
    k = len(moment)
    factor = factorise(moment, k, spec.damping, Order(spec.order))
    own, diagonal = factor.importance(), np.diagonal(moment).astype(np.float64)
    if second is None or second.count == 0:
        return InputCosts(_scaled(diagonal), own)
    other = _moment(second, frame)
    plain = _scaled(diagonal * first.count + np.diagonal(other) * second.count)
    return InputCosts(plain, (3 * expected_costs(factor, other) + own) / 4)


def _moment(statistics: InputStatistics, frame: Frame | None) -> np.ndarray:
    assert statistics.second_moment is not None
    return statistics.second_moment if frame is None else frame.carry(statistics.second_moment)


def _scaled(diagonal: np.ndarray) -> np.ndarray:
    mean = float(diagonal.mean())
    scaled: np.ndarray = diagonal / mean if mean > 0 else np.ones_like(diagonal)
    return scaled
