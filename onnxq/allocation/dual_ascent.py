"""CVXQ's allocation: bit depths by the high-rate law, a multiplier found by dual ascent in the log domain.

For independent errors the change of the outputs is, at high rates, sum_n P_n G_n**2 S_n**2 2**(-2 B_n) over groups of
P_n weights with gradient variance G_n**2 and weight variance S_n**2. Under a mean of R bits the best real depths are

    B_n = clamp((log2 G_n**2 + log2 S_n**2 - lambda) / 2, 0, 8)      lambda = log2 V / (2 ln 2), V the multiplier

Sources: Young, CVXQ (arXiv 2409.02026) and Radio (arXiv 2505.03031), section 3.1 and algorithm 1. The paper prints
V <- V + 2 (mean - R), which is many steps from settling where multipliers are as small as here. Followed is the
authors' code, which adds 1.9 (mean - R) to lambda: since dB/dlambda = -1/2 for every group between the clamps, a step
of 2 is Newton's. The mean is that of rounded depths, so that the rate that is spent is the one that is aimed at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DEEPEST = 8
STEPS = 10
_GAIN = 1.9
_BISECTIONS = 50


@dataclass(frozen=True, eq=False)
class Ascent:
    """Where dual ascent has come to.

    Attributes:
        depths: uint8 [groups], rounded.
        multiplier: lambda, to start the next ascent from.
        rate: mean depth over all weights, in bits.
    """

    depths: np.ndarray
    multiplier: float
    rate: float


def dual_ascent(
    gradients: np.ndarray,
    variances: np.ndarray,
    sizes: np.ndarray,
    rate: float,
    *,
    multiplier: float | None = None,
    steps: int = STEPS,
) -> Ascent:
    """Depths whose mean is near a target rate. It is no ceiling: the last step may be a few thousandths above.

    Args:
        gradients: float [groups], G**2. A group of 0 gets depth 0.
        variances: float [groups], S**2. As before.
        sizes: int [groups], weights in each group.
        rate: mean bits that are aimed at, 0 to 8.
        multiplier: lambda to start from, that of the ascent before. None starts where real depths meet the rate; the
            paper's log2 1e-6 (its code: -30) depends on the unit of its gradients.
        steps: of ascent. As in the code, the first only works out the depths.

    Raises:
        ValueError: shapes differ, the rate can't be had, or a number is negative or not finite.
    """
    if not gradients.shape == variances.shape == sizes.shape == (gradients.size,) or not gradients.size:
        raise ValueError(f"one number for each group, not {gradients.shape}, {variances.shape} and {sizes.shape}")
    if not 0 <= rate <= DEEPEST:
        raise ValueError(f"a rate is 0 to {DEEPEST} bits, not {rate}")
    for name, numbers in (("gradients", gradients), ("variances", variances)):
        if not np.isfinite(numbers).all() or numbers.min() < 0:
            raise ValueError(f"the {name} hold numbers that are negative or not finite")
    with np.errstate(divide="ignore"):  # log2 0 is -inf, which is depth 0
        logs = np.log2(gradients.astype(np.float64)) + np.log2(variances.astype(np.float64))
    if multiplier is None:
        multiplier = _start(logs, sizes, rate)
    spent = rate
    for _ in range(max(steps, 1)):
        multiplier += _GAIN * (spent - rate)
        depths = np.rint(_law(logs, multiplier))
        spent = float(depths @ sizes / sizes.sum())
    return Ascent(depths.astype(np.uint8), multiplier, spent)


def _law(logs: np.ndarray, multiplier: float) -> np.ndarray:
    """Real depths for log2 (G**2 S**2)."""
    depths: np.ndarray = np.clip(0.5 * (logs - multiplier), 0, DEEPEST)
    return depths


def _start(logs: np.ndarray, sizes: np.ndarray, rate: float) -> float:
    """The multiplier for which real depths have a mean of the rate, by bisection."""
    finite = logs[np.isfinite(logs)]
    if not finite.size:
        return 0.0
    low, high = float(finite.min()) - 2 * DEEPEST, float(finite.max())
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _law(logs, middle) @ sizes > rate * sizes.sum() else (low, middle)
    return high
