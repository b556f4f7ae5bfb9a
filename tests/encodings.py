"""Random encodings for tests: every code, scale and zero point that a format allows can occur."""

from __future__ import annotations

import numpy as np

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


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest expected magnitude."""
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30))
