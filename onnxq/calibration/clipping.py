"""Eight-bit grids for activations, and where to clip a tensor so that it fits one.

    float8 (e4m3fn, e5m2)  y = scale * value(round(x / scale)),  scale = clip / largest of the kind
    uint8                  y = scale * (q - zero_point),  q = round(x / scale) + zero_point in [0, 255]
    int8                   y = scale * q,  q = round(x / scale) in [-128, 127],  scale = clip / 127

Divisions and products are in float32, rounding is to nearest, ties to even, and what lies outside saturates: bit for
bit what ONNX Runtime's QuantizeLinear and DequantizeLinear compute. A clip is a magnitude c: all of x in [-c, c] fits.
The range of uint8 reaches no further than the data, and always holds zero: padding and ReLU stay exact.

Sources: percentile, mean-square and KL clipping as in Wu et al., "Integer quantization for deep learning inference"
(arXiv 2004.09602), and Migacz, "8-bit inference with TensorRT" (GTC 2017).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from onnxq.calibration.ranges import RangeStatistics, bin_edges
from onnxq.formats.float8 import Float8Kind

Kind = Literal["e4m3fn", "e5m2", "uint8", "int8"]
Method = Literal["amax", "percentile", "mse", "entropy"]

METHODS: tuple[Method, ...] = ("amax", "percentile", "mse", "entropy")
FLOAT8: dict[str, Float8Kind] = {kind.value: kind for kind in (Float8Kind.E4M3FN, Float8Kind.E5M2)}
INTEGERS = {"uint8": (0, 255), "int8": (-128, 127)}
KINDS: tuple[Kind, ...] = ("e4m3fn", "e5m2", "uint8", "int8")

_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
_POINTS = 8  # of a bin, where its error is measured
_CLIPS_PER_OCTAVE, _CLIP_OCTAVES = 16, 8
_KL_BINS, _KL_LEVELS, _KL_STRIDE = 2048, 128, 16


def largest(kind: Kind) -> float:
    """What x / scale is at the clip of a symmetric grid."""
    return FLOAT8[kind].largest if kind in FLOAT8 else 127.0


@dataclasses.dataclass(frozen=True)
class ActivationScale:
    """How one tensor is rounded.

    Attributes:
        kind: the grid.
        scale: a float32, normal and above zero.
        zero_point: of uint8 and int8; None for float8.
    """

    kind: Kind
    scale: float
    zero_point: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind '{self.kind}' is none of {', '.join(KINDS)}")
        if not _SMALLEST_SCALE <= self.scale < np.inf or float(np.float32(self.scale)) != self.scale:
            raise ValueError(f"a scale must be a normal float32 above zero, not {self.scale}")
        if (self.zero_point is None) != (self.kind in FLOAT8):
            raise ValueError(
                f"zero point {self.zero_point} does not go with {self.kind}: integers have one, float8 none"
            )
        if self.zero_point is not None:
            low, high = INTEGERS[self.kind]
            if not low <= self.zero_point <= high:
                raise ValueError(f"zero point {self.zero_point} is no {self.kind}")


def choose_clip(
    statistics: RangeStatistics,
    kind: Kind,
    method: Method = "amax",
    *,
    percentile: float = 99.99,
    powers_of_two: bool = False,
) -> ActivationScale:
    """The scale of a tensor.

    Args:
        statistics: what the tensor holds. All zeros give scale 1.
        kind: the grid.
        method: "amax": nothing is clipped. "percentile": the magnitude that `percentile` percent of all values stay
            within. "mse": the clip of least expected squared error, among 16 an octave down to 1/256 of the largest
            magnitude. "entropy": the clip of least KL divergence between the values' histogram and what 128 equal
            steps leave of it, as TensorRT has it, on the sampled rows; integers only.
        percentile: above 0 up to 100.
        powers_of_two: scales are rounded up to one.

    Raises:
        ValueError: an unknown method, or entropy for a float8 grid.
    """
    if method not in METHODS:
        raise ValueError(f"method '{method}' is none of {', '.join(METHODS)}")
    if method == "entropy" and kind in FLOAT8:
        raise ValueError(
            "entropy weighs which steps of an even grid a range is worth; float8 steps follow the values, so it has "
            "nothing to weigh. Use amax, percentile or mse."
        )
    amax = statistics.largest
    if amax == 0.0:
        return ActivationScale(kind, 1.0, None if kind in FLOAT8 else 0)
    clips = [amax]
    if method == "percentile":
        clips = [_magnitude_at(statistics, percentile)]
    elif method == "entropy":
        clips = [min(amax, _entropy_clip(statistics))]
    elif method == "mse":
        clips = [amax * 2.0 ** (-i / _CLIPS_PER_OCTAVE) for i in range(_CLIPS_PER_OCTAVE * _CLIP_OCTAVES + 1)]
    scales = dict.fromkeys(_scale(statistics, kind, clip, powers_of_two) for clip in clips)
    if len(scales) == 1:
        return next(iter(scales))
    points = _points(statistics)
    return min(scales, key=lambda scale: _mean_error(*points, scale))


def round_with(x: np.ndarray, scale: ActivationScale) -> np.ndarray:
    """Values on the grid, float32; NaN stays NaN for float8."""
    x, step = np.asarray(x, np.float32), np.float32(scale.scale)
    with np.errstate(over="ignore"):
        ratio = x / step
    if scale.zero_point is None:
        return np.asarray(FLOAT8[scale.kind].round(ratio) * step)
    low, high = INTEGERS[scale.kind]
    codes = np.clip(np.rint(ratio) + np.float32(scale.zero_point), low, high)
    rounded: np.ndarray = (codes - np.float32(scale.zero_point)) * step
    return rounded


def round_tokens(x: np.ndarray, kind: Kind) -> np.ndarray:
    """Float8 values of x [..., K], a scale for each row: its largest magnitude over the kind's, 1 where that is 0.

    Raises:
        ValueError: an integer kind.
    """
    if kind not in FLOAT8:
        raise ValueError(f"rows are rounded to float8, not {kind}")
    x = np.asarray(x, np.float32)
    steps = np.max(np.abs(x), axis=-1, keepdims=True, initial=0) / np.float32(largest(kind))
    steps = np.where(steps == 0, np.float32(1), steps)
    rounded: np.ndarray = FLOAT8[kind].round(x / steps) * steps
    return rounded


def expected_error(statistics: RangeStatistics, scale: ActivationScale) -> float:
    """Mean squared rounding error of the values, by their histogram."""
    return _mean_error(*_points(statistics), scale)


def expected_token_error(statistics: RangeStatistics, kind: Kind) -> float:
    """Mean squared error of `round_tokens`: the sampled rows' relative error, times the mean square of all."""
    rows = statistics.rows.astype(np.float64)
    energy = float(np.sum(rows**2))
    if energy == 0.0:
        return 0.0
    return float(np.sum((round_tokens(statistics.rows, kind) - rows) ** 2)) / energy * statistics.mean_square


