"""Tight fusion frames: families of subspaces of C^n whose projections add up to a multiple of the identity.

Built by Spectral Tetris and modulation: a sparse matrix F [l, n] of unit columns and orthogonal rows is laid out with
ones and 2x2 blocks, and subspace s is F with column i turned by exp(2 pi j s i / k). Stacked and divided by sqrt(k),
the k copies are a Parseval frame of redundancy k l / n.

Sources: Casazza, Fickus, Mixon, Wang and Zhou, Constructing tight fusion frames (2011); FrameQuant (arXiv 2403.06082).
"""

from __future__ import annotations

import math

import numpy as np


def fusion_frame_exists(subspaces: int, dimension: int, ambient: int) -> bool:
    """Whether `subspaces` subspaces of `dimension` can be a tight fusion frame of `ambient` dimensions.

    The test of Casazza et al.: a family may be swapped for that of the complements, and what the numbers leave open is
    decided by the smaller family that Naimark's complement and the swap lead to.
    """
    k, width, n = subspaces, dimension, ambient
    if k < 1 or not 1 <= width <= n:
        return False
    while width < n:
        width = min(width, n - width)
        if n % width == 0:
            return k >= n // width
        if k != math.ceil(n / width) + 1:
            return k > math.ceil(n / width) + 1
        n = k * width - n
        width = n - width
    return True


def spectral_tetris(rows: int, columns: int) -> np.ndarray:
    """F float64 [rows, columns]: unit columns, orthogonal rows of squared norm columns / rows.

    A row takes ones until less than one is missing; what is missing it shares with the next row in a 2x2 block.

    Raises:
        ValueError: fewer columns than rows, or between once and twice as many without being one of them: a 2x2 block
            then has no room (take the complement).
    """
    if not (columns == rows or columns >= 2 * rows):
        raise ValueError(f"Spectral Tetris needs as many columns as rows, or twice as many, not [{rows}, {columns}]")
    frame = np.zeros((rows, columns))
    # In units of 1 / rows, so that nothing is lost to rounding: a row needs `columns` of them, a column gives `rows`.
    column, missing = 0, columns
    for row in range(rows):
        while missing >= rows:
            frame[row, column] = 1.0
            column, missing = column + 1, missing - rows
        if missing:
            share = missing / rows
            block = np.sqrt([[share / 2, share / 2], [1 - share / 2, 1 - share / 2]])
            block[1, 1] *= -1
            frame[row : row + 2, column : column + 2] = block
            column += 2
            missing = columns - (2 * rows - missing)
        else:
            missing = columns
    return frame


def fusion_frame(subspaces: int, dimension: int, ambient: int) -> np.ndarray:
    """Analysis operator of a tight fusion frame, complex128 [subspaces, dimension, ambient].

    Each subspace's rows are orthogonal, of squared norm ambient / (dimension * subspaces); all of them stacked are a
    Parseval frame: sum over subspaces of P^H P = I.

    Raises:
        ValueError: there is no such frame, or a row of the sparse matrix is wider than there are subspaces.
    """
    if not fusion_frame_exists(subspaces, dimension, ambient):
        raise ValueError(
            f"no tight fusion frame has {subspaces} subspaces of dimension {dimension} in {ambient} dimensions"
        )
    if ambient < 2 * dimension and dimension < ambient:
        return _complement(fusion_frame(subspaces, ambient - dimension, ambient))
    sparse = spectral_tetris(dimension, ambient)
    widest = max(int(np.ptp(np.flatnonzero(row))) + 1 for row in sparse)
    if widest > subspaces:
        raise ValueError(
            f"rows of {widest} columns need as many subspaces, and there are {subspaces}: take more subspaces"
        )
    # Reduced before the division: q * n / k in floating point loses digits as n grows.
    turns = np.outer(np.arange(subspaces), np.arange(ambient)) % subspaces
    phases = np.exp(2j * np.pi * turns / subspaces) / math.sqrt(subspaces)
    frame: np.ndarray = sparse[None] * phases[:, None, :]
    return frame


def _complement(frame: np.ndarray) -> np.ndarray:
    """The frame of the subspaces' orthogonal complements: complex [k, n - l, n] from [k, l, n]."""
    subspaces, dimension, ambient = frame.shape
    rest = np.stack([np.linalg.svd(rows)[2][dimension:] for rows in frame])
    scaled: np.ndarray = rest * math.sqrt(ambient / (subspaces * (ambient - dimension)))
    return scaled


def realify(frame: np.ndarray) -> np.ndarray:
    """Complex rows [..., n] as real ones [..., 2, 2 n]: real and imaginary part of the product with x[2i] + j x[2i+1].

    A Parseval frame of C^n becomes one of R^2n with the same redundancy.
    """
    rows = np.empty((*frame.shape[:-1], 2, 2 * frame.shape[-1]))
    rows[..., 0, 0::2], rows[..., 0, 1::2] = frame.real, -frame.imag
    rows[..., 1, 0::2], rows[..., 1, 1::2] = frame.imag, frame.real
    return rows
