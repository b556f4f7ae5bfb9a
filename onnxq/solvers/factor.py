"""The factor of a second moment that error feedback runs on, and the recursion itself.

With H = U D U^T the second moment of the inputs, U unit upper triangular and D diagonal, the proxy loss of a
row with error e is

    sum_j D[j] * (e[j] + sum_{i<j} e[i] U[i, j])**2

So input j is rounded from w[j] + sum_{i<j} e[i] U[i, j]. This is LDLQ, and the same as GPTQ, which writes it
with the inverse of H.

Sources: Frantar et al., GPTQ (arXiv 2210.17323); Chee et al., QuIP (arXiv 2307.13304), section 3.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable

import numpy as np

from onnxq.errors import CalibrationError

# Inputs that calibration never excited count as this share of a mean one, so that nothing divides by zero.
_LEAST_DIAGONAL = 1e-6
_STRONGEST_DAMPING = 10.0
_FACTOR_BLOCK = 256


class Order(enum.Enum):
    """In which order inputs are rounded. The layout of codes is always natural."""

    NATURAL = "natural"
    """As they lie. A group's grid is fitted when it is reached, to weights that carry the errors so far."""
    ACTIVATION = "activation"
    """Largest mean square first, while many can still make up for them. All grids are fitted before."""


@dataclasses.dataclass(frozen=True)
class Factor:
    """A damped second moment H = U D U^T, brought to a mean diagonal of about 1.

    Attributes:
        moment: damped H, float32 [K, K] in natural order.
        upper: U, float32 [K, K] in visiting order, of which only what lies above the diagonal counts.
        conditional: D, float64 [K] in visiting order.
        visit: the visiting order, int [K].
    """

    moment: np.ndarray
    upper: np.ndarray
    conditional: np.ndarray
    visit: np.ndarray

    def importance(self) -> np.ndarray:
        """D in natural order, float64 [K]: what an error costs that no input behind makes up for."""
        importance = np.empty_like(self.conditional)
        importance[self.visit] = self.conditional
        return importance


def factorise(second_moment: np.ndarray, k: int, damping: float, order: Order) -> Factor:
    """Damp, order and factor the second moment of K inputs.

    Memory: beside the second moment one K x K matrix in float64 and two in float32.

    Raises:
        ValueError: it is not [K, K], or holds infinities or NaNs.
        CalibrationError: it stays indefinite however it is damped.
    """
    if second_moment.shape != (k, k):
        raise ValueError(f"the second moment must be [K, K] = [{k}, {k}], not {list(second_moment.shape)}")
    if not (math.isfinite(second_moment.max()) and math.isfinite(second_moment.min())):
        raise ValueError("the second moment holds infinities or NaNs")
    diagonal = np.diagonal(second_moment).astype(np.float64)
    mean = float(diagonal.mean())
    if mean <= 0:
        # Nothing ever reached this layer: every error costs the same.
        mean, diagonal, second_moment = 1.0, np.ones_like(diagonal), np.diag(np.ones_like(diagonal))
    natural = np.arange(len(diagonal))
    visit = np.argsort(-diagonal, kind="stable") if order is Order.ACTIVATION else natural
    while True:
        moment = (second_moment / mean).astype(np.float32)
        moment[natural, natural] = np.maximum(diagonal / mean, _LEAST_DIAGONAL) + damping
        try:
            factor = moment[np.ix_(visit, visit)].astype(np.float64)
            factorise_upper(factor)
            break
        except np.linalg.LinAlgError:
            damping = max(10 * damping, 1e-4)
        if damping > _STRONGEST_DAMPING:
            size = len(diagonal)
            raise CalibrationError(
                f"the second moment of the inputs, [{size}, {size}], is not positive definite even with "
                f"{_STRONGEST_DAMPING:g} times its mean diagonal added. It has to be the mean of x x^T over "
                "inputs x: gather the statistics again."
            )
    roots = np.diagonal(factor).copy()
    factor /= roots
    return Factor(moment, factor.astype(np.float32), roots**2, visit)


