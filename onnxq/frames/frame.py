"""A frame: an exact transform of R^d to d' >= d coefficients, and its transpose, which undoes it.

    A = (I (x) B^T) (mixing) diag(signs)        A [d', d],  A^T A = I

A weight W is rounded as D = W A^T, and the layer computes D (A x). Mixing makes the coefficients look Gaussian, which
few levels suit best; B, the block of a tight fusion frame, gives more coefficients than inputs, so that errors of
rounding can go where synthesis does not see them.

The coordinates are seen as [left, right], right = middle * odd, so that A is one small product from each side: that is
what the op's function body does (`onnxq.ops.frame`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from onnxq.formats.packing import BLOCK_K, ceil_div
from onnxq.frames.fusion import fusion_frame, realify
from onnxq.frames.mixing import hadamard, hartley, mix, pack_signs, unpack_signs

_LARGEST_BLOCK = 128
"""Widest block, in inputs: a product with it costs so many multiplications per coefficient."""
_LARGEST_ODD = 512
_PADDINGS = tuple(2**power for power in range(1, 9))


@dataclasses.dataclass(frozen=True)
class FrameShape:
    """What a frame does to sizes.

    Attributes:
        size: d, inputs.
        left, middle, odd: factors of the padded size: two powers of two and an odd number.
        block_inputs, block_outputs: size of the block; (1, 1) without redundancy.
        subspaces: of the fusion frame; 1 without.
    """

    size: int
    left: int
    middle: int
    odd: int
    block_inputs: int = 1
    block_outputs: int = 1
    subspaces: int = 1

    @property
    def padded(self) -> int:
        """Inputs with the zeros that are put behind them."""
        return self.left * self.middle * self.odd

    @property
    def coefficients(self) -> int:
        """Number of coefficients d'."""
        return self.padded // self.block_inputs * self.block_outputs

    @property
    def redundancy(self) -> float:
        """Coefficients per input."""
        return self.coefficients / self.size


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """A frame with its arrays.

    Attributes:
        shape: the sizes.
        signs: uint8 [ceil(padded / 8)], a bit per coordinate, lowest first; set where it is negated.
        block: float32 [block_inputs, block_outputs], block @ block.T = I.
    """

    shape: FrameShape
    signs: np.ndarray
    block: np.ndarray

    @property
    def key(self) -> tuple[FrameShape, bytes]:
        """Equal for frames that do the same."""
        return self.shape, self.signs.tobytes()

    def analysis(self, values: np.ndarray) -> np.ndarray:
        """Coefficients of vectors along the last axis: float [..., d] to [..., d'], of the same dtype."""
        shape, dtype = self.shape, values.dtype
        if shape.padded > shape.size:
            values = np.concatenate([values, np.zeros((*values.shape[:-1], shape.padded - shape.size), dtype)], axis=-1)
        work = mix(values * self._signs(dtype), shape.left * shape.middle, shape.odd)
        if shape.block_outputs == 1:
            return work
        blocks = work.reshape(*values.shape[:-1], -1, shape.block_inputs) @ self.block.astype(dtype)
        coefficients: np.ndarray = blocks.reshape(*values.shape[:-1], shape.coefficients)
        return coefficients

    def synthesis(self, coefficients: np.ndarray) -> np.ndarray:
        """The transpose: float [..., d'] to [..., d]."""
        shape, dtype = self.shape, coefficients.dtype
        leading = coefficients.shape[:-1]
        work = coefficients
        if shape.block_outputs > 1:
            work = work.reshape(*leading, -1, shape.block_outputs) @ self.block.T.astype(dtype)
        work = mix(work.reshape(*leading, shape.padded), shape.left * shape.middle, shape.odd)
        signed: np.ndarray = (work * self._signs(dtype))[..., : shape.size]
        return signed

    def carry(self, second_moment: np.ndarray) -> np.ndarray:
        """A H A^T: the second moment [d', d'] of the coefficients of inputs with second moment H [d, d].

        Its rank is that of H, at most d. Memory: two matrices [d', d'].
        """
        return np.ascontiguousarray(self.analysis(np.ascontiguousarray(self.analysis(second_moment).T)))

    def matrices(self) -> dict[str, np.ndarray]:
        """The frame as what it does to coordinates seen as X [left, right]: left @ (signs * X) @ right.

        Returns:
            "signs" float32 [padded], "left" float32 [left, left] (symmetric), "right" float32 [right, right'].
        """
        shape = self.shape
        width = shape.middle * shape.odd
        right = np.kron(hadamard(shape.middle), hartley(shape.odd)).reshape(width, -1, shape.block_inputs) @ self.block
        return {
            "signs": unpack_signs(self.signs, shape.padded),
            "left": hadamard(shape.left).astype(np.float32),
            "right": right.reshape(width, -1).astype(np.float32),
        }

    def cost_bits(self) -> int:
        """Bits of the stored arrays."""
        return 8 * (self.signs.nbytes + self.block.nbytes)

    def _signs(self, dtype: np.dtype) -> np.ndarray:
        return unpack_signs(self.signs, self.shape.padded).astype(dtype)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as named arrays, for a file."""
        return {"signs": self.signs, "block": self.block, "shape": np.array(dataclasses.astuple(self.shape), np.int64)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Frame:
        """Undoes `to_arrays`."""
        return cls(FrameShape(*map(int, arrays["shape"])), arrays["signs"], arrays["block"])


def frame_shape(size: int, redundancy: Fraction = Fraction(1)) -> FrameShape:
    """The sizes of a frame of about a redundancy.

    Packed weights are stored in whole runs of `BLOCK_K`, so the coefficients fill them: their number is the multiple of
    `BLOCK_K` nearest to redundancy * size for which there is a small block. `FrameShape.redundancy` says what became of
    the redundancy.

    Args:
        size: d, 1 or more.
        redundancy: 1 or more; 1 means no block and no coefficients but those of the mixing.

    Raises:
        ValueError: out of range.
    """
    if size < 1 or not 1 <= redundancy <= 8:
        raise ValueError(f"a frame needs a size of 1 or more and a redundancy of 1 to 8, not {size} and {redundancy}")
    if redundancy == 1:
        return _split(size, _pad(size, 1), 1, 1)
    wanted = redundancy * size / BLOCK_K
    least = ceil_div(size, BLOCK_K)
    # Sizes whose halves have few divisors take a few more zeros. The frame's inputs are pairs, hence even.
    paddings = sorted({_pad(size, multiple) for multiple in _PADDINGS})
    choices = range(least, least + 2 * math.ceil(wanted))
    for blocks in sorted(choices, key=lambda blocks: (abs(blocks - wanted), blocks)):
        for padded in paddings:
            ratio = Fraction(blocks * BLOCK_K, padded)
            inputs, outputs = 2 * ratio.denominator, 2 * ratio.numerator
            if ratio >= 1 and inputs <= _LARGEST_BLOCK and padded % inputs == 0:
                return _split(size, padded, inputs, outputs)
    raise ValueError(f"no frame of about redundancy {float(redundancy):g} for {size} inputs")


def make_frame(shape: FrameShape, seed: int = 0) -> Frame:
    """The frame of these sizes, with signs drawn from a seed.

    One seed gives one frame for a size: weights that read the same tensor share it, and its analysis.
    """
    generator = np.random.Generator(np.random.PCG64([seed, shape.padded]))
    signs = pack_signs(generator.integers(0, 2, shape.padded).astype(bool))
    block = np.ones((1, 1), np.float32)
    if shape.block_outputs > 1:
        dimension = shape.block_outputs // 2 // shape.subspaces
        rows = realify(fusion_frame(shape.subspaces, dimension, shape.block_inputs // 2))
        block = np.ascontiguousarray(rows.reshape(shape.block_outputs, shape.block_inputs).T, np.float32)
    return Frame(shape, signs, block)


def _pad(size: int, multiple: int) -> int:
    """The least multiple of at least `multiple` that has a small odd factor."""
    while True:
        padded = ceil_div(size, multiple) * multiple
        if padded // (padded & -padded) <= _LARGEST_ODD:
            return padded
        multiple *= 2


def _split(size: int, padded: int, inputs: int, outputs: int) -> FrameShape:
    """The cheapest pair of matrices for the function body."""
    power = padded & -padded
    odd = padded // power
    best, least = None, math.inf
    left = 1
    while left <= power:
        right = padded // left
        cost = left * outputs / inputs + right * outputs / inputs
        if right % inputs == 0 and cost < least:
            best = FrameShape(size, left, power // left, odd, inputs, outputs, max(1, outputs // 2))
            least = cost
        left *= 2
    assert best is not None, "a block divides the padded size, hence the row that is all of it"
    return best
