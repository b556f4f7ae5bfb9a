from __future__ import annotations

import numpy as np
import pytest

from onnxq.frames.mixing import hadamard, hartley, mix, pack_signs, unpack_signs

FLOAT64 = 1e-12
FLOAT32 = 2e-6


@pytest.mark.parametrize("size", [1, 2, 4, 64, 256])
def test_hadamard_signs_count_common_digits(size: int) -> None:
    matrix = hadamard(size)
    for i, j in ((0, size - 1), (size - 1, size - 1), (size // 2, size // 3)):
        assert matrix[i, j] == (-1) ** bin(i & j).count("1") / np.sqrt(size)
    np.testing.assert_allclose(matrix @ matrix, np.eye(size), atol=FLOAT64)


@pytest.mark.parametrize("size", [1, 3, 5, 7, 9, 125, 301])
def test_hartley_is_symmetric_its_own_inverse_and_nowhere_zero(size: int) -> None:
    matrix = hartley(size)
    np.testing.assert_allclose(matrix, matrix.T, atol=FLOAT64)
    np.testing.assert_allclose(matrix @ matrix, np.eye(size), atol=FLOAT64)
    angle = 2 * np.pi * 2 / size
    assert matrix[1 % size, 2 % size] == pytest.approx((np.cos(angle) + np.sin(angle)) / np.sqrt(size))
    assert np.abs(matrix).min() > 0


@pytest.mark.parametrize(("power", "odd"), [(1, 1), (8, 1), (1, 5), (4, 3), (32, 7)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, FLOAT32), (np.float64, FLOAT64)])
def test_mix_is_the_kronecker_product(power: int, odd: int, dtype: type, tolerance: float) -> None:
    values = np.random.default_rng(0).standard_normal((2, 3, power * odd)).astype(dtype)
    before = values.copy()
    mixed = mix(values, power, odd)
    np.testing.assert_allclose(mixed, values @ np.kron(hadamard(power), hartley(odd)), atol=tolerance)
    assert mixed.dtype == dtype
    np.testing.assert_array_equal(values, before)
    np.testing.assert_allclose(mix(mixed, power, odd), values, atol=tolerance)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 100])
def test_signs_come_back_from_bits_lowest_first(size: int) -> None:
    negative = np.random.default_rng(size).integers(0, 2, size).astype(bool)
    packed = pack_signs(negative)
    assert packed.dtype == np.uint8
    assert packed.shape == (-(-size // 8),)
    for i in range(size):
        assert (packed[i // 8] >> (i % 8)) & 1 == negative[i]
    np.testing.assert_array_equal(unpack_signs(packed, size), np.where(negative, -1, 1))
