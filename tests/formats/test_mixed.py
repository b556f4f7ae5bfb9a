"""The mixed format: the formula, packing, prices and refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from onnxq.formats.files import encoding_from_arrays, encoding_to_arrays
from onnxq.formats.mixed import (
    DEEPEST,
    MixedEncoding,
    MixedFormat,
    PackedMixed,
    steps,
    table_of,
    tables,
    values_of,
    window_of,
    zero_of,
)
from tests.custom_ops.mixed_reference import ENTRIES, FIRST_ENTRY, MixedWeight
from tests.encodings import random_mixed

FLOAT32 = 3e-7
"""Three products and a power of two."""
SHAPES = [(1, 3, 32), (33, 40, 32), (45, 100, 64), (100, 33, 64), (200, 64, 96)]
DEPTHS = {"all": range(DEEPEST + 1), "none": [0], **{str(depth): [depth] for depth in range(1, DEEPEST + 1)}}
ORDER = np.arange(40)


def literal(encoding: MixedEncoding) -> MixedWeight:
    """The same weight for the code that knows the op's text alone."""
    return MixedWeight(
        encoding.codes,
        encoding.format.by_band(),
        encoding.columns,
        encoding.scales,
        encoding.format.inputs(),
        tables(),
        steps(),
        encoding.format.band,
        encoding.gain,
    )


@pytest.mark.parametrize("depths", DEPTHS.values(), ids=DEPTHS)
@pytest.mark.parametrize(("n", "k", "band"), SHAPES)
def test_a_weight_is_what_the_formula_says(n: int, k: int, band: int, depths) -> None:
    encoding = random_mixed(n, k, band, depths=depths)
    weight = encoding.dequantize()
    assert weight.dtype == np.float32
    assert weight.shape == encoding.shape == (n, k)
    np.testing.assert_allclose(weight, literal(encoding).dequantize(), rtol=FLOAT32)


@pytest.mark.parametrize("depths", DEPTHS.values(), ids=DEPTHS)
@pytest.mark.parametrize(("n", "k", "band"), SHAPES)
def test_pack_is_the_layout_and_costs_its_bytes(n: int, k: int, band: int, depths) -> None:
    encoding = random_mixed(n, k, band, depths=depths)
    packed = dataclasses.asdict(encoding.pack())
    expected = literal(encoding).pack()
    for name, array in packed.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    gain_bits = 32
    written = sum(array.nbytes for array in packed.values())
    assert encoding.cost_bits() == encoding.format.cost_bits(n, k) == 8 * written + gain_bits


@pytest.mark.parametrize("depths", DEPTHS.values(), ids=DEPTHS)
@pytest.mark.parametrize(("n", "k", "band"), SHAPES)
def test_unpack_and_files_bring_back_the_encoding(n: int, k: int, band: int, depths) -> None:
    encoding = random_mixed(n, k, band, depths=depths)
    filed = encoding_from_arrays(encoding_to_arrays(encoding))
    assert isinstance(filed, MixedEncoding)
    unpacked = MixedEncoding.unpack(encoding.pack(), encoding.format.inputs(), band, n, encoding.gain)
    for back in (filed, unpacked):
        assert back.format == encoding.format
        assert back.gain == encoding.gain
        for name in ("codes", "columns", "scales"):
            np.testing.assert_array_equal(getattr(back, name), getattr(encoding, name), err_msg=name)


@pytest.mark.parametrize(
    ("n", "row", "expected"),
    [
        (200, 96, {96, 128, 160}),  # a band of three tiles: at one bit each of them looks at all
        (200, 191, {127, 159, 191}),
        (200, 199, {199}),  # the last band has one tile
        (200, 223, set()),
        (180, 191, {127, 159}),  # a code of the padding counts
    ],
)
def test_bands_do_not_look_at_each_other(n: int, row: int, expected: set[int]) -> None:
    encoding = random_mixed(n, 32, 96, depths=[1])
    codes = encoding.codes.copy()
    codes[row] ^= 1
    changed = dataclasses.replace(encoding, codes=codes).dequantize() != encoding.dequantize()
    assert set(np.flatnonzero(changed.any(axis=1))) == expected


def test_an_order_moves_inputs_and_nothing_else() -> None:
    encoding = random_mixed(45, 100)
    plain = dataclasses.replace(encoding, format=MixedFormat.of(64, np.arange(100), encoding.format.by_band()))
    np.testing.assert_array_equal(encoding.dequantize()[:, encoding.format.inputs()], plain.dequantize())


