"""Frames: exact, mixing everything with everything, of the sizes that were asked for."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.formats.packing import BLOCK_K
from onnxq.frames import Frame, FrameShape, frame_shape, make_frame
from onnxq.frames.mixing import hadamard, hartley, unpack_signs
from tests.encodings import relative_error

IDENTITY = 1e-6
"""Largest entry of A^T A - I: the blocks are float32."""
FLOAT32 = 4e-6
NEAR = 0.1
"""How far a redundancy may be from the one asked for, from 256 inputs on, whatever their number."""

RATIOS = [Fraction(1), Fraction(101, 100), Fraction(9, 8), Fraction(5, 4), Fraction(3, 2), Fraction(2), Fraction(3)]
SIZES = [1, 2, 3, 5, 31, 32, 33, 100, 127, 257, 384, 509, 521, 768, 1031, 1536, 2304, 3072, 4099, 11008, 14336, 28672]


def frame_of(size: int, ratio: Fraction = Fraction(1), seed: int = 0) -> Frame:
    return make_frame(frame_shape(size, ratio), seed)


def dense(frame: Frame) -> np.ndarray:
    """A [d', d] from its definition: signs, one Kronecker product, blocks; float64."""
    shape = frame.shape
    mixing = np.kron(hadamard(shape.left), np.kron(hadamard(shape.middle), hartley(shape.odd)))
    blocks = np.kron(np.eye(shape.padded // shape.block_inputs), frame.block.astype(np.float64).T)
    return (blocks @ mixing * unpack_signs(frame.signs, shape.padded))[:, : shape.size]


def check_exact(frame: Frame) -> None:
    """A^T A = I, on vectors: synthesis undoes analysis, and norms are kept."""
    x = np.random.default_rng(1).standard_normal((2, frame.shape.size))
    u = frame.analysis(x)
    assert u.shape == (2, frame.shape.coefficients)
    assert np.abs(frame.synthesis(u) - x).max() <= IDENTITY * np.abs(x).max()
    assert np.abs(u @ u.T - x @ x.T).max() <= IDENTITY * np.square(x).sum(axis=1).max()


def check_shape(shape: FrameShape, size: int, ratio: Fraction) -> None:
    assert shape.size == size
    assert shape.padded == shape.left * shape.middle * shape.odd >= size
    assert shape.odd % 2 == 1
    assert all(power & (power - 1) == 0 for power in (shape.left, shape.middle))
    assert shape.middle * shape.odd % shape.block_inputs == 0
    if ratio == 1:
        assert (shape.block_inputs, shape.block_outputs) == (1, 1)
    else:
        assert shape.coefficients % BLOCK_K == 0
        assert shape.coefficients >= shape.padded


@pytest.mark.parametrize("size", SIZES)
def test_analysis_is_undone(size: int) -> None:
    for ratio in RATIOS if size <= 4099 else (Fraction(1), Fraction(9, 8), Fraction(5, 4)):
        frame = frame_of(size, ratio)
        check_shape(frame.shape, size, ratio)
        check_exact(frame)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 28672), st.sampled_from(RATIOS[:6]), st.integers(0, 2**31))
def test_any_size_has_an_exact_frame(size: int, ratio: Fraction, seed: int) -> None:
    shape = frame_shape(size, ratio)
    check_shape(shape, size, ratio)
    if size >= 256:
        assert abs(shape.redundancy / ratio - 1) <= NEAR
    check_exact(make_frame(shape, seed))


@pytest.mark.parametrize("size", [384, 512, 768, 1024, 1536, 2048, 3072, 4096, 11008, 14336, 28672])
@pytest.mark.parametrize("ratio", [1.0, 1.125, 1.25, 1.5])
def test_usual_sizes_get_the_redundancy_that_was_asked_for(size: int, ratio: float) -> None:
    shape = frame_shape(size, Fraction(ratio))
    assert abs(shape.coefficients - ratio * size) <= BLOCK_K / 2
    assert shape.padded == size


def test_few_inputs_fill_whole_blocks() -> None:
    assert frame_shape(33, Fraction(9, 8)).coefficients == 64
    assert frame_shape(64, Fraction(9, 8)).coefficients == 64
    assert frame_shape(256, Fraction(9, 8)).coefficients == 288


@pytest.mark.parametrize(("size", "ratio"), [(0, 1), (-3, 1), (32, Fraction(99, 100)), (32, 9)])
def test_sizes_out_of_range_are_refused(size: int, ratio: Fraction) -> None:
    with pytest.raises(ValueError, match="a size of 1 or more and a redundancy of 1 to 8"):
        frame_shape(size, Fraction(ratio))


@pytest.mark.parametrize("size", [384, 768, 1536, 11008])
@pytest.mark.parametrize("ratio", [Fraction(1), Fraction(9, 8)])
def test_every_input_reaches_every_coefficient(size: int, ratio: Fraction) -> None:
    """And alike: a block lets some sums cancel, and gathers no more than a few times the mean share."""
    frame = frame_of(size, ratio)
    picked = np.random.default_rng(0).choice(size, 8, replace=False)
    units = np.zeros((8, size))
    units[range(8), picked] = 1
    shares = np.abs(frame.analysis(units)) * np.sqrt(frame.shape.coefficients)
    if ratio == 1:
        assert shares.min() > 1e-3
        assert shares.max() <= np.sqrt(2) + 1e-6  # Hadamard's are all 1, Hartley's up to cos + sin
    else:
        assert (shares > 1e-3).mean() > 0.9
        assert shares.max() < 5


def test_a_loud_input_looks_gaussian_afterwards() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 768))
    x[:, 5] *= 100
    u = frame_of(768).analysis(x)
    u /= np.sqrt(np.square(u).mean(axis=1, keepdims=True))
    assert np.abs(x).max(axis=1).mean() / np.sqrt(np.square(x).mean()) > 15
    assert np.abs(u).max() < 6


