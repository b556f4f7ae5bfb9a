"""The binary format: the formula, packing, prices, uniform weights and refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from onnxq.formats.binary import NATURAL, BinaryEncoding, BinaryFormat, from_uniform
from onnxq.formats.files import encoding_from_arrays, encoding_to_arrays
from onnxq.formats.packing import ceil_div
from onnxq.formats.uniform import UniformEncoding, UniformFormat, ZeroPoint
from tests.custom_ops.binary_reference import BinaryWeight
from tests.encodings import random_binary, random_encoding

FLOAT32 = 1e-6
"""Sums of seven numbers up to 1."""
ROWS = {
    "one row": [2],
    "one width": [3] * 70,
    "one plane": [1] * 33,
    "six planes": [6] * 65,
    "natural": [4] * 10 + [2] * 60 + [1] * 70,
    "ordered": list(np.random.default_rng(0).integers(1, 7, 150)),
    "steps of two": [4, 2, 4] * 45,
}
GROUPS = [(100, None), (33, None), (3, None), (128, 32), (100, 64), (40, 64)]


@pytest.fixture(params=[False, True], ids=["", "offset"])
def offset(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=GROUPS, ids=str)
def columns(request: pytest.FixtureRequest) -> tuple[int, int | None]:
    shape: tuple[int, int | None] = request.param
    return shape


def literal(encoding: BinaryEncoding) -> BinaryWeight:
    """The same weight for the code that knows the ops' text alone."""
    format = encoding.format
    group = format.effective_group(encoding.shape[1])
    return BinaryWeight(
        encoding.codes, encoding.scales, encoding.offsets, encoding.order, format.planes, group, encoding.gain
    )


def test_a_weight_by_hand() -> None:
    """Rows of two planes, one and two: the middle one is stored last."""
    format, order = BinaryFormat.by_row(np.array([2, 1, 2]))
    assert format == BinaryFormat((3, 2), None, offset=False, ordered=True)
    assert order is not None
    np.testing.assert_array_equal(order, [0, 2, 1])
    codes = np.array([[0b00, 0b01, 0b10, 0b11], [0b11, 0b11, 0b11, 0b00], [0, 1, 1, 0]], np.uint8)
    scales = np.array([[[2], [4], [8]], [[1], [0.5], [0]]], np.float16)
    encoding = BinaryEncoding(format, codes, scales, None, order, gain=0.5)
    expected = [[-1.5, 0.5, -0.5, 1.5], [-4, 4, 4, -4], [2.25, 2.25, 2.25, -2.25]]
    np.testing.assert_array_equal(encoding.dequantize(), expected)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_a_weight_is_what_the_formula_says(rows: list[int], columns, offset: bool) -> None:
    encoding = random_binary(rows, *columns, offset=offset)
    weight = encoding.dequantize()
    assert weight.dtype == np.float32
    assert weight.shape == encoding.shape == (len(rows), columns[0])
    np.testing.assert_allclose(weight, literal(encoding).dequantize(), atol=FLOAT32)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_pack_is_the_layout_and_costs_its_bytes(rows: list[int], columns, offset: bool) -> None:
    encoding = random_binary(rows, *columns, offset=offset)
    packed = dataclasses.asdict(encoding.pack())
    expected = literal(encoding).pack()
    for name, array in packed.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    gain_bits = 32
    written = sum(array.nbytes for array in packed.values())
    assert encoding.cost_bits() == encoding.format.cost_bits(*encoding.shape) == 8 * written + gain_bits


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_unpack_and_files_bring_back_the_encoding(rows: list[int], columns, offset: bool) -> None:
    encoding = random_binary(rows, *columns, offset=offset)
    filed = encoding_from_arrays(encoding_to_arrays(encoding))
    assert isinstance(filed, BinaryEncoding)
    unpacked = BinaryEncoding.unpack(encoding.pack(), encoding.format, columns[0], encoding.gain)
    for back in (filed, unpacked):
        assert (back.format, back.gain) == (encoding.format, encoding.gain)
        for name in ("codes", "scales", "offsets", "order"):
            np.testing.assert_array_equal(getattr(back, name), getattr(encoding, name), err_msg=name)