def test_eight_columns_are_an_octave() -> None:
    encoding = random_mixed(45, 100, seed=3)
    encoding = dataclasses.replace(encoding, columns=encoding.columns // 8 * 8)
    double = dataclasses.replace(encoding, columns=encoding.columns + np.uint8(8) * (encoding.columns < 248))
    ratio = np.where(encoding.columns < 248, 2, 1)[:, : encoding.shape[1]].astype(np.float32)
    by_row = np.repeat(ratio, encoding.format.band, axis=0)[: encoding.shape[0]]
    order = encoding.format.inputs()
    np.testing.assert_array_equal(double.dequantize()[:, order] * by_row, encoding.dequantize()[:, order])


def test_tables_steps_and_values() -> None:
    assert tables().shape == (ENTRIES,)
    assert tables().max() <= 127
    assert steps().shape == (DEEPEST + 1,)
    for depth, first in FIRST_ENTRY.items():
        np.testing.assert_array_equal(table_of(depth), tables()[first:][: 1 << window_of(depth)])
    for depth in range(1, DEEPEST + 1):
        expected = (table_of(depth) - zero_of(depth)) * np.float64(steps()[depth])
        np.testing.assert_allclose(values_of(depth), expected, rtol=FLOAT32)
        assert len(values_of(depth)) == 1 << window_of(depth)
    np.testing.assert_array_equal(values_of(0), [0])


def test_a_bit_more_is_less_error() -> None:
    """Of the nearest level, whatever the path to it."""
    samples = np.random.default_rng(0).standard_normal(4000).astype(np.float32)
    errors = [np.square(samples[:, None] - values_of(depth)).min(axis=1).mean() for depth in (0, 4, 5, 6, 7, 8)]
    assert errors == sorted(errors, reverse=True)
    equal_steps = float(steps()[DEEPEST]) ** 2 / 12
    assert equal_steps * 0.9 < errors[-1] < equal_steps * 1.2


def test_labels_and_means() -> None:
    format = MixedFormat.of(64, ORDER, np.array([[2, 4], [0, 3]]))
    assert format.label() == "mixed 0 to 4 bits, bands of 64"
    assert format.mean_depth(128) == 2.25
    assert format.mean_depth(70) == 2.5  # two tiles of the first band, one of the second


@pytest.mark.parametrize(
    ("band", "order", "depths", "message"),
    [
        (40, ORDER, [[1, 1]], "multiple of 32 outputs, not 40"),
        (0, ORDER, [[1, 1]], "multiple of 32 outputs, not 0"),
        (32, np.zeros(40), [[1, 1]], "name every input once"),
        (32, ORDER + 1, [[1, 1]], "name every input once"),
        (32, ORDER[:0], [[1, 1]], "name every input once"),
        (32, ORDER, [[1, 1, 1]], "3 depths are not one for each block of 40 inputs"),
        (32, ORDER, [[]], "0 depths are not one for each block"),
        (32, ORDER, [[1, 9]], "0 to 8 bits, not 9"),
        (32, np.arange((1 << 16) + 1), [[1]], "names 65536 inputs at most"),
    ],
)
def test_formats_that_can_not_be_are_refused(band: int, order: np.ndarray, depths, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixedFormat.of(band, order, np.array(depths))


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    encoding = random_mixed(45, 100, 32)
    for name, array, message in (
        ("codes", encoding.codes[:45], r"needs codes \[64, 128\]"),
        ("codes", encoding.codes[:, :100], r"not \[64, 100\]"),
        ("codes", encoding.codes.astype(np.int8), "must be uint8"),
        ("columns", encoding.columns[:1], r"columns \[2, 128\]"),
        ("columns", encoding.columns.astype(np.float32), "must be uint8"),
        ("scales", encoding.scales[:20], r"needs codes \[32, 128\]"),
        ("scales", encoding.scales.astype(np.float32), "scales float16"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(encoding, **{name: array})
    tall = MixedFormat.of(32, encoding.format.inputs(), np.repeat(encoding.format.by_band(), 2, axis=0))
    with pytest.raises(ValueError, match="45 outputs are 2 bands, not 4"):
        tall.by_tile(45)
    with pytest.raises(ValueError, match="45 outputs are 2 bands, not 4"):
        MixedEncoding(tall, encoding.codes, np.repeat(encoding.columns, 2, axis=0), encoding.scales)


def test_a_code_above_its_depth_is_refused() -> None:
    encoding = random_mixed(45, 100, depths=[3])
    codes = encoding.codes.copy()
    codes[0, 0] = 8
    with pytest.raises(ValueError, match="code 8 does not fit in 3 bits"):
        dataclasses.replace(encoding, codes=codes).pack()


def test_missing_bytes_are_refused() -> None:
    encoding = random_mixed(45, 100, depths=[3])
    packed = encoding.pack()
    short = PackedMixed(packed.packed[:-128], packed.depths, packed.columns, packed.scales)
    with pytest.raises(ValueError, match=r"has 3072 bytes of codes, not \(2944,\)"):
        MixedEncoding.unpack(short, encoding.format.inputs(), 64, 45, 1.0)
