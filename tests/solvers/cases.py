"""Weights and second moments for tests of solvers."""

from __future__ import annotations

import functools

import numpy as np


def gaussian(n: int, k: int, seed: int = 0) -> np.ndarray:
    """A weight [n, k] of independent unit Gaussians."""
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def heavy_tailed(n: int, k: int, seed: int = 0) -> np.ndarray:
    """A weight [n, k] of Student t with five degrees of freedom, as in trained networks."""
    return np.random.default_rng(seed).standard_t(5, (n, k)).astype(np.float32)


def moment(k: int, seed: int = 0) -> np.ndarray:
    """The second moment of inputs whose spectrum falls as 1/i and whose scales differ from input to input."""
    return _moment(k, seed).copy()


@functools.cache
def _moment(k: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((k, k)))[0]
    inputs = rng.standard_normal((4 * k, k)) / np.sqrt(np.arange(1, k + 1)) @ basis.T
    inputs *= np.exp(0.7 * rng.standard_normal(k))
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)
