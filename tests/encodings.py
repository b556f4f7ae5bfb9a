"""Random encodings for tests: every code, scale and zero point that a format allows can occur."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxq.formats.codebook import CodebookEncoding, CodebookFormat
from onnxq.formats.framed import FramedEncoding, FramedFormat, frames_of
from onnxq.formats.mixed import DEEPEST, MixedEncoding, MixedFormat
from onnxq.formats.packing import BLOCK_K, TILE_N, ceil_div
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


def random_mixed(
    n: int, k: int, band: int = 64, seed: int = 0, depths: Sequence[int] = range(DEEPEST + 1)
) -> MixedEncoding:
    """A mixed encoding of an [n, k] weight: any order, any of `depths`, any codes, those of the padding included."""
    rng = np.random.default_rng(seed)
    bands, blocks = ceil_div(n, band), ceil_div(k, BLOCK_K)
    by_band = rng.choice(np.array(depths), (bands, blocks))
    format = MixedFormat.of(band, rng.permutation(k), by_band)
    depth = np.repeat(np.repeat(format.by_tile(n), TILE_N, axis=0), BLOCK_K, axis=1)
    codes = rng.integers(0, np.left_shift(1, depth, dtype=np.int64)).astype(np.uint8)
    columns = rng.integers(0, 256, (bands, blocks * BLOCK_K)).astype(np.uint8)
    scales = rng.uniform(0.005, 0.01, (n, 1))
    gain = choose_gain(scales)
    return MixedEncoding(format, codes, columns, round_scales(scales, gain)[:, 0], gain)


def random_framed(format: FramedFormat, n: int, k: int, seed: int = 0) -> FramedEncoding:
    """A framed encoding of an [n, k] weight with random coefficients."""
    make = random_codebook if isinstance(format.inner, CodebookFormat) else random_encoding
    inner = make(format.inner, *format.coefficients(n, k), seed)  # type: ignore[operator]
    return FramedEncoding(format, inner, *frames_of(format, n, k))


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest expected magnitude."""
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30))