def test_a_key_by_hand() -> None:
    """Row 0 lies in low nibbles and row 32 in high ones, row 64 in the next tile; an input is a bit of its key."""
    codes = np.zeros((65, 40), np.uint8)
    codes[0, 5] = codes[32, 6] = codes[64, 39] = 1
    packed = BinaryEncoding(BinaryFormat.of(65, 1), codes, np.ones((1, 65, 1), np.float16)).pack()
    chunks = 8 * 2
    keys = packed.codes.reshape(2, chunks, 32)
    assert keys[0, 1, 0] == 0b0100_0010
    assert keys[1, 9, 0] == 0b0000_1000
    assert np.count_nonzero(keys) == 2
    np.testing.assert_array_equal(packed.scales.reshape(2, 64)[1], [1] + [0] * 63)
    np.testing.assert_array_equal(packed.offsets, [0])
    np.testing.assert_array_equal(packed.rank, NATURAL)


def test_prices_by_hand() -> None:
    """100 rows are 2 tiles and 60 are 1; 96 inputs are 24 chunks, in 2 groups."""
    flat = BinaryFormat.of(100, 2, 64)
    codes, scales, none = 2 * 2 * 24 * 32 * 8, 2 * 2 * 2 * 64 * 16, 16 + 32 + 32
    assert flat.cost_bits(100, 96) == codes + scales + none
    ragged = BinaryFormat((100, 60), 64, offset=True, ordered=True)
    codes, scales, offsets = 3 * 24 * 32 * 8, 3 * 2 * 64 * 16, 2 * 2 * 64 * 16
    assert ragged.cost_bits(100, 96) == codes + scales + offsets + 100 * 32 + 32
    with pytest.raises(ValueError, match="is for 100 rows, not 90"):
        flat.cost_bits(90, 96)


def test_rows_that_lie_by_falling_planes_need_no_order() -> None:
    format, order = BinaryFormat.by_row(np.array([3, 3, 1]), 64, offset=True)
    assert format == BinaryFormat((3, 2, 2), 64, offset=True, ordered=False)
    assert order is None
    assert list(format.runs()) == [(3, slice(0, 2)), (1, slice(2, 3))]


def test_labels_and_means() -> None:
    assert BinaryFormat.of(10, 2).label() == "binary 2-bit"
    assert BinaryFormat.of(10, 3, 64, offset=True).label() == "binary 3-bit g64 offset"
    by_row = BinaryFormat((4, 3, 2, 1))
    assert by_row.label() == "binary 2.5-bit by row"
    assert by_row.mean_planes() == 2.5


@pytest.mark.parametrize("zero_point", [ZeroPoint.MIDRISE, ZeroPoint.INTEGER])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", range(1, 7))
def test_uniform_weights_convert_exactly(bits: int, group_size: int | None, zero_point: ZeroPoint) -> None:
    uniform = random_encoding(UniformFormat(bits, group_size, zero_point), 70, 100)
    uniform.scales[3, 0] *= -1
    uniform.scales[5, 0] = 0
    binary = from_uniform(uniform)
    np.testing.assert_array_equal(binary.dequantize(), uniform.dequantize())
    np.testing.assert_array_equal(binary.codes, uniform.codes)
    assert binary.format == BinaryFormat.of(70, bits, group_size, offset=zero_point is ZeroPoint.INTEGER)
    codes, side = 8 * bits * 128 * ceil_div(100, 32) * 32 // 8, 128 * binary.format.groups(100) * 16
    assert binary.cost_bits() <= codes + side * (bits + 1) + 16 + 64


