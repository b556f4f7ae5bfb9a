"""The mixed format: bit depths of 0 to 8 inside one weight, with levels from a table for each depth.

    W[n, order[p]] = gain * scale[n] * 2**(-column[m, p] / 8) * step[b] * (level - zero[b])
    b = depth[m, p // 32],   m = n // band

Inputs are put in an order, so that 32 neighbours share a depth; outputs are cut into bands that have depths of their
own. Instead of scales for groups along K there is a scale for each output and one for each input of each band: 16 / K
and 8 / band bits a weight. Up to 6 bits levels are those of the codebook format, below 4 bits as a trellis code that
runs through the tiles of its band; 7 and 8 bits are equal steps. Depth 0 is no weight at all.

Sources: Young, CVXQ (arXiv 2409.02026) and Radio (arXiv 2505.03031), for depths by groups of one input and a run of
outputs, and levels that are denser about zero; theirs are companded by a formula and their groups have a location.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import numpy as np

from onnxq.formats import packing
from onnxq.formats.codebook import LEVEL_BITS
from onnxq.formats.tables import GAUSSIAN_TABLES

DEEPEST = 8
TABLE_DEPTHS = tuple(range(1, 7))
"""Depths whose levels a table gives; deeper ones are their own levels."""
WINDOW = 4
"""Index bits of the depths that are trellis codes."""
COLUMN_STEPS = 8
"""Steps of a column scale in an octave."""
LARGEST_INPUTS = 1 << 16
"""Inputs that an order can name."""

_SCALE_BITS, _COLUMN_BITS, _DEPTH_BITS, _GAIN_BITS = 16, 8, 8, 32


def window_of(depth: int) -> int:
    """Index bits of a depth: of its own code and those of the tiles before."""
    return max(depth, WINDOW) if depth in TABLE_DEPTHS else depth


def table_of(depth: int) -> np.ndarray:
    """Levels by index, uint8 [2**window]."""
    if depth in TABLE_DEPTHS:
        return np.array(GAUSSIAN_TABLES[depth, window_of(depth)].entries, np.uint8)
    return np.arange(1 << depth, dtype=np.uint8)


def zero_of(depth: int) -> float:
    """The level that is worth 0: between the middle two of 7-bit levels, and one of 8-bit ones."""
    return float(1 << LEVEL_BITS) if depth == DEEPEST else ((1 << LEVEL_BITS) - 1) / 2


@functools.cache
def steps() -> np.ndarray:
    """What a level is worth for weights of standard deviation 1, float32 [9]; 0 for depth 0."""
    found = [0.0]
    found += [GAUSSIAN_TABLES[depth, window_of(depth)].step for depth in TABLE_DEPTHS]
    # Equal steps of least squared error on a standard Gaussian.
    found += [0.056869, 0.030765]
    return np.array(found, np.float32)


def tables() -> np.ndarray:
    """The tables of depths 1 to 6, one after the other: uint8 [160]."""
    joined: np.ndarray = np.concatenate([table_of(depth) for depth in TABLE_DEPTHS])
    return joined


@functools.cache
def values_of(depth: int) -> np.ndarray:
    """Levels in standard deviations by index, float32 [2**window]; depth 0 has the one level 0."""
    if depth == 0:
        return np.zeros(1, np.float32)
    values: np.ndarray = (table_of(depth).astype(np.float32) - np.float32(zero_of(depth))) * steps()[depth]
    return values


@dataclasses.dataclass(frozen=True)
class MixedFormat:
    """How one weight is cut: made for it, not for others.

    Attributes:
        band: outputs that have depths of their own, a multiple of 32.
        order: uint16 [K] as bytes: the inputs in the order in which they are stored.
        depths: uint8 [M, J] as bytes, M = ceil(N / band) and J = ceil(K / 32): the depth of each band's blocks.
    """

    band: int
    order: bytes = dataclasses.field(repr=False)
    depths: bytes = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        if self.band < packing.TILE_N or self.band % packing.TILE_N:
            raise ValueError(f"a band is a multiple of {packing.TILE_N} outputs, not {self.band}")
        k = len(self.order) // 2
        if k == 0 or not np.array_equal(np.sort(self.inputs()), np.arange(k)):
            raise ValueError("the order must name every input once")
        if not self.depths or len(self.depths) % packing.ceil_div(k, packing.BLOCK_K):
            raise ValueError(f"{len(self.depths)} depths are not one for each block of {k} inputs")
        if max(self.depths) > DEEPEST:
            raise ValueError(f"a depth is 0 to {DEEPEST} bits, not {max(self.depths)}")

    @classmethod
    def of(cls, band: int, order: np.ndarray, depths: np.ndarray) -> MixedFormat:
        """From arrays: order int [K], depths int [M, J]."""
        if len(order) > LARGEST_INPUTS:
            raise ValueError(f"an order names {LARGEST_INPUTS} inputs at most, not {len(order)}")
        # Both would wrap.
        if order.min(initial=0) < 0 or order.max(initial=0) >= LARGEST_INPUTS:
            raise ValueError("the order must name every input once")
        if depths.max(initial=0) > DEEPEST or depths.min(initial=0) < 0:
            raise ValueError(f"a depth is 0 to {DEEPEST} bits, not {int(depths.max())}")
        return cls(band, order.astype(np.uint16).tobytes(), depths.astype(np.uint8).tobytes())

    def inputs(self) -> np.ndarray:
        """The order, uint16 [K]."""
        return np.frombuffer(self.order, np.uint16)

    def by_band(self) -> np.ndarray:
        """The depths, uint8 [M, J]."""
        blocks = packing.ceil_div(len(self.order) // 2, packing.BLOCK_K)
        return np.frombuffer(self.depths, np.uint8).reshape(-1, blocks)

    def by_tile(self, n: int) -> np.ndarray:
        """The depths of every tile of 32 outputs, uint8 [T, J].

        Raises:
            ValueError: the format is for another number of outputs.
        """
        by_band, tiles = self.by_band(), packing.ceil_div(n, packing.TILE_N)
        if len(by_band) != packing.ceil_div(n, self.band):
            raise ValueError(f"{n} outputs are {packing.ceil_div(n, self.band)} bands, not {len(by_band)}")
        spread: np.ndarray = np.repeat(by_band, self.band // packing.TILE_N, axis=0)[:tiles]
        return spread

    def cost_bits(self, n: int, k: int) -> int:
        """Bits on disk of a weight [N, K]: codes, scales, depths, gain and padding.

        The order, which weights that read one tensor share, is counted with none of them.
        """
        depths = self.by_tile(n)
        codes = int(depths.sum(dtype=np.int64)) * packing.TILE_N * packing.BLOCK_K
        bands, blocks = (int(extent) for extent in self.by_band().shape)
        columns = bands * blocks * (packing.BLOCK_K * _COLUMN_BITS + _DEPTH_BITS)
        return codes + columns + len(depths) * packing.TILE_N * _SCALE_BITS + _GAIN_BITS

    def mean_depth(self, n: int) -> float:
        """Bits of codes alone, over all blocks."""
        return float(self.by_tile(n).mean())

    def label(self) -> str:
        """Short name for reports."""
        depths = self.by_band()
        return f"mixed {depths.min()} to {depths.max()} bits, bands of {self.band}"


@dataclasses.dataclass(frozen=True)
class PackedMixed:
    """The arrays of a mixed encoding as the kernel reads them.

    Attributes:
        packed: uint8 [bytes]: for each depth from 1 to 8, for each tile, for each of its blocks of that depth in turn,
            [depth, 32, 4] bytes as in `onnxq.formats.packing`.
        depths: uint8 [M, J].
        columns: uint8 [M, 32 J].
        scales: float16 [T, 1, 32].
    """

    packed: np.ndarray
    depths: np.ndarray
    columns: np.ndarray
    scales: np.ndarray


@dataclasses.dataclass(frozen=True)
class MixedEncoding:
    """One weight [N, K] in its mixed format.

    Attributes:
        format: order and depths.
        codes: uint8 [32 T, 32 J], inputs in their order; rows behind N are codes too, that trellises run through.
        columns: uint8 [M, 32 J]: scale 2**(-column / 8) of each input of each band.
        scales: float16 [N].
        gain: power of two that multiplies everything.
    """

    format: MixedFormat
    codes: np.ndarray
    columns: np.ndarray
    scales: np.ndarray
    gain: float = 1.0

    def __post_init__(self) -> None:
        n = len(self.scales)
        bands, blocks = self.format.by_band().shape
        rows = packing.ceil_div(n, packing.TILE_N) * packing.TILE_N
        width = blocks * packing.BLOCK_K
        if self.codes.shape != (rows, width) or self.columns.shape != (bands, width):
            raise ValueError(
                f"{self.format.label()} of {n} outputs needs codes [{rows}, {width}] and columns [{bands}, {width}], "
                f"not {list(self.codes.shape)} and {list(self.columns.shape)}"
            )
        kinds = (self.codes.dtype, self.columns.dtype, self.scales.dtype)
        if kinds != (np.dtype(np.uint8), np.dtype(np.uint8), np.dtype(np.float16)):
            raise ValueError("codes and columns must be uint8 and scales float16")
        self.format.by_tile(n)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return len(self.scales), len(self.format.order) // 2

    def runs(self) -> Iterator[tuple[int, slice, np.ndarray]]:
        """Depth, rows and stored inputs of all codes of one band and depth, both ascending; depth 0 left out."""
        rows = len(self.codes)
        for m, depths in enumerate(self.format.by_band()):
            band = slice(m * self.format.band, min((m + 1) * self.format.band, rows))
            for depth in np.unique(depths[depths > 0]):
                blocks = np.flatnonzero(depths == depth)[:, None] * packing.BLOCK_K
                yield int(depth), band, (blocks + np.arange(packing.BLOCK_K)).ravel()

    def dequantize(self) -> np.ndarray:
        """The weight that every runtime computes with, float32 [N, K]."""
        n, k = self.shape
        stored = np.zeros(self.codes.shape, np.float32)
        for depth, band, inputs in self.runs():
            index = _index(self.codes[band][:, inputs], depth)
            column = np.exp2(self.columns[band.start // self.format.band, inputs].astype(np.float32) / -COLUMN_STEPS)
            stored[band, inputs] = values_of(depth)[index] * column
        weight = np.empty((n, k), np.float32)
        weight[:, self.format.inputs()] = stored[:n, :k] * (self.scales.astype(np.float32) * self.gain)[:, None]
        return weight

    def cost_bits(self) -> int:
        """Bits on disk, everything counted but the order."""
        return self.format.cost_bits(*self.shape)

    def pack(self) -> PackedMixed:
        """The arrays in kernel order."""
        parts: dict[int, list[np.ndarray]] = {}
        for depth, band, inputs in self.runs():
            parts.setdefault(depth, []).append(packing.pack_codes(self.codes[band][:, inputs], depth).ravel())
        runs = [run for depth in sorted(parts) for run in parts[depth]]
        packed = np.concatenate(runs) if runs else np.empty(0, np.uint8)
        return PackedMixed(
            packed, self.format.by_band().copy(), self.columns, packing.tile_groups(self.scales[:, None])
        )

    @classmethod
    def unpack(cls, arrays: PackedMixed, order: np.ndarray, band: int, n: int, gain: float) -> MixedEncoding:
        """The encoding behind packed arrays."""
        format = MixedFormat.of(band, order, arrays.depths)
        rows = packing.ceil_div(n, packing.TILE_N) * packing.TILE_N
        codes = np.zeros((rows, arrays.columns.shape[1]), np.uint8)
        empty = cls(format, codes, arrays.columns, packing.untile_groups(arrays.scales, n)[:, 0], gain)
        expected = int(format.by_tile(n).sum(dtype=np.int64)) * packing.TILE_N * packing.BLOCK_K // 8
        if arrays.packed.shape != (expected,):
            found = arrays.packed.shape
            raise ValueError(f"{format.label()} of {n} outputs has {expected} bytes of codes, not {found}")
        start = 0
        for depth, band_rows, inputs in sorted(empty.runs(), key=lambda run: run[0]):  # stable: bands stay in order
            height, width = band_rows.stop - band_rows.start, len(inputs)
            stop = start + height * width * depth // 8
            shape = packing.packed_shape(height, width, depth)
            codes[band_rows, inputs] = packing.unpack_codes(arrays.packed[start:stop].reshape(shape), height, width)
            start = stop
        return empty

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as named arrays, for a file; codes are packed."""
        packed = self.pack()
        return {
            "packed": packed.packed,
            "depths": packed.depths,
            "columns": packed.columns,
            "scales": packed.scales,
            "order": self.format.inputs(),
            "layout": np.array([self.format.band, self.shape[0]], np.int64),
            "gain": np.array(self.gain),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> MixedEncoding:
        """Undoes `to_arrays`."""
        band, n = (int(value) for value in arrays["layout"])
        packed = PackedMixed(arrays["packed"], arrays["depths"], arrays["columns"], arrays["scales"])
        return cls.unpack(packed, arrays["order"], band, n, float(arrays["gain"]))


def _index(codes: np.ndarray, depth: int) -> np.ndarray:
    """Table indices of the codes of one band: uint8 [32 T, inputs] to the same."""
    tiles = codes.reshape(-1, packing.TILE_N, codes.shape[1])
    index = tiles.copy()
    for before in range(1, packing.ceil_div(window_of(depth), depth)):
        index |= np.roll(tiles, before, axis=0) << (before * depth)
    index &= (1 << window_of(depth)) - 1
    shaped: np.ndarray = index.reshape(codes.shape)
    return shaped