def factorise_upper(matrix: np.ndarray) -> None:
    """Replace the upper triangle of a positive definite H by that of M, where H = M M^T.

    A blocked Cholesky factorisation from the last row up, in place since K x K may be large. What lies below
    the diagonal afterwards means nothing.

    Raises:
        numpy.linalg.LinAlgError: H is not positive definite.
    """
    for stop in range(len(matrix), 0, -_FACTOR_BLOCK):
        start = max(0, stop - _FACTOR_BLOCK)
        corner = np.linalg.cholesky(matrix[start:stop, start:stop][::-1, ::-1])[::-1, ::-1]
        matrix[start:stop, start:stop] = corner
        panel = np.linalg.solve(corner, matrix[:start, start:stop].T)
        matrix[:start, start:stop] = panel.T
        for above in range(0, start, _FACTOR_BLOCK):
            below = min(above + _FACTOR_BLOCK, start)
            matrix[above:below, above:start] -= panel[:, above:below].T @ panel[:, above:]


def expected_costs(factor: Factor, second_moment: np.ndarray) -> np.ndarray:
    """What independent rounding errors cost on other inputs than those that the factor was found on.

    Error feedback with U turns rounding errors d into errors e = d U^-1 of the weight, whose loss under the moment H'
    is the sum over j of d[j]**2 (U^-1 H' U^-T)[j, j]. On the factor's own moment that is D; on another it is more, by
    much where inputs were few.

    Args:
        factor: from some inputs.
        second_moment: of other inputs, float [K, K].

    Returns:
        float64 [K] in natural order, in units of the other moment's mean diagonal.
    """
    order = factor.visit
    upper = np.triu(factor.upper.astype(np.float64), 1)
    np.fill_diagonal(upper, 1)
    inverse = np.linalg.inv(upper)
    moment = second_moment[np.ix_(order, order)].astype(np.float64)
    costs = np.empty(len(order))
    costs[order] = np.einsum("jk,jk->j", inverse @ moment, inverse)
    mean = float(np.diagonal(second_moment).mean(dtype=np.float64))
    scaled: np.ndarray = costs / mean if mean > 0 else np.ones_like(costs)
    return scaled


class Recursion:
    """Some rows on their way through the inputs. Arrays are [K, R] in visiting order.

    Attributes:
        wanted: for the inputs still to come, the weights that would make up for the errors so far.
        errors: weight less what it became, of the inputs that are done.
    """

    def __init__(self, values: np.ndarray, factor: Factor, leaf: int) -> None:
        """Start with values float32 [K, R] in visiting order; `leaf` inputs go one by one between two products."""
        self.wanted = values
        self.errors = np.zeros_like(values)
        self._upper = factor.upper
        self._leaf = leaf

    def visit(self, start: int, stop: int, round_input: Callable[[int, np.ndarray], np.ndarray]) -> None:
        """Round the inputs start..stop in turn.

        Args:
            start: first input, counted in visiting order.
            stop: one behind the last.
            round_input: from an input and what is wanted of it, float32 [R], to the error that is left, [R].
        """
        if stop - start > self._leaf:
            middle = start + (stop - start) // 2
            self.visit(start, middle, round_input)
            self.pass_on(start, middle, stop)
            self.visit(middle, stop, round_input)
            return
        for j in range(start, stop):
            wanted = self.wanted[j]
            if j > start:
                wanted = wanted + self._upper[start:j, j] @ self.errors[start:j]
            self.errors[j] = round_input(j, wanted)

    def pass_on(self, start: int, middle: int, stop: int) -> None:
        """Let the inputs middle..stop know of the errors of start..middle."""
        self.wanted[middle:stop] += self._upper[start:middle, middle:stop].T @ self.errors[start:middle]
