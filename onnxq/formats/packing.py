"""The packed layout of low-bit codes: tiles of 32 outputs, blocks of 32 inputs, one bit plane per binary digit.

Codes [N, K] of `bits` bits become bytes [T, B, bits, 32, 4], T = ceil(N / 32), B = ceil(K / 32): exactly `bits`
bits per code. The rows of axis 2 are planes of width 8, 4, 2 or 1, one for each binary digit of `bits`, widest
first; the widest holds the lowest bits of the code. A plane of width w has w rows. Bit field f of row v belongs to
the input ``k = 32 * block + 4 * (v * (8 // w) + f) + j``. So one load of 32 or 64 bytes holds 8 or 16 outputs by
four consecutive inputs, which is what a byte dot product wants, and a shift and a mask undo the packing; the whole
is a reshape and a transpose of the natural order, which a function body undoes with standard ops.
"""

from __future__ import annotations

import numpy as np

TILE_N = 32
BLOCK_K = 32
QUAD = 4


def ceil_div(a: int, b: int) -> int:
    """A / b rounded up, for positive integers."""
    return -(-a // b)


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths of the planes that codes of `bits` bits split into, widest first: 7 -> (4, 2, 1)."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def packed_shape(n: int, k: int, bits: int) -> tuple[int, int, int, int, int]:
    """Shape of the packed bytes of codes [N, K]."""
    return ceil_div(n, TILE_N), ceil_div(k, BLOCK_K), bits, TILE_N, QUAD


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs codes.

    Args:
        codes: uint8 [N, K], each below ``2**bits``.
        bits: 1 to 8.

    Returns:
        uint8 [T, B, bits, 32, 4]; padding holds code 0.

    Raises:
        ValueError: a code does not fit.
    """
    n, k = codes.shape
    if codes.size and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits")
    tiles, blocks, *_ = packed_shape(n, k, bits)
    padded = np.zeros((tiles * TILE_N, blocks * BLOCK_K), np.uint8)
    padded[:n, :k] = codes
    # [T, 32, B, 8 quads, 4] -> [T, B, quad, 32, 4]
    quads = padded.reshape(tiles, TILE_N, blocks, BLOCK_K // QUAD, QUAD).transpose(0, 2, 3, 1, 4)
    packed = np.empty(packed_shape(n, k, bits), np.uint8)
    row = offset = 0
    for width in plane_widths(bits):
        plane = (quads >> offset) & ((1 << width) - 1)
        fields = plane.reshape(tiles, blocks, width, 8 // width, TILE_N, QUAD)
        shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(1, 1, 1, -1, 1, 1)
        packed[:, :, row : row + width] = np.bitwise_or.reduce(fields << shifts, axis=3)
        row += width
        offset += width
    return packed


def unpack_codes(packed: np.ndarray, n: int, k: int) -> np.ndarray:
    """Undoes `pack_codes`: uint8 [T, B, bits, 32, 4] -> uint8 [N, K]."""
    tiles, blocks, bits, *_ = packed.shape
    quads = np.zeros((tiles, blocks, BLOCK_K // QUAD, TILE_N, QUAD), np.uint8)
    row = offset = 0
    for width in plane_widths(bits):
        rows = packed[:, :, row : row + width, None]
        shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(1, 1, 1, -1, 1, 1)
        fields = (rows >> shifts) & ((1 << width) - 1)
        quads |= fields.reshape(quads.shape) << offset
        row += width
        offset += width
    natural = quads.transpose(0, 3, 1, 2, 4).reshape(tiles * TILE_N, blocks * BLOCK_K)
    return np.ascontiguousarray(natural[:n, :k])


def tile_groups(values: np.ndarray) -> np.ndarray:
    """Per-group side data in tile order: [N, G] -> [T, G, 32], zero-padded along N."""
    n, groups = values.shape
    tiles = ceil_div(n, TILE_N)
    padded = np.zeros((tiles * TILE_N, groups), values.dtype)
    padded[:n] = values
    return np.ascontiguousarray(padded.reshape(tiles, TILE_N, groups).transpose(0, 2, 1))


def untile_groups(tiled: np.ndarray, n: int) -> np.ndarray:
    """Undoes `tile_groups`: [T, G, 32] -> [N, G]."""
    tiles, groups, _ = tiled.shape
    return np.ascontiguousarray(tiled.transpose(0, 2, 1).reshape(tiles * TILE_N, groups)[:n])
