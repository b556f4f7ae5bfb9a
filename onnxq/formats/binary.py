"""The binary format: every weight a sum of scales with signs, one bit for each sign.

    W[n, k] = gain * (sum_p scale[p, n, g] * (2 * bit[p, n, k] - 1) + offset[n, g]),    g = k // group_size

A *plane* is a bit of every weight and a scale of every group, so `b` planes are 2**b levels whose distances follow the
weights. Rows may have different numbers of planes: those with most are stored first, and plane p belongs to the first
V_p rows. A table thus spends bits word by word.

Uniform weights are binary ones: their codes are the bits, and scales double from plane to plane.

The packed layout is that of a look-up by four inputs. Plane p is bytes [T, C, 32] with T = ceil(V_p / 64) tiles of rows
and C = 8 * ceil(K / 32) chunks of four inputs; byte j holds the key of row 64 t + j in its low nibble and that of row
64 t + 32 + j in its high one, and bit i of a key belongs to input 4 c + i.

Sources: Chung et al., Extremely low bit Transformer quantization for on-device neural machine translation (arXiv
2009.07453); Park et al., LUT-GEMM (arXiv 2206.09557), for groups, offsets and uniform weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np

from onnxq.formats.packing import BLOCK_K, ceil_div
from onnxq.formats.uniform import UniformEncoding, choose_gain

MOST_PLANES = 6
TILE = 64
"""Rows of a tile."""
CHUNK = 4
"""Inputs of a key."""
_HALF = TILE // 2
_SCALE_BITS, _RANK_BITS, _GAIN_BITS = 16, 32, 32
NATURAL = np.array([-1], np.int32)
"""The rank of rows that lie as they are."""


@dataclasses.dataclass(frozen=True)
class BinaryFormat:
    """Planes of every row, groups, and what is stored beside them.

    Attributes:
        planes: how many rows have at least 1, 2, ... planes: V_1 >= V_2 >= ..., of which V_1 is N.
        group_size: inputs along K that share scales, a multiple of 32; None means the whole row.
        offset: whether groups have an offset.
        ordered: whether rows are stored in an order of their own.
    """

    planes: tuple[int, ...]
    group_size: int | None = None
    offset: bool = False
    ordered: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.planes) <= MOST_PLANES:
            raise ValueError(f"a row has 1 to {MOST_PLANES} planes, not {len(self.planes)}")
        if self.planes[-1] < 1 or list(self.planes) != sorted(self.planes, reverse=True):
            raise ValueError(f"rows with at least 1, 2, ... planes can't be {self.planes}: they get fewer, down to 1")
        if self.group_size is not None and (self.group_size < BLOCK_K or self.group_size % BLOCK_K):
            raise ValueError(
                f"group_size must be a multiple of {BLOCK_K}, or None for the whole row, not {self.group_size}"
            )

    @classmethod
    def of(cls, n: int, planes: int, group_size: int | None = None, *, offset: bool = False) -> BinaryFormat:
        """The same number of planes for each of N rows."""
        return cls((n,) * planes, group_size, offset)

    @classmethod
    def by_row(
        cls, planes: np.ndarray, group_size: int | None = None, *, offset: bool = False
    ) -> tuple[BinaryFormat, np.ndarray | None]:
        """The format for numbers of planes int [N], and the order of rows int32 [N] that it takes, None for natural.

        Raises:
            ValueError: a number is not 1 to 6.
        """
        if planes.min(initial=1) < 1 or planes.max(initial=1) > MOST_PLANES:
            raise ValueError(f"a row has 1 to {MOST_PLANES} planes, not {int(planes.min())} to {int(planes.max())}")
        order = np.argsort(-planes.astype(np.int64), kind="stable").astype(np.int32)
        natural = bool((order[1:] > order[:-1]).all())
        rows = tuple(int((planes >= least).sum()) for least in range(1, int(planes.max(initial=1)) + 1))
        return cls(rows, group_size, offset, not natural), None if natural else order

    def effective_group(self, k: int) -> int:
        """The group size for K inputs: the whole row is K rounded up to whole blocks."""
        row = ceil_div(k, BLOCK_K) * BLOCK_K
        return row if self.group_size is None else min(self.group_size, row)

    def groups(self, k: int) -> int:
        """Number of groups in a row of K inputs; the last may be ragged."""
        return ceil_div(k, self.effective_group(k))

    def runs(self) -> Iterator[tuple[int, slice]]:
        """Numbers of planes and the stored rows that have them, most planes first."""
        start = 0
        for planes in range(len(self.planes), 0, -1):
            if self.planes[planes - 1] > start:
                yield planes, slice(start, self.planes[planes - 1])
                start = self.planes[planes - 1]

    def plane_shapes(self, k: int) -> list[tuple[int, int, int]]:
        """Shape of each plane's packed bytes."""
        chunks = ceil_div(k, BLOCK_K) * BLOCK_K // CHUNK
        return [(ceil_div(rows, TILE), chunks, _HALF) for rows in self.planes]

    def cost_bits(self, n: int, k: int) -> int:
        """Bits on disk of a weight [N, K]: codes, scales, offsets, order, gain and padding.

        Raises:
            ValueError: the planes are those of another number of rows.
        """
        if n != self.planes[0]:
            raise ValueError(f"{self.label()} is for {self.planes[0]} rows, not {n}")
        shapes, groups = self.plane_shapes(k), self.groups(k)
        codes = sum(8 * math.prod(shape) for shape in shapes)
        scales = sum(tiles for tiles, _, _ in shapes) * groups * TILE
        offsets = shapes[0][0] * groups * TILE if self.offset else 1
        return codes + (scales + offsets) * _SCALE_BITS + (n if self.ordered else 1) * _RANK_BITS + _GAIN_BITS

    def mean_planes(self) -> float:
        """Planes of a row, on average."""
        return sum(self.planes) / self.planes[0]

    def label(self) -> str:
        """Short name for reports."""
        alike = self.planes[-1] == self.planes[0]
        parts = [f"binary {len(self.planes)}-bit" if alike else f"binary {self.mean_planes():.3g}-bit by row"]
        parts += [] if self.group_size is None else [f"g{self.group_size}"]
        return " ".join([*parts, "offset"] if self.offset else parts)


