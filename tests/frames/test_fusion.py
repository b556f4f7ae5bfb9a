"""Tight fusion frames: which exist, Spectral Tetris by hand, and what is built is tight."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnxq.frames.fusion import fusion_frame, fusion_frame_exists, realify, spectral_tetris

FLOAT64 = 1e-12
PHASES = 1e-10
"""Orthogonality of float64 rows of more than a thousand columns."""

SMALL = [(k, width, n) for k in range(1, 13) for n in range(1, 10) for width in range(1, n + 1)]


def gram(frame: np.ndarray) -> np.ndarray:
    """A^H A of all subspaces' rows together."""
    rows = frame.reshape(-1, frame.shape[-1])
    return rows.conj().T @ rows


@pytest.mark.parametrize("n", range(1, 16))
def test_few_projections_add_up_to_the_identity_in_few_ways(n: int) -> None:
    """The sum of k projections is a multiple a of the identity with a = k l / n.

    One: a = 1. Two: a = 1, 2. Three: a = 1, 3/2, 2, 3 (Rabanovich and Samoilenko 2000).
    """
    allowed = {1: (1.0,), 2: (1.0, 2.0), 3: (1.0, 1.5, 2.0, 3.0)}
    for subspaces, sums in allowed.items():
        for width in range(1, n + 1):
            assert fusion_frame_exists(subspaces, width, n) == (subspaces * width / n in sums), (subspaces, width)


@pytest.mark.parametrize(
    ("subspaces", "dimension", "ambient", "exists"),
    [
        (4, 1, 4, True),  # an orthonormal basis
        (5, 1, 4, True),  # the simplex
        (3, 1, 4, False),  # too few to span
        (7, 2, 6, True),
        (5, 4, 11, True),  # the worked example of the source
        (3, 2, 3, True),  # complements of a basis
        (2, 2, 3, False),  # complements of two lines, which do not span
        (0, 1, 1, False),
        (3, 0, 4, False),
        (9, 5, 4, False),
    ],
)
def test_existence_by_hand(subspaces: int, dimension: int, ambient: int, exists: bool) -> None:
    assert fusion_frame_exists(subspaces, dimension, ambient) is exists


def test_existence_does_not_change_with_complements() -> None:
    seen = set()
    for k, width, n in SMALL:
        if width < n:
            assert fusion_frame_exists(k, width, n) == fusion_frame_exists(k, n - width, n)
        rest = k * width - n
        if width <= rest:  # Naimark's complement: what is missing of the identity of all k l dimensions
            assert fusion_frame_exists(k, width, n) == fusion_frame_exists(k, width, rest)
            seen.add(fusion_frame_exists(k, width, n))
        if width < n and k * width >= n and k >= math.ceil(n / min(width, n - width)) + 2:
            assert fusion_frame_exists(k, width, n)
    assert seen == {True, False}


def test_spectral_tetris_by_hand() -> None:
    """Rows of squared norm 11 / 4: ones until 3/4, then 1/2, then 1/4 is missing, each shared in a 2x2 block."""
    a, b = math.sqrt(3 / 8), math.sqrt(5 / 8)
    c, d = math.sqrt(1 / 4), math.sqrt(3 / 4)
    e, f = math.sqrt(1 / 8), math.sqrt(7 / 8)
    expected = [
        [1, 1, a, a, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, b, -b, 1, c, c, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, d, -d, 1, e, e, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, f, -f, 1],
    ]
    np.testing.assert_allclose(spectral_tetris(4, 11), expected, atol=FLOAT64)


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (3, 3), (1, 7), (3, 6), (5, 12), (7, 15), (16, 1000), (97, 1009)]
)
def test_spectral_tetris_has_unit_columns_and_orthogonal_rows(rows: int, columns: int) -> None:
    frame = spectral_tetris(rows, columns)
    np.testing.assert_allclose(np.square(frame).sum(axis=0), 1, atol=FLOAT64)
    np.testing.assert_allclose(frame @ frame.T, columns / rows * np.eye(rows), atol=columns * FLOAT64)