def test_zero_points_of_groups_convert_where_float16_holds_them() -> None:
    format = UniformFormat(2, None, ZeroPoint.PER_GROUP)
    zeros = format.quantize_zero(np.array([[1.25], [0.5]]))
    codes = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.uint8)
    easy = UniformEncoding(format, codes, np.array([[0.75], [1000]], np.float16), zeros, 2.0)
    np.testing.assert_array_equal(from_uniform(easy).dequantize(), easy.dequantize())
    with pytest.raises(ValueError, match="float16 does not hold exactly"):
        from_uniform(dataclasses.replace(easy, scales=np.array([[1 + 2**-10], [1]], np.float16), zero_points=zeros + 3))
    with pytest.raises(ValueError, match="a binary weight 6 planes at most"):
        from_uniform(random_encoding(UniformFormat(7), 3, 4))


@pytest.mark.parametrize("gain", [2.0**-30, 2.0**30])
def test_scales_at_the_ends_of_float16_convert(gain: float) -> None:
    """Half of the smallest and 16 times the largest: a gain of another size holds both."""
    format = UniformFormat(6, None)
    uniform = random_encoding(format, 2, 8)
    for scales in ([2.0**-24, 2.0**-20], [65504.0, 2.0**3]):
        extreme = dataclasses.replace(uniform, scales=np.array(scales, np.float16)[:, None], gain=gain)
        np.testing.assert_array_equal(from_uniform(extreme).dequantize(), extreme.dequantize())


@pytest.mark.parametrize(
    ("planes", "group_size", "message"),
    [
        ((), None, "1 to 6 planes, not 0"),
        ((5,) * 7, None, "1 to 6 planes, not 7"),
        ((5, 6), None, "they get fewer"),
        ((5, 0), None, "they get fewer"),
        ((5,), 48, "multiple of 32"),
        ((5,), 0, "multiple of 32"),
    ],
)
def test_formats_that_can_not_be_are_refused(planes: tuple[int, ...], group_size: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BinaryFormat(planes, group_size)


@pytest.mark.parametrize("planes", [[0, 1], [7, 1]])
def test_planes_of_rows_that_can_not_be_are_refused(planes: list[int]) -> None:
    with pytest.raises(ValueError, match="1 to 6 planes"):
        BinaryFormat.by_row(np.array(planes))


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    encoding = random_binary([3, 1, 2, 1], 40, 32, offset=True)
    assert encoding.offsets is not None
    assert encoding.order is not None
    deep, wide = encoding.codes.copy(), encoding.scales.copy()
    deep[2, 7] |= 2
    wide[1, 2] = 1
    for name, array, message in (
        ("codes", encoding.codes[:3], r"not \[3, 4, 2\] for 3 rows of codes"),
        ("codes", encoding.codes.astype(np.int8), "must be uint8"),
        ("codes", deep, "rows 2 to 3 have 1 planes, and bits or scales of more"),
        ("scales", wide, "rows 2 to 3 have 1 planes"),
        ("scales", encoding.scales[:2], r"needs scales \[3, 4, 2\]"),
        ("scales", encoding.scales.astype(np.float32), "scales float16"),
        ("offsets", None, "offsets missing"),
        ("offsets", encoding.offsets[:, :1], r"offsets must be float16 \[4, 2\]"),
        ("order", None, "rows are ordered by their format"),
        ("order", encoding.order * 0, "every row once"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(encoding, **{name: array})
    plain = random_binary([1, 1], 40)
    with pytest.raises(ValueError, match="offsets given"):
        dataclasses.replace(plain, offsets=np.zeros((2, 1), np.float16))
    with pytest.raises(ValueError, match="not ordered"):
        dataclasses.replace(plain, order=np.arange(2))


def test_missing_bytes_are_refused() -> None:
    encoding = random_binary([2, 1], 40)
    packed = encoding.pack()
    with pytest.raises(ValueError, match="has 1024 bytes of codes and 128 scales"):
        BinaryEncoding.unpack(dataclasses.replace(packed, codes=packed.codes[:-1]), encoding.format, 40, 1.0)