@dataclasses.dataclass(frozen=True)
class PackedBinary:
    """The arrays of a binary encoding as the kernel reads them.

    Attributes:
        codes: uint8 [bytes]: [T_p, C, 32] of each plane in turn.
        scales: float16 [flat]: [T_p, G, 64] of each plane in turn, 0 behind the last row.
        offsets: float16 [T_1, G, 64], or [1] zero when there are none.
        rank: int32 [N], where each row is stored; or [1] holding -1 when rows lie as they are.
    """

    codes: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray
    rank: np.ndarray


@dataclasses.dataclass(frozen=True)
class BinaryEncoding:
    """One weight [N, K] in a binary format. Rows of the arrays are in stored order.

    Attributes:
        format: planes and groups.
        codes: uint8 [N, K], whose bit p is the sign in plane p: 1 is plus. 0 in planes that a row does not have.
        scales: float16 [b, N, G], 0 in planes that a row does not have.
        offsets: float16 [N, G], or None.
        order: int32 [N]: stored row r is row order[r] of the weight; None when rows lie as they are.
        gain: power of two that multiplies scales and offsets.
    """

    format: BinaryFormat
    codes: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None = None
    order: np.ndarray | None = None
    gain: float = 1.0

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        groups = self.format.groups(k)
        wanted = (len(self.format.planes), n, groups)
        if n != self.format.planes[0] or self.scales.shape != wanted:
            raise ValueError(
                f"{self.format.label()} of {self.format.planes[0]} rows and {k} inputs needs scales "
                f"{list(wanted)}, not {list(self.scales.shape)} for {n} rows of codes"
            )
        if (self.codes.dtype, self.scales.dtype) != (np.dtype(np.uint8), np.dtype(np.float16)):
            raise ValueError("codes must be uint8 and scales float16")
        for planes, rows in self.format.runs():
            if (self.codes[rows] >> planes).any() or self.scales[planes:, rows].any():
                raise ValueError(
                    f"rows {rows.start} to {rows.stop - 1} have {planes} planes, and bits or scales of more"
                )
        self._check_offsets((n, groups))
        self._check_order(n)

    def _check_offsets(self, wanted: tuple[int, int]) -> None:
        if (self.offsets is not None) != self.format.offset:
            raise ValueError(f"{self.format.label()} and offsets {'missing' if self.format.offset else 'given'}")
        if self.offsets is not None and (self.offsets.shape, self.offsets.dtype) != (wanted, np.dtype(np.float16)):
            raise ValueError(
                f"offsets must be float16 {list(wanted)}, not {self.offsets.dtype} {list(self.offsets.shape)}"
            )

    def _check_order(self, n: int) -> None:
        if (self.order is not None) != self.format.ordered:
            raise ValueError(f"rows are {'' if self.format.ordered else 'not '}ordered by their format")
        if self.order is not None and not np.array_equal(np.sort(self.order), np.arange(n)):
            raise ValueError("the order must name every row once")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> np.ndarray:
        """The weight that every runtime computes with, float32 [N, K]."""
        stored = np.zeros(self.codes.shape, np.float32)
        if self.offsets is not None:
            stored += self._by_input(self.offsets)
        for p, rows in enumerate(self.format.planes):
            scales = self._by_input(self.scales[p, :rows])
            stored[:rows] += np.where(self.codes[:rows] & (1 << p), scales, -scales)
        stored *= np.float32(self.gain)
        if self.order is None:
            return stored
        weight = np.empty_like(stored)
        weight[self.order] = stored
        return weight

    def _by_input(self, values: np.ndarray) -> np.ndarray:
        """Values of groups as those of inputs: float16 [R, G] to float32 [R, K]."""
        k = self.codes.shape[1]
        spread: np.ndarray = np.repeat(values.astype(np.float32), self.format.effective_group(k), axis=1)[:, :k]
        return spread

    def cost_bits(self) -> int:
        """Bits on disk, everything counted."""
        return self.format.cost_bits(*self.shape)

    def pack(self) -> PackedBinary:
        """The arrays in kernel order."""
        chunks = self.format.plane_shapes(self.shape[1])[0][1]
        codes = [_pack_plane((self.codes[:rows] >> p) & 1, chunks) for p, rows in enumerate(self.format.planes)]
        scales = [_tile(self.scales[p, :rows]) for p, rows in enumerate(self.format.planes)]
        rank = NATURAL
        if self.order is not None:
            rank = np.empty(len(self.order), np.int32)
            rank[self.order] = np.arange(len(self.order))
        return PackedBinary(
            np.concatenate([plane.ravel() for plane in codes]),
            np.concatenate([plane.ravel() for plane in scales]),
            np.zeros(1, np.float16) if self.offsets is None else _tile(self.offsets),
            rank,
        )

    @classmethod
    def unpack(cls, arrays: PackedBinary, format: BinaryFormat, k: int, gain: float) -> BinaryEncoding:
        """The encoding behind packed arrays.

        Raises:
            ValueError: there are more or fewer codes or scales than the format has.
        """
        n, groups = format.planes[0], format.groups(k)
        shapes = format.plane_shapes(k)
        expected = sum(math.prod(shape) for shape in shapes), sum(tiles * groups * TILE for tiles, _, _ in shapes)
        if (arrays.codes.shape, arrays.scales.shape) != ((expected[0],), (expected[1],)):
            raise ValueError(
                f"{format.label()} of [{n}, {k}] has {expected[0]} bytes of codes and {expected[1]} scales, "
                f"not {list(arrays.codes.shape)} and {list(arrays.scales.shape)}"
            )
        codes, scales = np.zeros((n, k), np.uint8), np.zeros((len(shapes), n, groups), np.float16)
        byte = scale = 0
        for p, (shape, rows) in enumerate(zip(shapes, format.planes, strict=True)):
            tiled = (shape[0], groups, TILE)
            plane = arrays.codes[byte : byte + math.prod(shape)].reshape(shape)
            codes[:rows] |= _unpack_plane(plane)[:rows, :k] << p
            scales[p, :rows] = _untile(arrays.scales[scale : scale + math.prod(tiled)].reshape(tiled), rows)
            byte, scale = byte + math.prod(shape), scale + math.prod(tiled)
        offsets = _untile(arrays.offsets, n) if format.offset else None
        order = np.argsort(arrays.rank).astype(np.int32) if format.ordered else None
        return cls(format, codes, scales, offsets, order, gain)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as named arrays, for a file; codes are packed."""
        layout = [self.format.group_size or 0, self.format.offset, self.format.ordered, self.shape[1]]
        return {
            **dataclasses.asdict(self.pack()),
            "planes": np.array(self.format.planes, np.int64),
            "layout": np.array(layout, np.int64),
            "gain": np.array(self.gain),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> BinaryEncoding:
        """Undoes `to_arrays`."""
        group_size, offset, ordered, k = (int(value) for value in arrays["layout"])
        planes = tuple(int(rows) for rows in arrays["planes"])
        packed = PackedBinary(arrays["codes"], arrays["scales"], arrays["offsets"], arrays["rank"])
        format = BinaryFormat(planes, group_size or None, bool(offset), bool(ordered))
        return cls.unpack(packed, format, k, float(arrays["gain"]))


def from_uniform(encoding: UniformEncoding) -> BinaryEncoding:
    """The same weight in binary planes, code by code.

    Scales double from plane to plane, and the offset is what lies between the grid's middle and its zero: nothing
    where that is half-way.

    Raises:
        ValueError: there are more than 6 bits, or an offset or scale that float16 does not hold.
    """
    bits, n = encoding.format.bits, encoding.shape[0]
    if bits > MOST_PLANES:
        raise ValueError(f"{encoding.format.label()} has {bits} bits, and a binary weight {MOST_PLANES} planes at most")
    steps = encoding.scales.astype(np.float64)
    offsets = steps * (
        (encoding.format.levels - 1) / 2 - encoding.format.zero_of(encoding.zero_points).astype(np.float64)
    )
    scales = np.stack([steps * 2.0 ** (p - 1) for p in range(bits)])
    # A gain that suits them all: halves of the smallest scales may not be normal beside the old one.
    change = choose_gain(np.maximum(np.abs(scales).max(axis=0), np.abs(offsets)))
    stored, moved = (scales / change).astype(np.float16), (offsets / change).astype(np.float16)
    for held, wanted in ((stored, scales), (moved, offsets)):
        if not np.array_equal(held.astype(np.float64) * change, wanted):
            raise ValueError(
                f"{encoding.format.label()} has scales or offsets that float16 does not hold exactly: zero points that "
                "are midrise or integer lead to none, unless scales span float16's whole range; those of groups may"
            )
    shift = bool(offsets.any())
    format = BinaryFormat.of(n, bits, encoding.format.group_size, offset=shift)
    return BinaryEncoding(format, encoding.codes, stored, moved if shift else None, gain=encoding.gain * change)


def _pack_plane(bits: np.ndarray, chunks: int) -> np.ndarray:
    """Bits uint8 [R, K] to bytes [T, C, 32]; padding holds 0."""
    rows, k = bits.shape
    tiles = ceil_div(rows, TILE)
    padded = np.zeros((tiles * TILE, chunks * CHUNK), np.uint8)
    padded[:rows, :k] = bits
    places = padded.reshape(tiles, 2, _HALF, chunks, CHUNK) << np.arange(CHUNK, dtype=np.uint8)
    keys = np.bitwise_or.reduce(places, axis=4)
    return np.ascontiguousarray((keys[:, 0] | keys[:, 1] << 4).transpose(0, 2, 1))


def _unpack_plane(packed: np.ndarray) -> np.ndarray:
    """Undoes `_pack_plane`, padding included: uint8 [T, C, 32] to [64 T, 4 C]."""
    tiles, chunks, _ = packed.shape
    halves = np.stack([packed & 15, packed >> 4], axis=1).transpose(0, 1, 3, 2)
    bits = (halves[..., None] >> np.arange(CHUNK, dtype=np.uint8)) & 1
    natural: np.ndarray = bits.reshape(tiles * TILE, chunks * CHUNK)
    return natural


def _tile(values: np.ndarray) -> np.ndarray:
    """Per-group side data [R, G] in tiles [T, G, 64], zero-padded."""
    rows, groups = values.shape
    tiles = ceil_div(rows, TILE)
    padded = np.zeros((tiles * TILE, groups), values.dtype)
    padded[:rows] = values
    return np.ascontiguousarray(padded.reshape(tiles, TILE, groups).transpose(0, 2, 1))


def _untile(tiled: np.ndarray, rows: int) -> np.ndarray:
    """Undoes `_tile`: [T, G, 64] to [R, G]."""
    tiles, groups, _ = tiled.shape
    return np.ascontiguousarray(tiled.transpose(0, 2, 1).reshape(tiles * TILE, groups)[:rows])
