"""The codebook format: the index formula, packing, prices, and tables that reach the error they state."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.formats.codebook import LARGEST_WINDOW, CodebookEncoding, CodebookFormat
from onnxq.formats.files import encoding_from_arrays, encoding_to_arrays
from onnxq.formats.packing import unpack_codes, untile_groups
from onnxq.formats.tables import GAUSSIAN_TABLES
from onnxq.formats.uniform import UniformFormat, ZeroPoint
from onnxq.solvers.loss import relative_error
from onnxq.solvers.nearest import nearest
from onnxq.solvers.trellis import trellis_nearest
from onnxq.solvers.viterbi import open_path
from tests.encodings import random_codebook

FORMATS = sorted(GAUSSIAN_TABLES)
TRELLISES = [key for key in FORMATS if key[0] < key[1]]
REACHED = 0.015
"""How far from the stated error that of a sample of 256000 weights may be."""
CLOSED = 0.1
"""What closing runs of 64 steps costs at most: it binds up to 5 of their bits."""
FITTED = 0.03
"""How far scales that come from 192 weights may move the error."""
BOUND = {bits: 4.0**-bits for bits in range(1, 7)}
"""Rate-distortion bound of a Gaussian."""


def slow_levels(encoding: CodebookEncoding) -> np.ndarray:
    """Table entries [N, K], one weight and one predecessor after the other."""
    bits, window = encoding.format.bits, encoding.format.window
    rows, k = encoding.codes.shape
    levels = np.zeros((encoding.shape[0], k), np.uint8)
    for n in range(encoding.shape[0]):
        for j in range(k):
            index = 0
            for before in range(window):  # more than enough: the mask drops what is too old
                index += int(encoding.codes[(n - 32 * before) % rows, j]) << (bits * before)
            levels[n, j] = encoding.format.table[index % 2**window]
    return levels


def slow_weight(encoding: CodebookEncoding) -> np.ndarray:
    _, k = encoding.shape
    size = encoding.format.group_size or -(-k // 32) * 32
    steps = encoding.scales.astype(np.float64) * encoding.gain
    levels = slow_levels(encoding).astype(np.float64) - 63.5
    return levels * np.stack([steps[:, j // size] for j in range(k)], axis=1)


@pytest.mark.parametrize(("bits", "window"), FORMATS)
def test_tables_have_a_level_for_every_index(bits: int, window: int) -> None:
    assert bits <= window <= LARGEST_WINDOW
    table = CodebookFormat(bits, window).table
    assert table.dtype == np.uint8
    assert table.shape == (1 << window,)
    assert table.max() <= 127
    assert len(np.unique(table)) > (1 << window) // 2


@pytest.mark.parametrize(("n", "k"), [(1, 3), (32, 5), (33, 40), (100, 33)])
@pytest.mark.parametrize(("bits", "window"), FORMATS)
def test_a_weight_is_what_the_formula_says(bits: int, window: int, n: int, k: int) -> None:
    """Tail-biting included: rows of the first tile look back at the last, and at padding rows."""
    encoding = random_codebook(CodebookFormat(bits, window, 32), n, k)
    np.testing.assert_array_equal(encoding.as_uniform().codes, slow_levels(encoding))
    np.testing.assert_allclose(encoding.dequantize(), slow_weight(encoding), rtol=1e-6)
    assert encoding.shape == encoding.dequantize().shape == (n, k)


def test_a_code_of_the_padding_counts() -> None:
    encoding = random_codebook(CodebookFormat(2, 4), 33, 32)
    codes = encoding.codes.copy()
    codes[33:] ^= 3
    changed = CodebookEncoding(encoding.format, codes, encoding.scales, encoding.gain)
    differs = (changed.dequantize() != encoding.dequantize()).any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(differs), np.arange(1, 32))


@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize(("bits", "window"), FORMATS)
def test_pack_keeps_the_weight_and_costs_its_bytes(bits: int, window: int, group_size: int | None) -> None:
    format = CodebookFormat(bits, window, group_size)
    for n, k in ((45, 100), (64, 256), (1, 33)):
        encoding = random_codebook(format, n, k)
        packed = encoding.pack()
        codes = unpack_codes(packed.packed, len(encoding.codes), k)
        back = CodebookEncoding(format, codes, untile_groups(packed.scales, n), encoding.gain)
        np.testing.assert_array_equal(back.codes, encoding.codes)
        np.testing.assert_array_equal(back.dequantize(), encoding.dequantize())
        gain_bits = 32
        written = packed.packed.nbytes + packed.scales.nbytes + packed.zero_points.nbytes + format.table.nbytes
        assert encoding.cost_bits() == format.cost_bits(n, k) == 8 * written + gain_bits


@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize(("bits", "window"), [(2, 4), (3, 3), (1, 6)])
def test_arrays_bring_back_the_encoding(bits: int, window: int, group_size: int | None) -> None:
    encoding = random_codebook(CodebookFormat(bits, window, group_size), 45, 100)
    back = encoding_from_arrays(encoding_to_arrays(encoding))
    assert isinstance(back, CodebookEncoding)
    assert back.format == encoding.format
    np.testing.assert_array_equal(back.codes, encoding.codes)
    np.testing.assert_array_equal(back.dequantize(), encoding.dequantize())


@pytest.mark.parametrize(("bits", "window"), FORMATS)
def test_tables_reach_the_error_they_state(bits: int, window: int) -> None:
    """It is that of paths of 64 steps with any start and end."""
    table = GAUSSIAN_TABLES[bits, window]
    levels = (np.array(table.entries, np.float32) - np.float32(63.5)) * np.float32(table.step)
    samples = np.random.default_rng(0).standard_normal((64, 4000)).astype(np.float32)
    costs = np.square(samples[..., None] - levels)
    index = open_path(costs, bits, window)
    error = float(np.square(samples - levels[index]).mean())
    assert BOUND[bits] < table.error
    assert error == pytest.approx(table.error, rel=REACHED)


@pytest.mark.parametrize(("bits", "window"), FORMATS)
def test_a_gaussian_weight_pays_little_more(bits: int, window: int) -> None:
    weight = np.random.default_rng(1).standard_normal((2048, 192)).astype(np.float32)
    encoding = trellis_nearest(weight, CodebookFormat(bits, window))
    error = float(np.square(encoding.dequantize() - weight).mean())
    stated = GAUSSIAN_TABLES[bits, window].error
    closing = 0 if bits == window else CLOSED
    assert stated * (1 - FITTED) <= error <= stated * (1 + FITTED + closing)


@pytest.mark.parametrize(("bits", "window"), TRELLISES)
def test_a_window_beats_levels_for_each_weight_alone(bits: int, window: int) -> None:
    alone = GAUSSIAN_TABLES.get((bits, bits))
    largest_alone = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}[bits]  # Max (1960)
    assert GAUSSIAN_TABLES[bits, window].error < largest_alone
    assert alone is None or GAUSSIAN_TABLES[bits, window].error < alone.error


def test_labels_tell_formats_apart() -> None:
    labels = {CodebookFormat(*key, group).label() for key in FORMATS for group in (None, 32, 64)}
    assert len(labels) == 3 * len(FORMATS)
    assert CodebookFormat(2, 4).label() == "trellis 2-bit w4 column"


@pytest.mark.parametrize(("bits", "window"), [(5, 6), (0, 4), (2, 7), (3, 2), (2, 1)])
def test_formats_without_a_table_are_refused(bits: int, window: int) -> None:
    with pytest.raises(ValueError, match=f"no table for {bits} bits with window {window}; there are 1 with"):
        CodebookFormat(bits, window)


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    format = CodebookFormat(2, 4, 32)
    with pytest.raises(ValueError, match="don't fit trellis 2-bit w4 g32"):
        CodebookEncoding(format, np.zeros((33, 64), np.uint8), np.ones((33, 2), np.float16))
    with pytest.raises(ValueError, match="don't fit"):
        CodebookEncoding(format, np.zeros((64, 64), np.uint8), np.ones((33, 1), np.float16))
    with pytest.raises(ValueError, match="uint8 and scales float16"):
        CodebookEncoding(format, np.zeros((64, 64), np.uint8), np.ones((33, 2), np.float32))
    with pytest.raises(ValueError, match="group_size must be"):
        CodebookFormat(2, 4, 40)


@pytest.mark.parametrize(("bits", "window"), TRELLISES)
def test_runs_long_enough_beat_equal_steps(bits: int, window: int) -> None:
    """Twice the window is enough, in steps of 32 outputs; a run of one step follows itself and reaches few levels."""
    tiles = max(4, -(-2 * window // bits))
    weight = np.random.default_rng(0).standard_normal((32 * tiles, 64)).astype(np.float32)
    errors = {
        n: [
            relative_error(weight[:n], encoding.dequantize())
            for encoding in (
                trellis_nearest(weight[:n], CodebookFormat(bits, window)),
                nearest(weight[:n], UniformFormat(bits, None, ZeroPoint.MIDRISE)),
            )
        ]
        for n in (32, 32 * tiles)
    }
    assert errors[32 * tiles][0] < errors[32 * tiles][1]
    assert errors[32][0] > errors[32][1]
