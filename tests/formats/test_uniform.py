from __future__ import annotations

import numpy as np
import pytest

from onnxq.formats.uniform import UniformEncoding, UniformFormat, ZeroPoint, choose_gain, round_scales
from tests.encodings import random_encoding

GROUPS = (32, 64, 128, None)


def test_two_bit_levels_may_be_symmetric_about_zero() -> None:
    format = UniformFormat(2, None, ZeroPoint.MIDRISE)
    codes = np.array([[0, 1, 2, 3]], np.uint8)
    encoding = UniformEncoding(format, codes, np.ones((1, 1), np.float16), np.full((1, 1), 96, np.uint8))
    np.testing.assert_array_equal(encoding.dequantize(), [[-1.5, -0.5, 0.5, 1.5]])


@pytest.mark.parametrize("bits", range(1, 9))
def test_shared_zero_points_are_exact(bits: int) -> None:
    for kind, zero in ((ZeroPoint.MIDRISE, (2**bits - 1) / 2), (ZeroPoint.INTEGER, 2 ** (bits - 1))):
        format = UniformFormat(bits, 32, kind)
        stored = format.quantize_zero(np.full((1, 1), format.shared_zero()))
        expected = round(zero) if bits == 8 and kind is ZeroPoint.MIDRISE else zero
        assert format.zero_of(stored)[0, 0] == expected


def test_eight_bits_have_no_half_zero() -> None:
    """At 8 bits the fixed point has no fraction bits left: the midrise zero 127.5 is stored as 128."""
    format = UniformFormat(8, 32, ZeroPoint.MIDRISE)
    assert format.quantize_zero(127.5) == 128


@pytest.mark.parametrize("bits", range(1, 9))
def test_zero_points_round_to_what_the_format_has(bits: int) -> None:
    zeros = np.linspace(-1, 2**bits + 1, 101)
    fractional = UniformFormat(bits, 32, ZeroPoint.PER_GROUP)
    whole = UniformFormat(bits, 32, ZeroPoint.PER_GROUP_INTEGER)
    inside = np.clip(zeros, 0, 255 / 2 ** (8 - bits))
    assert np.abs(fractional.zero_of(fractional.quantize_zero(zeros)) - inside).max() <= 0.5 / 2 ** (8 - bits)
    got = whole.zero_of(whole.quantize_zero(zeros))
    np.testing.assert_array_equal(got, np.clip(np.rint(zeros), 0, 2**bits - 1))


@pytest.mark.parametrize("zero_point", list(ZeroPoint))
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_and_unpack_keep_the_weight(bits: int, group_size: int | None, zero_point: ZeroPoint) -> None:
    format = UniformFormat(bits, group_size, zero_point)
    encoding = random_encoding(format, 45, 100)
    packed = encoding.pack()
    back = UniformEncoding.unpack(packed, format, 45, 100, encoding.gain)
    np.testing.assert_array_equal(back.dequantize(), encoding.dequantize())


@pytest.mark.parametrize("zero_point", list(ZeroPoint))
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize(("n", "k"), [(45, 100), (64, 256), (1, 33)])
def test_the_price_is_the_bytes(n: int, k: int, group_size: int | None, zero_point: ZeroPoint) -> None:
    gain_bits = 32
    encoding = random_encoding(UniformFormat(3, group_size, zero_point), n, k)
    packed = encoding.pack()
    written = packed.packed.nbytes + packed.scales.nbytes + packed.zero_points.nbytes
    assert encoding.cost_bits() == 8 * written + gain_bits


def test_the_price_by_hand() -> None:
    """64 x 256 at 2 bits, groups of 64: 2 bits a code and 16 bits a group; one zero point and the gain."""
    assert UniformFormat(2, 64, ZeroPoint.MIDRISE).cost_bits(64, 256) == 64 * 256 * 2 + 64 * 4 * 16 + 8 + 32


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e-2, 1.0, 1e6, 1e30])
def test_the_gain_keeps_scales_in_the_normal_range_of_float16(magnitude: float) -> None:
    scales = magnitude * np.array([1.0, 0.5, 1e-3, 1e-6])
    gain = choose_gain(scales)
    stored = round_scales(scales, gain)
    relative = np.abs(stored.astype(np.float64) * gain / scales - 1)
    assert np.log2(gain) == int(np.log2(gain))
    assert relative.max() <= 2**-11


def test_no_scale_at_all_has_gain_one() -> None:
    assert choose_gain(np.zeros((3, 2))) == 1.0


@pytest.mark.parametrize(("bits", "group_size"), [(0, 32), (9, 32), (4, 16), (4, 40), (4, 0)])
def test_formats_that_do_not_exist_are_refused(bits: int, group_size: int) -> None:
    with pytest.raises(ValueError, match=r"bits must be|group_size must be"):
        UniformFormat(bits, group_size)


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    format = UniformFormat(4, 32, ZeroPoint.MIDRISE)
    codes = np.zeros((2, 64), np.uint8)
    with pytest.raises(ValueError, match=r"needs scales \[2, 2\]"):
        UniformEncoding(format, codes, np.ones((2, 1), np.float16), np.zeros((1, 1), np.uint8))
    with pytest.raises(ValueError, match="must be uint8"):
        UniformEncoding(format, codes, np.ones((2, 2), np.float32), np.zeros((1, 1), np.uint8))
