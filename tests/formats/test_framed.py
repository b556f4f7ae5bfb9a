"""Formats in frames: shapes, prices, and what a stored matrix means as a weight."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from onnxq.formats.codebook import CodebookFormat
from onnxq.formats.files import AnyFormat, encoding_from_arrays, encoding_to_arrays
from onnxq.formats.framed import FramedEncoding, FramedFormat, frames_of, from_frames, into_frames
from onnxq.formats.uniform import UniformEncoding, UniformFormat, ZeroPoint
from onnxq.frames import Frame
from tests.encodings import random_encoding, random_framed, relative_error

FLOAT32 = 4e-6
UNIFORM, TRELLIS = UniformFormat(2, None, ZeroPoint.MIDRISE), CodebookFormat(2, 4)
SIDES = [(Fraction(1), None), (Fraction(9, 8), None), (Fraction(1), Fraction(1)), (Fraction(5, 4), Fraction(3, 2))]


def dense(frame: Frame) -> np.ndarray:
    """A [d', d], a unit vector at a time."""
    return np.stack([frame.analysis(unit) for unit in np.eye(frame.shape.size)], axis=1)


@pytest.mark.parametrize("inner", [UNIFORM, TRELLIS], ids=["uniform", "trellis"])
@pytest.mark.parametrize(("inputs", "outputs"), SIDES)
@pytest.mark.parametrize(("n", "k"), [(48, 64), (50, 100), (1, 33), (257, 40)])
def test_a_weight_is_the_stored_matrix_between_two_frames(
    n: int, k: int, inputs: Fraction, outputs: Fraction | None, inner: UniformFormat | CodebookFormat
) -> None:
    encoding = random_framed(FramedFormat(inner, inputs, outputs), n, k)
    weight = encoding.inner.dequantize().astype(np.float64) @ dense(encoding.input_frame)
    if encoding.output_frame is not None:
        weight = dense(encoding.output_frame).T @ weight
    assert encoding.shape == (n, k)
    assert relative_error(encoding.dequantize(), weight) <= FLOAT32
    assert encoding.inner.shape == encoding.format.coefficients(n, k)
    assert encoding.cost_bits() == encoding.inner.cost_bits() == encoding.format.cost_bits(n, k)


@pytest.mark.parametrize(("inputs", "outputs"), SIDES)
def test_frames_undo_each_other(inputs: Fraction, outputs: Fraction | None) -> None:
    weight = np.random.default_rng(0).standard_normal((50, 100)).astype(np.float32)
    frames = frames_of(FramedFormat(UNIFORM, inputs, outputs), 50, 100)
    coefficients = into_frames(weight, *frames)
    left = weight if frames[1] is None else dense(frames[1]) @ weight
    assert relative_error(coefficients, left @ dense(frames[0]).T) <= FLOAT32
    assert coefficients.flags.c_contiguous
    assert relative_error(from_frames(coefficients, *frames), weight) <= FLOAT32


@pytest.mark.parametrize(
    "inner", [UNIFORM, TRELLIS, UniformFormat(4, 64, ZeroPoint.PER_GROUP)], ids=lambda f: f.label()
)
@pytest.mark.parametrize(("inputs", "outputs"), SIDES)
def test_arrays_bring_back_the_encoding(
    inner: UniformFormat | CodebookFormat, inputs: Fraction, outputs: Fraction | None
) -> None:
    encoding = random_framed(FramedFormat(inner, inputs, outputs, seed=3), 50, 100)
    back = encoding_from_arrays(encoding_to_arrays(encoding))
    assert isinstance(back, FramedEncoding)
    assert back.format == encoding.format
    assert back.input_frame.key == encoding.input_frame.key
    assert (back.output_frame is None) == (outputs is None)
    np.testing.assert_array_equal(back.dequantize(), encoding.dequantize())


def test_arrays_of_a_plain_encoding_bring_it_back() -> None:
    encoding = random_encoding(UniformFormat(3, 32, ZeroPoint.PER_GROUP), 45, 100)
    back = encoding_from_arrays(encoding_to_arrays(encoding))
    assert isinstance(back, UniformEncoding)
    np.testing.assert_array_equal(back.dequantize(), encoding.dequantize())


def test_weights_of_one_width_share_a_frame() -> None:
    format = FramedFormat(TRELLIS, Fraction(9, 8))
    first, second = (random_framed(format, n, 256, n) for n in (64, 96))
    assert first.input_frame.key == second.input_frame.key
    assert random_framed(format, 64, 512).input_frame.key != first.input_frame.key
    other_seed = random_framed(FramedFormat(TRELLIS, Fraction(9, 8), seed=1), 64, 256)
    assert other_seed.input_frame.key != first.input_frame.key


def test_redundancy_costs_what_it_adds() -> None:
    plain, wide = (FramedFormat(UNIFORM, ratio).cost_bits(64, 512) for ratio in (Fraction(1), Fraction(9, 8)))
    assert plain == UNIFORM.cost_bits(64, 512)
    assert wide - plain == 64 * 64 * 2
    both = FramedFormat(UNIFORM, Fraction(1), Fraction(3, 2))
    assert both.coefficients(64, 512) == (96, 512)


def test_labels() -> None:
    formats: list[AnyFormat] = [FramedFormat(TRELLIS, *sides) for sides in SIDES]
    assert [format.label() for format in formats] == [
        "trellis 2-bit w4 column in frame 1",
        "trellis 2-bit w4 column in frame 1.125",
        "trellis 2-bit w4 column in frame 1 and 1 on outputs",
        "trellis 2-bit w4 column in frame 1.25 and 1.5 on outputs",
    ]
    assert formats[0].bits == 2