def _scale(statistics: RangeStatistics, kind: Kind, clip: float, powers_of_two: bool) -> ActivationScale:
    low, high = max(min(statistics.minimum, 0.0), -clip), min(max(statistics.maximum, 0.0), clip)
    step = (high - low) / 255 if kind == "uint8" else max(high, -low) / largest(kind)
    if powers_of_two:
        mantissa, exponent = np.frexp(step)
        step = float(np.ldexp(1.0, int(exponent) - (mantissa == 0.5)))
    step = max(float(np.float32(step)), _SMALLEST_SCALE)
    if kind in FLOAT8:
        return ActivationScale(kind, step)
    return ActivationScale(kind, step, int(np.clip(np.rint(-low / step), 0, 255)) if kind == "uint8" else 0)


def _points(statistics: RangeStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Values float32 [P] and weights float64 [P] that stand for the histogram; the weights of all values sum to 1."""
    edges = bin_edges()
    offsets = (np.arange(_POINTS) + 0.5) / _POINTS
    values, weights = [np.zeros(1)], [np.array([statistics.zeros], np.float64)]
    for counts, sign, bound in (
        (statistics.positive, 1.0, statistics.maximum),
        (statistics.negative, -1.0, -statistics.minimum),
    ):
        (filled,) = np.nonzero(counts)
        if not filled.size:
            continue
        low, high = edges[filled], edges[filled + 1]
        # The outermost bin ends where the data does, inside it or, for the bin that takes all beyond, behind it.
        low[-1], high[-1] = min(low[-1], bound), bound
        inside = low[:, None] + (high - low)[:, None] * offsets
        values.append(sign * inside.ravel())
        weights.append(np.repeat(counts[filled] / _POINTS, _POINTS))
    total = max(statistics.elements, 1)
    return np.concatenate(values).astype(np.float32), np.concatenate(weights) / total


def _mean_error(values: np.ndarray, weights: np.ndarray, scale: ActivationScale) -> float:
    errors = round_with(values, scale).astype(np.float64) - values
    return float(weights @ errors**2)


def _magnitude_at(statistics: RangeStatistics, percentile: float) -> float:
    """The magnitude that a percentage of all values stay within."""
    if not 0 < percentile <= 100:
        raise ValueError(f"a percentile is above 0 and at most 100, not {percentile}")
    counts = statistics.negative + statistics.positive
    within = statistics.zeros + np.cumsum(counts)
    target = float(within[-1] * (percentile / 100))
    place = int(np.searchsorted(within, target))
    if not counts[place]:  # so many values are exactly zero: where the others begin
        place = int(np.flatnonzero(counts)[0])
        target = float(within[place] - counts[place])
    edges = bin_edges()
    low, high = float(edges[place]), float(edges[place + 1])
    if not counts[place + 1 :].any():  # the outermost bin ends where the data does
        low, high = min(low, statistics.largest), statistics.largest
    return low + (1 - (float(within[place]) - target) / float(counts[place])) * (high - low)


def _entropy_clip(statistics: RangeStatistics) -> float:
    """The clip of least KL divergence, on the magnitudes of the sampled rows."""
    width = statistics.largest / _KL_BINS
    magnitudes = np.abs(statistics.rows[statistics.rows != 0]).astype(np.float64)
    counts = np.bincount(np.minimum((magnitudes / width).astype(np.int64), _KL_BINS - 1), minlength=_KL_BINS)
    best, clip = np.inf, statistics.largest
    for bins in range(_KL_LEVELS, _KL_BINS + 1, _KL_STRIDE):
        found = _divergence(counts, bins)
        if found < best:
            best, clip = found, bins * width
    return clip


def _divergence(counts: np.ndarray, bins: int) -> float:
    """KL divergence of the first bins, with all beyond in the last, from what the levels leave of them."""
    inside = counts[:bins].astype(np.float64)
    if not inside.any():
        return float(np.inf)
    level = np.arange(bins) * _KL_LEVELS // bins
    held = inside > 0
    per_level = np.bincount(level, inside) / np.maximum(np.bincount(level, held), 1)
    left = np.where(held, per_level[level], 0.0)
    inside[-1] += counts[bins:].sum()
    # Where only what was clipped stands, the levels have nothing: TensorRT's smoothing is a small constant.
    p, q = inside / inside.sum(), np.maximum(left / left.sum(), 1e-12)
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / q[some])))
