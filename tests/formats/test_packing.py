from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.formats import packing

EVERY_WIDTH = range(1, 9)


@pytest.mark.parametrize(
    ("bits", "widths"),
    [(1, (1,)), (2, (2,)), (3, (2, 1)), (4, (4,)), (5, (4, 1)), (6, (4, 2)), (7, (4, 2, 1)), (8, (8,))],
)
def test_planes_are_the_binary_digits_of_the_width(bits: int, widths: tuple[int, ...]) -> None:
    assert packing.plane_widths(bits) == widths


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 8 bits"):
        packing.plane_widths(bits)


@given(st.integers(1, 8), st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**31))
def test_unpack_undoes_pack(bits: int, n: int, k: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (n, k)).astype(np.uint8)
    packed = packing.pack_codes(codes, bits)
    assert packed.shape == packing.packed_shape(n, k, bits)
    np.testing.assert_array_equal(packing.unpack_codes(packed, n, k), codes)


@pytest.mark.parametrize("bits", EVERY_WIDTH)
def test_each_bit_lies_where_the_layout_says(bits: int) -> None:
    """One code at a time, against the sentence in the module's docstring."""
    n, k = 33, 64
    for output, column in [(0, 0), (7, 5), (31, 31), (32, 33), (5, 63)]:
        codes = np.zeros((n, k), np.uint8)
        codes[output, column] = 2**bits - 1
        packed = packing.pack_codes(codes, bits)
        quad, j = divmod(column % 32, 4)
        expected = np.zeros_like(packed)
        row = 0
        for width in packing.plane_widths(bits):
            v, f = divmod(quad, 8 // width)
            expected[output // 32, column // 32, row + v, output % 32, j] = ((1 << width) - 1) << (f * width)
            row += width
        np.testing.assert_array_equal(packed, expected)


def test_the_widest_plane_holds_the_lowest_bits() -> None:
    packed = packing.pack_codes(np.full((1, 1), 0b011, np.uint8), 3)
    assert packed[0, 0, 0, 0, 0] == 0b11
    assert packed[0, 0, 2, 0, 0] == 0


def test_a_code_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="code 8 does not fit in 3 bits"):
        packing.pack_codes(np.full((2, 2), 8, np.uint8), 3)


@given(st.integers(1, 70), st.integers(1, 5))
def test_untile_undoes_tile(n: int, groups: int) -> None:
    values = np.arange(n * groups, dtype=np.float32).reshape(n, groups)
    tiled = packing.tile_groups(values)
    assert tiled.shape == (packing.ceil_div(n, 32), groups, 32)
    np.testing.assert_array_equal(packing.untile_groups(tiled, n), values)
