"""Orthogonal mixing in O(d log d): random signs, a Walsh-Hadamard transform, a Hartley transform over the odd factor.

After it every coefficient is a sum over all inputs, whatever the size: 384 = 128 * 3 mixes over the 3 as well.
"""

from __future__ import annotations

import math

import numpy as np


def hadamard(size: int) -> np.ndarray:
    """Sylvester's Walsh-Hadamard matrix over sqrt(size), float64 [size, size]; symmetric, its own inverse."""
    index = np.arange(size)
    parity = np.bitwise_count(index[:, None] & index[None, :]) & 1
    matrix: np.ndarray = (1.0 - 2.0 * parity) / math.sqrt(size)
    return matrix


def hartley(size: int) -> np.ndarray:
    """The Hartley matrix (cos t + sin t) / sqrt(size), t = 2 pi u v / size, float64; symmetric, its own inverse.

    Unlike the cosine transform it has no zeros at sizes 3 and 5, so that every input reaches every coefficient.
    """
    turns = np.outer(np.arange(size), np.arange(size)) % size
    angles = 2 * np.pi * turns / size
    matrix: np.ndarray = (np.cos(angles) + np.sin(angles)) / math.sqrt(size)
    return matrix


def mix(values: np.ndarray, power: int, odd: int) -> np.ndarray:
    """Walsh-Hadamard over `power` and Hartley over `odd`: float [..., power * odd] to the same, its own inverse."""
    shape = values.shape
    work = values.reshape(-1, power, odd)
    work = work @ hartley(odd).astype(values.dtype) if odd > 1 else work.copy()
    half = 1
    while half < power:
        pairs = work.reshape(work.shape[0], power // (2 * half), 2, half * odd)
        upper, lower = pairs[:, :, 0].copy(), pairs[:, :, 1].copy()
        np.add(upper, lower, out=pairs[:, :, 0])
        np.subtract(upper, lower, out=pairs[:, :, 1])
        half *= 2
    work *= values.dtype.type(1 / math.sqrt(power))
    mixed: np.ndarray = work.reshape(shape)
    return mixed


def pack_signs(negative: np.ndarray) -> np.ndarray:
    """Booleans [d] as bits, lowest first: uint8 [ceil(d / 8)]."""
    return np.packbits(negative, bitorder="little")


def unpack_signs(packed: np.ndarray, size: int) -> np.ndarray:
    """Bits as signs, float32 [d]: -1 where a bit is set."""
    bits = np.unpackbits(packed, count=size, bitorder="little")
    signs: np.ndarray = np.float32(1) - np.float32(2) * bits
    return signs
