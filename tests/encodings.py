"""Random encodings for tests: every code, scale and zero point that a format allows can occur."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxq.formats.binary import BinaryEncoding, BinaryFormat
from onnxq.formats.codebook import CodebookEncoding, CodebookFormat
from onnxq.formats.float8 import Float8Encoding, Float8Format
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


def random_float8(format: Float8Format, n: int, k: int, seed: int = 0) -> Float8Encoding:
    """A float8 encoding of an [n, k] weight with any codes but those of infinity and NaN."""
    rng = np.random.default_rng(seed)
    largest = int(format.kind.encode(np.array([format.kind.largest]))[0])
    codes = rng.integers(0, largest + 1, (n, k)).astype(np.uint8)
    codes[(rng.random((n, k)) < 0.5) & (codes > 0)] += 128
    scales = rng.uniform(1e-4, 2e-4, format.scale_shape(n, k))
    if format.powers_of_two:
        scales = np.exp2(rng.integers(-14, -10, scales.shape))
    gain = choose_gain(scales)
    return Float8Encoding(format, codes, round_scales(scales, gain), gain)


def random_binary(
    planes: Sequence[int] | np.ndarray,
    k: int,
    group_size: int | None = None,
    *,
    offset: bool = False,
    seed: int = 0,
    gain: float = 0.5,
) -> BinaryEncoding:
    """A binary encoding of [N, k] with these planes of its rows: any signs, scales and offsets."""
    rng = np.random.default_rng(seed)
    by_row = np.array(planes)
    format, order = BinaryFormat.by_row(by_row, group_size, offset=offset)
    stored = -np.sort(-by_row)
    n, groups = len(by_row), format.groups(k)
    codes = rng.integers(0, 1 << stored[:, None], (n, k)).astype(np.uint8)
    present = np.arange(stored[0])[:, None, None] < stored[:, None]
    scales = (rng.uniform(0.1, 1, (stored[0], n, groups)) * present).astype(np.float16)
    offsets = rng.uniform(-1, 1, (n, groups)).astype(np.float16) if offset else None
    return BinaryEncoding(format, codes, scales, offsets, order, gain)


def random_framed(format: FramedFormat, n: int, k: int, seed: int = 0) -> FramedEncoding:
    """A framed encoding of an [n, k] weight with random coefficients."""
    make = random_codebook if isinstance(format.inner, CodebookFormat) else random_encoding
    inner = make(format.inner, *format.coefficients(n, k), seed)  # type: ignore[operator]
    return FramedEncoding(format, inner, *frames_of(format, n, k))


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest expected magnitude."""
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30))