@pytest.mark.parametrize("size", [1, 33, 96, 100, 384, 521])
@pytest.mark.parametrize("ratio", [Fraction(1), Fraction(9, 8), Fraction(3, 2)])
def test_analysis_synthesis_carry_and_matrices_are_one_matrix(size: int, ratio: Fraction) -> None:
    frame = frame_of(size, ratio, seed=3)
    matrix = dense(frame)
    rng = np.random.default_rng(0)
    x, v = rng.standard_normal((2, 3, size)), rng.standard_normal((3, frame.shape.coefficients))
    assert np.abs(matrix.T @ matrix - np.eye(size)).max() <= IDENTITY
    np.testing.assert_allclose(frame.analysis(x), x @ matrix.T, atol=IDENTITY)
    np.testing.assert_allclose(frame.synthesis(v), v @ matrix, atol=IDENTITY)
    inputs = rng.standard_normal((4 * size, size))
    moment = inputs.T @ inputs / len(inputs)
    carried = frame.carry(moment)
    np.testing.assert_allclose(carried, matrix @ moment @ matrix.T, atol=IDENTITY * moment.max())
    assert carried.flags.c_contiguous
    parts = frame.matrices()
    shape = frame.shape
    padded = np.pad(x, ((0, 0), (0, 0), (0, shape.padded - size))) * parts["signs"]
    halves = padded.reshape(2, 3, shape.left, -1)
    product = (parts["left"] @ halves @ parts["right"]).reshape(2, 3, -1)
    np.testing.assert_allclose(product, frame.analysis(x), atol=FLOAT32)
    assert all(part.dtype == np.float32 for part in parts.values())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_types_are_kept_and_arguments_untouched(dtype: type) -> None:
    frame = frame_of(100, Fraction(9, 8))
    x = np.random.default_rng(0).standard_normal((3, 100)).astype(dtype)
    before = x.copy()
    u = frame.analysis(x)
    assert u.dtype == frame.synthesis(u).dtype == dtype
    np.testing.assert_array_equal(x, before)
    assert relative_error(frame.synthesis(u), x) <= FLOAT32


def test_signs_are_bits_and_half_of_them_are_set() -> None:
    frame = frame_of(11008)
    assert frame.signs.dtype == np.uint8
    assert frame.signs.shape == (11008 // 8,)
    assert abs(np.unpackbits(frame.signs).mean() - 0.5) < 0.03
    assert frame.cost_bits() == 11008 + 32
    negative = np.unpackbits(frame.signs, bitorder="little").astype(bool)
    unsigned = Frame(frame.shape, np.zeros_like(frame.signs), frame.block)
    x = np.random.default_rng(0).standard_normal(11008)
    np.testing.assert_array_equal(frame.analysis(x), unsigned.analysis(np.where(negative, -x, x)))


def test_one_seed_one_frame() -> None:
    first, again, other = (frame_of(768, Fraction(9, 8), seed) for seed in (0, 0, 1))
    assert first.key == again.key != other.key
    np.testing.assert_array_equal(first.block, again.block)
    assert frame_of(768).key != frame_of(768, Fraction(9, 8)).key


@pytest.mark.parametrize("ratio", [Fraction(1), Fraction(9, 8)])
def test_arrays_bring_back_the_frame(ratio: Fraction) -> None:
    frame = frame_of(100, ratio, seed=7)
    back = Frame.from_arrays({name: array.copy() for name, array in frame.to_arrays().items()})
    assert back.shape == frame.shape
    assert back.key == frame.key
    np.testing.assert_array_equal(back.block, frame.block)
    assert back.cost_bits() == frame.cost_bits() == 8 * (frame.signs.nbytes + frame.block.nbytes)
