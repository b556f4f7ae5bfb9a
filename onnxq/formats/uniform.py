"""The uniform format: equidistant levels, a float16 step per group, and a zero point that may be fractional.

    W[n, k] = gain * scale[n, g] * (code[n, k] - zero_point[n, g] / 2**(8 - bits)),    g = k // group_size

Zero points are 8-bit fixed point with ``8 - bits`` fraction bits, so every zero in [0, 2**bits) has one: the
2-bit levels -1.5, -0.5, 0.5, 1.5 have zero point 96 = 1.5 * 64. It is also what lets stock ONNX Runtime run any
width: a code shifted to the top of its byte and the zero point are then two uint8 of one DequantizeLinear.
`gain` is one power of two per weight that keeps the float16 scales of very small or very large weights normal.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping

import numpy as np

from onnxq.formats import packing

_SCALE_BITS = 16
_ZERO_POINT_BITS = 8
_GAIN_BITS = 32
# The largest scale is brought to [2**10, 2**11): float16 then has 24 octaves of normal numbers below it.
_LARGEST_SCALE_EXPONENT = 10


class ZeroPoint(enum.Enum):
    """Where the levels lie around zero."""

    MIDRISE = "midrise"
    """One for the whole weight, half-way between two levels: (2**bits - 1) / 2. Best at 1 and 2 bits."""
    INTEGER = "integer"
    """One for the whole weight, the level 2**(bits - 1): zero is a level."""
    PER_GROUP = "per-group"
    """A fraction per group, 8 bits each: for groups whose weights lie to one side."""
    PER_GROUP_INTEGER = "per-group-integer"
    """A whole number per group, 8 bits each: what standard DequantizeLinear can store beside int2 and int4."""

    @property
    def shared(self) -> bool:
        """Whether the whole weight has one zero point."""
        return self in (ZeroPoint.MIDRISE, ZeroPoint.INTEGER)

    @property
    def whole(self) -> bool:
        """Whether zero points are whole numbers of steps."""
        return self in (ZeroPoint.INTEGER, ZeroPoint.PER_GROUP_INTEGER)


@dataclasses.dataclass(frozen=True)
class UniformFormat:
    """Width, grouping and zero point of a uniform grid.

    Attributes:
        bits: 1 to 8.
        group_size: weights along K that share a scale, a multiple of 32; None means the whole column.
        zero_point: see `ZeroPoint`.
        one_scale: all columns have one scale, of which each keeps a copy here.
    """

    bits: int
    group_size: int | None = 32
    zero_point: ZeroPoint = ZeroPoint.MIDRISE
    one_scale: bool = False

    def __post_init__(self) -> None:
        if self.one_scale and not (self.group_size is None and self.zero_point.shared):
            raise ValueError("one scale for a weight goes with whole columns and one zero point")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, not {self.bits}")
        if self.group_size is not None and (self.group_size < 32 or self.group_size % packing.BLOCK_K):
            raise ValueError(
                f"group_size must be a multiple of {packing.BLOCK_K}, or None for the whole column, "
                f"not {self.group_size}"
            )

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 1 << self.bits

    def effective_group(self, k: int) -> int:
        """The group size for K inputs: the whole column is K rounded up to whole blocks."""
        column = packing.ceil_div(k, packing.BLOCK_K) * packing.BLOCK_K
        return column if self.group_size is None else min(self.group_size, column)

    def groups(self, k: int) -> int:
        """Number of groups in a column of K inputs; the last may be ragged."""
        return packing.ceil_div(k, self.effective_group(k))

    def shared_zero(self) -> float:
        """The zero, in steps, of a format with one zero point for the whole weight."""
        if self.zero_point is ZeroPoint.MIDRISE:
            return (self.levels - 1) / 2
        if self.zero_point is ZeroPoint.INTEGER:
            return float(self.levels // 2)
        raise ValueError(f"{self.zero_point.value} zero points differ from group to group")

    def quantize_zero(self, zero: np.ndarray | float) -> np.ndarray:
        """Zero, in steps, as the uint8 fixed point that is stored."""
        fraction = 1 << (8 - self.bits)
        stored = (
            np.rint(np.asarray(zero, np.float64)) * fraction
            if self.zero_point.whole
            else np.rint(np.asarray(zero, np.float64) * fraction)
        )
        largest = (self.levels - 1) * fraction if self.zero_point.whole else 255
        fixed: np.ndarray = np.clip(stored, 0, largest).astype(np.uint8)
        return fixed

    def zero_of(self, zero_points: np.ndarray) -> np.ndarray:
        """Stored zero points in steps, float32."""
        steps: np.ndarray = zero_points.astype(np.float32) / np.float32(1 << (8 - self.bits))
        return steps

    def cost_bits(self, n: int, k: int) -> int:
        """Bits on disk of a weight [N, K]: codes, scales, zero points, gain and padding."""
        tiles, blocks, *_ = packing.packed_shape(n, k, self.bits)
        side = tiles * packing.TILE_N * self.groups(k)
        zero_points = 1 if self.zero_point.shared else side
        codes = tiles * blocks * packing.TILE_N * packing.BLOCK_K * self.bits
        return codes + side * _SCALE_BITS + zero_points * _ZERO_POINT_BITS + _GAIN_BITS

    def label(self) -> str:
        """Short name for reports."""
        group = "one scale" if self.one_scale else "column" if self.group_size is None else f"g{self.group_size}"
        return f"uniform {self.bits}-bit {group} {self.zero_point.value}"


@dataclasses.dataclass(frozen=True)
class PackedUniform:
    """The arrays of a uniform encoding as the kernel reads them.

    Attributes:
        packed: uint8 [T, B, bits, 32, 4].
        scales: float16 [T, G, 32].
        zero_points: uint8 [T, G, 32], or [1, 1, 1] when shared.
    """

    packed: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray


@dataclasses.dataclass(frozen=True)
class UniformEncoding:
    """One weight [N, K] in a uniform format.

    Attributes:
        format: the grid.
        codes: uint8 [N, K].
        scales: float16 [N, G].
        zero_points: uint8 fixed point, [N, G], or [1, 1] when the format shares one.
        gain: power of two that multiplies every scale.
    """

    format: UniformFormat
    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    gain: float = 1.0

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        groups = self.format.groups(k)
        zeros = (1, 1) if self.format.zero_point.shared else (n, groups)
        if self.scales.shape != (n, groups) or self.zero_points.shape != zeros:
            raise ValueError(
                f"{self.format.label()} of a [{n}, {k}] weight needs scales [{n}, {groups}] and zero points "
                f"{list(zeros)}, not {list(self.scales.shape)} and {list(self.zero_points.shape)}"
            )
        byte, half = np.dtype(np.uint8), np.dtype(np.float16)
        if (self.codes.dtype, self.scales.dtype, self.zero_points.dtype) != (byte, half, byte):
            raise ValueError("codes and zero points must be uint8 and scales float16")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    def effective_scales(self) -> np.ndarray:
        """Gain * scale, float32 [N, G]."""
        effective: np.ndarray = self.scales.astype(np.float32) * np.float32(self.gain)
        return effective

    def dequantize(self) -> np.ndarray:
        """The weight that every runtime computes with, float32 [N, K]."""
        _, k = self.shape
        group = self.format.effective_group(k)
        scales = np.repeat(self.effective_scales(), group, axis=1)[:, :k]
        zeros = self.format.zero_of(self.zero_points)
        if not self.format.zero_point.shared:
            zeros = np.repeat(zeros, group, axis=1)[:, :k]
        weight: np.ndarray = (self.codes.astype(np.float32) - zeros) * scales
        return weight

    def cost_bits(self) -> int:
        """Bits on disk, everything counted."""
        return self.format.cost_bits(*self.shape)

    def pack(self) -> PackedUniform:
        """The arrays in kernel order."""
        zero_points = (
            self.zero_points.reshape(1, 1, 1)
            if self.format.zero_point.shared
            else packing.tile_groups(self.zero_points)
        )
        return PackedUniform(
            packing.pack_codes(self.codes, self.format.bits), packing.tile_groups(self.scales), zero_points
        )

    @classmethod
    def unpack(cls, arrays: PackedUniform, format: UniformFormat, n: int, k: int, gain: float) -> UniformEncoding:
        """The encoding behind packed arrays."""
        zero_points = (
            arrays.zero_points.reshape(1, 1)
            if format.zero_point.shared
            else packing.untile_groups(arrays.zero_points, n)
        )
        codes = packing.unpack_codes(arrays.packed, n, k)
        return cls(format, codes, packing.untile_groups(arrays.scales, n), zero_points, gain)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as named arrays, for a file; codes are packed."""
        packed = self.pack()
        layout = [self.format.bits, self.format.group_size or 0, *self.shape, int(self.format.one_scale)]
        return {
            **dataclasses.asdict(packed),
            "layout": np.array(layout, np.int64),
            "zero_point": np.array(self.format.zero_point.value),
            "gain": np.array(self.gain),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> UniformEncoding:
        """Undoes `to_arrays`."""
        bits, group_size, n, k, one_scale = (int(value) for value in arrays["layout"])
        format = UniformFormat(bits, group_size or None, ZeroPoint(str(arrays["zero_point"])), bool(one_scale))
        packed = PackedUniform(arrays["packed"], arrays["scales"], arrays["zero_points"])
        return cls.unpack(packed, format, n, k, float(arrays["gain"]))


def choose_gain(scales: np.ndarray) -> float:
    """The power of two that brings the largest of the scales (float, any shape) to [2**10, 2**11)."""
    largest = float(np.max(scales, initial=0.0))
    if largest <= 0.0:
        return 1.0
    # frexp gives a mantissa in [0.5, 1), hence the extra one; below -126 float32 is no longer normal.
    return math.ldexp(1.0, max(math.frexp(largest)[1] - 1 - _LARGEST_SCALE_EXPONENT, -126))


def round_scales(scales: np.ndarray, gain: float) -> np.ndarray:
    """Scales (float, any shape) as the float16 that is stored beside `gain`."""
    return (np.asarray(scales, np.float64) / gain).astype(np.float16)
