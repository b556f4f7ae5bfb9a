"""Rounding to float8: to the nearest value, or with error feedback from input to input.

A scale says where the largest weights saturate, and where in an octave the weights that count most meet the steps of
the format. Saturation hardly ever pays, since steps follow magnitudes; the best place in the octave does: 0.6 dB of 512
Gaussian weights, and 1 dB of outputs where inputs differ much. Feedback gains 5 dB more on such inputs.

Sources: FP8-BERT (arXiv 2312.05725) for the largest magnitude as scale; `onnxq.solvers.factor` for the recursion.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import numpy as np

from onnxq.formats.float8 import Float8Encoding, Float8Format, Float8Kind, spread
from onnxq.formats.uniform import choose_gain
from onnxq.solvers.factor import Factor, Order, Recursion, factorise
from onnxq.solvers.grid import group_importance, into_groups, largest_magnitude, run_over_rows

Clip = Literal["amax", "mse"]
"""Where scales put the largest magnitude: on the largest value, or where the squared error is least."""

# Scales that are tried, in units of the one that puts the largest magnitude on the largest value: an octave below, in
# which the largest weights saturate, and the octave above, in which all phases of the grid occur without that.
_PHASES = 16
_FACTORS = tuple(2.0 ** (step / _PHASES) for step in range(-_PHASES, _PHASES))
# Elements of the rows that are solved together: about 40 bytes each, beside the K x K matrices.
_BLOCK_ELEMENTS = 1 << 22


@dataclasses.dataclass(frozen=True)
class Scales:
    """Of all groups of a weight.

    Attributes:
        scales: float16 [N, G], or [1, 1] where the format has one; positive.
        gain: power of two that multiplies every scale.
    """

    scales: np.ndarray
    gain: float


def float8_nearest(
    weight: np.ndarray,
    format: Float8Format,
    importance: np.ndarray | None = None,
    *,
    clip: Clip = "mse",
    scales: Scales | None = None,
) -> Float8Encoding:
    """Round a weight to the nearest values. This is also the solver of tables.

    Args:
        weight: float [N, K].
        format: kind and scales.
        importance: float [K], the diagonal of the inputs' second moment; None means equal.
        clip: see `Clip`.
        scales: found before; None searches them.

    Raises:
        ValueError: see `search_scales`.
    """
    if scales is None:
        scales = search_scales(weight, format, importance, clip=clip)
    found, (n, k) = scales, weight.shape
    codes = np.empty((n, k), np.uint8)

    def solve(rows: slice) -> None:
        values = weight[rows].astype(np.float32) / np.float32(found.gain)
        values /= spread(_of_rows(found.scales, rows), format, k)
        codes[rows] = format.kind.encode(values)

    run_over_rows(solve, n, k)
    return Float8Encoding(format, codes, found.scales, found.gain)


def float8_feedback(
    weight: np.ndarray,
    format: Float8Format,
    second_moment: np.ndarray | Factor,
    *,
    damping: float = 0.01,
    block_size: int = 32,
    order: Order = Order.ACTIVATION,
    clip: Clip = "mse",
) -> Float8Encoding:
    """Round a weight so that the output of its layer moves little: never more than with the nearest values.

    Scales are those of `float8_nearest` with the damped diagonal as importance, in either order. Rows where its
    rounding has the lower loss under the damped second moment keep it. Groups of zeros stay so.

    Memory: about 40 bytes for each of at most 2**22 elements at a time, the result, and `factorise`'s matrices.

    Args:
        weight: float [N, K].
        format: kind and scales.
        second_moment: float [K, K], the mean of x x^T over inputs x, whose scale does not matter; or its factor, which
            weights that read the same inputs may share, and which damping and order are part of.
        damping: share of the mean diagonal that is added to the diagonal.
        block_size: inputs that are rounded one by one between two matrix products. Changes the speed alone.
        order: in which order inputs are rounded.
        clip: see `Clip`.

    Raises:
        ValueError: a shape does not fit, a value is not finite, or an option is out of range.
        CalibrationError: see `factorise`.
    """
    if damping < 0 or block_size < 1:
        raise ValueError(f"{damping=} must not be negative, and {block_size=} must be 1 or more")
    largest_magnitude(weight)
    n, k = weight.shape
    factor = second_moment
    if not isinstance(factor, Factor):
        factor = factorise(factor, k, damping, order)
    found = search_scales(weight, format, np.diagonal(factor.moment), clip=clip)
    codes = np.empty((n, k), np.uint8)
    height = max(1, _BLOCK_ELEMENTS // k)
    for start in range(0, n, height):
        rows = slice(start, start + height)
        values = np.ascontiguousarray(weight[rows].T, np.float32) / np.float32(found.gain)
        used = into_groups(weight[rows], format, found.gain).any(axis=2)
        steps = spread(np.where(used, _of_rows(found.scales, rows), np.float32(0)), format, k).T
        codes[rows] = format.kind.encode(_feed_back(values, steps, format.kind, factor, block_size)).T
    return Float8Encoding(format, codes, found.scales, found.gain)


def _feed_back(values: np.ndarray, steps: np.ndarray, kind: Float8Kind, factor: Factor, block_size: int) -> np.ndarray:
    """Values of codes, float32 [K, R], for weights [K, R] and steps [K or 1, R] in units of the gain, 0 for none."""
    steps = np.broadcast_to(steps, values.shape)
    divisors = np.where(steps == 0, np.float32(math.inf), steps)
    recursion = Recursion(values[factor.visit], factor, block_size)
    fed = np.empty_like(values)

    def round_input(j: int, wanted: np.ndarray) -> np.ndarray:
        k = factor.visit[j]
        fed[k] = kind.round(wanted / divisors[k])
        error: np.ndarray = values[k] - fed[k] * steps[k]
        return error

    recursion.visit(0, len(values), round_input)
    near = kind.round(values / divisors)
    better = _losses(values - near * steps, factor) < _losses(values - fed * steps, factor)
    fed[:, better] = near[:, better]
    return fed


def _losses(errors: np.ndarray, factor: Factor) -> np.ndarray:
    """Proxy losses float32 [R] of errors [K, R]."""
    losses: np.ndarray = np.einsum("kr,kr->r", factor.moment @ errors, errors)
    return losses


def search_scales(
    weight: np.ndarray, format: Float8Format, importance: np.ndarray | None = None, *, clip: Clip = "mse"
) -> Scales:
    """Scales of a weight's groups.

    They are float16, and rounded up to it: on the scale of the largest magnitude nothing saturates. A group of zeros
    gets the scale 1. Float16 reaches down to 2**-34 of the largest scale; groups that would need a smaller one get that
    and lose precision.

    Args:
        weight: float [N, K].
        format: kind and scales.
        importance: float [K], not negative: what a squared error costs per input. None means equal.
        clip: "mse" leaves the scale of the largest magnitude only for one with a lower error.

    Raises:
        ValueError: a shape does not fit, a value is not finite, an importance is negative, or `clip` is unknown.
    """
    if clip not in get_args(Clip):
        raise ValueError(f"{clip=} must be one of {', '.join(get_args(Clip))}")
    largest, kind = largest_magnitude(weight), format.kind
    n, k = weight.shape
    shares = group_importance(importance, format, k)
    gain = choose_gain(np.asarray(largest / kind.largest))
    factors = [1.0]
    if clip == "mse":
        factors += [0.5] if format.powers_of_two else [factor for factor in _FACTORS if factor != 1]

    if format.one_scale:
        tried = [_stored(np.full((1, 1), factor * largest / gain / kind.largest), format) for factor in factors]
        losses = np.zeros((len(tried), n))

        def add_up(rows: slice) -> None:
            values = into_groups(weight[rows], format, gain)
            for index, scale in enumerate(tried):
                losses[index, rows] = _squared_error(values, scale, shares, kind)[:, 0]

        if len(tried) > 1:
            run_over_rows(add_up, n, k)
        return Scales(tried[int(losses.sum(axis=1).argmin())], gain)

    scales = np.empty((n, format.groups(k)), np.float16)

    def solve(rows: slice) -> None:
        values = into_groups(weight[rows], format, gain)
        reach = np.abs(values).max(axis=2) / np.float32(kind.largest)
        scales[rows] = best = _stored(reach, format)
        if len(factors) == 1:
            return
        least = _squared_error(values, best, shares, kind)
        for factor in factors[1:]:
            scale = _stored(reach * np.float32(factor), format)
            loss = _squared_error(values, scale, shares, kind)
            best = np.where(loss < least, scale, best)
            least = np.minimum(loss, least)
        scales[rows] = best

    run_over_rows(solve, n, k)
    return Scales(scales, gain)


def _stored(scales: np.ndarray, format: Float8Format) -> np.ndarray:
    """Scales, float of any shape, rounded up to what is stored, float16; 1 in place of 0."""
    if format.powers_of_two:
        mantissa, exponent = np.frexp(scales)
        scales = np.ldexp(np.sign(scales), exponent - (mantissa == 0.5))
    half = scales.astype(np.float16)
    half = np.where(half < scales, np.nextafter(half, np.float16(math.inf)), half)
    stored: np.ndarray = np.where(scales == 0, np.float16(1), half)
    return stored


def _of_rows(scales: np.ndarray, rows: slice) -> np.ndarray:
    """Those of some rows, float32."""
    part: np.ndarray = scales if len(scales) == 1 else scales[rows]
    return part.astype(np.float32)


def _squared_error(values: np.ndarray, scales: np.ndarray, shares: np.ndarray | None, kind: Float8Kind) -> np.ndarray:
    """Of nearest rounding: values float32 [R, G, S], scales [R, G] or [1, 1] and shares [G, S] to float32 [R, G]."""
    steps = scales.astype(np.float32)[..., None]
    errors = kind.round(values / steps)
    errors *= steps
    errors -= values
    weighted = errors if shares is None else errors * shares
    losses: np.ndarray = np.einsum("rgs,rgs->rg", weighted, errors)
    return losses