@pytest.mark.parametrize(("rows", "columns"), [(4, 3), (4, 5), (4, 7), (10, 19)])
def test_spectral_tetris_refuses_where_a_block_has_no_room(rows: int, columns: int) -> None:
    with pytest.raises(ValueError, match=rf"twice as many, not \[{rows}, {columns}\]"):
        spectral_tetris(rows, columns)


def check_tight(frame: np.ndarray, subspaces: int, dimension: int, ambient: int, tolerance: float) -> None:
    assert frame.shape == (subspaces, dimension, ambient)
    np.testing.assert_allclose(gram(frame), np.eye(ambient), atol=tolerance)
    norm = ambient / (subspaces * dimension)
    for rows in frame:
        np.testing.assert_allclose(rows @ rows.conj().T, norm * np.eye(dimension), atol=tolerance)


@pytest.mark.parametrize(
    ("subspaces", "dimension", "ambient"),
    [
        (1, 3, 3),
        (4, 5, 5),
        (4, 1, 4),
        (9, 1, 8),
        (18, 1, 16),
        (5, 4, 11),
        (7, 3, 10),
        (12, 8, 64),
        (9, 16, 128),
        # complements
        (5, 7, 11),
        (3, 2, 3),
        (7, 7, 10),
        (6, 20, 30),
    ],
)
def test_what_is_built_is_tight(subspaces: int, dimension: int, ambient: int) -> None:
    frame = fusion_frame(subspaces, dimension, ambient)
    check_tight(frame, subspaces, dimension, ambient, FLOAT64)
    real = realify(frame)
    assert real.shape == (subspaces, dimension, 2, 2 * ambient)
    check_tight(real.reshape(subspaces, 2 * dimension, 2 * ambient), subspaces, 2 * dimension, 2 * ambient, FLOAT64)


def test_realified_rows_are_the_complex_product() -> None:
    rng = np.random.default_rng(0)
    frame = fusion_frame(5, 4, 11)
    x = rng.standard_normal(22)
    complex_product = frame @ (x[0::2] + 1j * x[1::2])
    real = realify(frame) @ x
    np.testing.assert_allclose(real[..., 0] + 1j * real[..., 1], complex_product, atol=FLOAT64)


@pytest.mark.parametrize(("subspaces", "dimension", "ambient"), [(1025, 1, 1024), (5, 512, 1536), (6, 300, 1009)])
def test_phases_stay_exact_in_many_dimensions(subspaces: int, dimension: int, ambient: int) -> None:
    """Random vectors keep their norm, and rows far apart stay orthogonal."""
    frame = fusion_frame(subspaces, dimension, ambient)
    x = np.random.default_rng(0).standard_normal((ambient, 3))
    np.testing.assert_allclose(np.square(np.abs(frame @ x)).sum(axis=(0, 1)), np.square(x).sum(axis=0), rtol=PHASES)
    last = frame[-1]
    norm = ambient / (subspaces * dimension)
    np.testing.assert_allclose(last @ last.conj().T, norm * np.eye(dimension), atol=PHASES)
    back = np.einsum("sdn,sdv->nv", frame.conj(), frame @ x)
    np.testing.assert_allclose(back, x, atol=PHASES * np.abs(x).max())


def test_every_small_one_is_tight_or_refused_with_the_reason() -> None:
    built = 0
    for k, width, n in SMALL:
        if not fusion_frame_exists(k, width, n):
            with pytest.raises(ValueError, match=f"{k} subspaces of dimension {width} in {n} dimensions"):
                fusion_frame(k, width, n)
            continue
        try:
            frame = fusion_frame(k, width, n)
        except ValueError as error:
            assert "take more subspaces" in str(error)  # noqa: PT017 - both outcomes are right, depending on k
            assert k <= math.ceil(n / min(width, n - width)) + 1
            continue
        check_tight(frame, k, width, n, FLOAT64)
        built += 1
    assert built > 300
