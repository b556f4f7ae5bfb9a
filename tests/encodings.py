"""Random encodings for tests: every code, scale and zero point that a format allows can occur."""

from __future__ import annotations

import numpy as np

from onnxq.formats.codebook import CodebookEncoding, CodebookFormat
from onnxq.formats.framed import FramedEncoding, FramedFormat, frames_of
from onnxq.formats.packing import TILE_N, ceil_div
from onnxq.formats.uniform import UniformEncoding, UniformFormat, choose_gain, round_scales


def random_encoding(format: UniformFormat, n: int, k: int, seed: int = 0) -> UniformEncoding:
    """A uniform encoding of an [n, k] weight with random codes, scales and zero points."""
    rng = np.random.default_rng(seed)
    groups = format.groups(k)
    codes = rng.integers(0, format.levels, (n, k)).astype(np.uint8)
    scales = rng.uniform(0.005, 0.01, (n, groups))
    gain = choose_gain(scales)
    zeros = (
        np.full((1, 1), format.shared_zero())
        if format.zero_point.shared
        else rng.uniform(0, format.levels, (n, groups))
    )
    return UniformEncoding(format, codes, round_scales(scales, gain), format.quantize_zero(zeros), gain)


def random_codebook(format: CodebookFormat, n: int, k: int, seed: int = 0) -> CodebookEncoding:
    """A codebook encoding of an [n, k] weight with random codes, those of the padding rows included."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << format.bits, (ceil_div(n, TILE_N) * TILE_N, k)).astype(np.uint8)
    scales = rng.uniform(0.005, 0.01, (n, format.groups(k)))
    gain = choose_gain(scales)
    return CodebookEncoding(format, codes, round_scales(scales, gain), gain)


def random_framed(format: FramedFormat, n: int, k: int, seed: int = 0) -> FramedEncoding:
    """A framed encoding of an [n, k] weight with random coefficients."""
    make = random_codebook if isinstance(format.inner, CodebookFormat) else random_encoding
    inner = make(format.inner, *format.coefficients(n, k), seed)  # type: ignore[operator]
    return FramedEncoding(format, inner, *frames_of(format, n, k))


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest expected magnitude."""
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30))
