"""The float8 format: all codes and midpoints of the four kinds by the formula, prices, and what is refused."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from onnxq.formats.files import encoding_from_arrays, encoding_to_arrays
from onnxq.formats.float8 import Float8Encoding, Float8Format, Float8Kind
from tests.encodings import random_float8

KINDS = list(Float8Kind)
LAYOUT = {
    Float8Kind.E4M3FN: (3, 7, 448),
    Float8Kind.E5M2: (2, 15, 57344),
    Float8Kind.E4M3FNUZ: (3, 8, 240),
    Float8Kind.E5M2FNUZ: (2, 16, 57344),
}
"""Mantissa bits, exponent bias and largest value, from the ONNX standard."""
NAMES = [
    "float8 e4m3fn", "float8 e5m2 g64", "float8 e4m3fnuz one scale", "float8 e5m2fnuz 2**n", "float8 e4m3fn g32 2**n",
]  # fmt: skip
FORMATS = [
    Float8Format(),
    Float8Format(Float8Kind.E5M2, 64),
    Float8Format(Float8Kind.E4M3FNUZ, one_scale=True),
    Float8Format(Float8Kind.E5M2FNUZ, powers_of_two=True),
    Float8Format(group_size=32, powers_of_two=True),
]


def slow_value(code: int, kind: Float8Kind) -> Fraction:
    """The formula, one code at a time, without rounding."""
    mantissa_bits, bias, _ = LAYOUT[kind]
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, Fraction(code & (2**mantissa_bits - 1), 2**mantissa_bits)
    size = (1 + mantissa) * Fraction(2) ** (exponent - bias) if exponent else mantissa * Fraction(2) ** (1 - bias)
    return -size if code >> 7 else size


def is_number(code: int, kind: Float8Kind) -> bool:
    """Whether a code is neither infinity nor NaN, from the tables of the ONNX standard."""
    if kind is Float8Kind.E4M3FN:
        return code & 0x7F != 0x7F
    if kind is Float8Kind.E5M2:
        return code & 0x7F < 0x7C
    return code != 0x80


def slow_code(value: float, kind: Float8Kind) -> int:
    """The code of the nearest value, ties to the even mantissa, of all that are numbers."""
    sizes = {code: float(slow_value(code, kind)) for code in range(128) if is_number(code, kind)}
    code = min(sizes, key=lambda code: (abs(sizes[code] - abs(value)), code & 1))
    negative = value < 0 and not (code == 0 and kind in (Float8Kind.E4M3FNUZ, Float8Kind.E5M2FNUZ))
    return code | 128 if negative else code


def around_midpoints(kind: Float8Kind) -> np.ndarray:
    """Every midpoint and the float32 numbers next to it."""
    sizes = np.array([float(slow_value(code, kind)) for code in range(128) if is_number(code, kind)], np.float32)
    points = (sizes[:-1] + sizes[1:]) / 2
    around: np.ndarray = np.concatenate([points, np.nextafter(points, 0), np.nextafter(points, np.float32(np.inf))])
    return around


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_are_those_of_the_standard(kind: Float8Kind) -> None:
    assert (kind.mantissa_bits, kind.bias, kind.largest) == LAYOUT[kind]
    assert Float8Kind.of(kind.mantissa_bits, kind.bias) is kind
    assert kind.largest == max(slow_value(code, kind) for code in range(256) if is_number(code, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_all_codes_decode_by_the_formula(kind: Float8Kind) -> None:
    codes = np.arange(256, dtype=np.uint8)
    decoded = kind.decode(codes)
    assert decoded.dtype == np.float32
    assert [Fraction(float(value)) for value in decoded] == [slow_value(code, kind) for code in range(256)]
    numbers = np.array([is_number(code, kind) for code in range(256)])
    np.testing.assert_array_equal(decoded[numbers], codes.view(kind.dtype).astype(np.float32)[numbers])
    assert not np.isfinite(codes.view(kind.dtype).astype(np.float32)[~numbers]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_all_numbers_encode_to_their_codes(kind: Float8Kind) -> None:
    codes = np.array([code for code in range(256) if is_number(code, kind)], np.uint8)
    np.testing.assert_array_equal(kind.encode(kind.decode(codes)), codes)


@pytest.mark.parametrize("kind", KINDS)
def test_all_midpoints_and_their_neighbours(kind: Float8Kind) -> None:
    values = around_midpoints(kind)
    values = np.concatenate([values, -values])
    assert values.dtype == np.float32
    np.testing.assert_array_equal(kind.encode(values), [slow_code(float(value), kind) for value in values])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_too_large_becomes_the_largest(kind: Float8Kind) -> None:
    values = kind.largest * np.array([1, 1.001, 1.04, 1.08, 2, 1e30, np.inf])
    np.testing.assert_array_equal(kind.decode(kind.encode(values.astype(np.float32))), kind.largest)
    np.testing.assert_array_equal(kind.decode(kind.encode(-values)), -kind.largest)


@pytest.mark.parametrize("kind", KINDS)
def test_round_gives_the_values_of_the_codes(kind: Float8Kind) -> None:
    rng = np.random.default_rng(0)
    spread = rng.standard_normal(100_000) * np.exp2(rng.uniform(-30, 20, 100_000))
    extremes = np.array([0, 1e-45, 1e-38, 3.4e38, np.inf], np.float32)
    values = np.concatenate([around_midpoints(kind), spread, extremes]).astype(np.float32)
    for signed in (values, -values):
        np.testing.assert_array_equal(kind.round(signed), kind.decode(kind.encode(signed)))
    before = values.copy()
    kind.round(values)
    np.testing.assert_array_equal(values, before)
    assert np.isnan(kind.round(np.array([np.nan], np.float32))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_has_no_code(kind: Float8Kind) -> None:
    with pytest.raises(ValueError, match="NaN has no float8 code"):
        kind.encode(np.array([1, np.nan], np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_that_are_no_numbers_are_known(kind: Float8Kind) -> None:
    for code in range(256):
        assert kind.unsafe(np.array([[0, code]], np.uint8)) is not is_number(code, kind)


@pytest.mark.parametrize("bits", [(3, 15), (2, 7), (4, 7), (0, 0)])
def test_other_layouts_have_no_kind(bits: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{bits[0]} mantissa bits and the exponent bias {bits[1]}"):
        Float8Kind.of(*bits)


def slow_weight(encoding: Float8Encoding) -> np.ndarray:
    n, k = encoding.shape
    weight = np.zeros((n, k))
    for row in range(n):
        for column in range(k):
            group = column // encoding.format.group_size if encoding.format.group_size else 0
            scale = encoding.scales[0 if encoding.format.one_scale else row, group]
            weight[row, column] = slow_value(int(encoding.codes[row, column]), encoding.format.kind) * Fraction(
                float(scale) * encoding.gain
            )
    return weight


@pytest.mark.parametrize("format", FORMATS, ids=Float8Format.label)
@pytest.mark.parametrize(("n", "k"), [(1, 3), (5, 64), (4, 100), (33, 33)])
def test_a_weight_is_what_the_formula_says(n: int, k: int, format: Float8Format) -> None:
    encoding = random_float8(format, n, k)
    assert encoding.shape == (n, k)
    # Codes have 4 bits and scales 11: float32 holds the product.
    np.testing.assert_array_equal(encoding.dequantize(), slow_weight(encoding))


@pytest.mark.parametrize("format", FORMATS, ids=Float8Format.label)
def test_a_weight_costs_its_bytes(format: Float8Format) -> None:
    for n, k in ((45, 100), (64, 256), (1, 33)):
        encoding = random_float8(format, n, k)
        gain_bits = 32
        assert encoding.cost_bits() == format.cost_bits(n, k)
        assert encoding.cost_bits() == 8 * (encoding.codes.nbytes + encoding.scales.nbytes) + gain_bits


@pytest.mark.parametrize("format", FORMATS, ids=Float8Format.label)
def test_arrays_bring_back_the_encoding(format: Float8Format) -> None:
    encoding = random_float8(format, 45, 100)
    back = encoding_from_arrays(encoding_to_arrays(encoding))
    assert isinstance(back, Float8Encoding)
    assert back.format == format
    np.testing.assert_array_equal(back.dequantize(), encoding.dequantize())


def test_labels_tell_formats_apart() -> None:
    assert [format.label() for format in FORMATS] == NAMES


def test_groups_end_with_the_row() -> None:
    assert [Float8Format(group_size=64).effective_group(k) for k in (33, 64, 100)] == [33, 64, 64]
    assert [Float8Format(group_size=64).groups(k) for k in (33, 64, 100)] == [1, 1, 2]
    assert Float8Format().effective_group(33) == 33


@pytest.mark.parametrize("group_size", [0, 16, 40, -32])
def test_groups_that_are_no_blocks_are_refused(group_size: int) -> None:
    with pytest.raises(ValueError, match=f"a multiple of 32, or None.*not {group_size}"):
        Float8Format(group_size=group_size)


def test_one_scale_leaves_no_groups() -> None:
    with pytest.raises(ValueError, match="group_size is None then, not 32"):
        Float8Format(group_size=32, one_scale=True)


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    codes, scales = np.zeros((4, 64), np.uint8), np.ones((4, 2), np.float16)
    format = Float8Format(group_size=32)
    Float8Encoding(format, codes, scales)
    with pytest.raises(ValueError, match=r"g32 of a \[4, 64\] weight needs scales \[4, 2\], not \[4, 1\]"):
        Float8Encoding(format, codes, scales[:, :1])
    with pytest.raises(ValueError, match=r"needs scales \[1, 1\]"):
        Float8Encoding(Float8Format(one_scale=True), codes, scales)
    with pytest.raises(ValueError, match="uint8 and scales float16"):
        Float8Encoding(format, codes, scales.astype(np.float32))
    for wrong in (0, -1, np.inf, np.nan):
        with pytest.raises(ValueError, match="positive and finite"):
            Float8Encoding(format, codes, np.full((4, 2), wrong, np.float16))
    with pytest.raises(ValueError, match="infinity or NaN in e4m3fn"):
        Float8Encoding(format, np.full((4, 64), 0xFF, np.uint8), scales)
