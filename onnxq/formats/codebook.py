"""The codebook format: levels that a small table gives, looked up by a code and the codes before it.

    index[n, k] = (code[n, k] | code[n - 32, k] << bits | code[n - 64, k] << 2 bits | ...) mod 2**window
    W[n, k]     = gain * scale[n, g] * (table[index[n, k]] - 63.5),          g = k // group_size

With a window of `bits` these are unequal levels for each weight alone. A wider window is a trellis code: the same code
stands for another level behind another predecessor, so that a run of weights has more levels to choose from than each
has bits for. At 2 bits a Gaussian's mean squared error falls from 0.119 (equal steps) to 0.090 (window 4) and 0.082
(window 6) on closed runs of 64; 0.0625 is the bound for any code. Predecessors lie in the tile of 32 outputs in front,
where the kernel has them at hand, and the first tile's is the last one, so that no state is stored.

Table entries are 0..127 on a 7-bit grid: a decoded weight is a `UniformEncoding` of 7 bits with the zero half-way.

Sources: Marcellin and Fischer, Trellis coded quantization (1990); Tseng et al., QTIP (arXiv 2406.11235), whose
bit-shift trellis this is, with a stored table in place of a computed one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from onnxq.formats import packing
from onnxq.formats.tables import GAUSSIAN_TABLES
from onnxq.formats.uniform import PackedUniform, UniformEncoding, UniformFormat, ZeroPoint

LEVEL_BITS = 7
"""Width of the grid that table entries lie on."""
LARGEST_WINDOW = 6


@dataclasses.dataclass(frozen=True)
class CodebookFormat:
    """Width, window and grouping.

    Attributes:
        bits: of a code, 1 to 6.
        window: bits of the index, `bits` to 6: 4 costs a kernel one shuffle per 32 weights, 6 costs four.
        group_size: weights along K that share a scale, a multiple of 32; None means the whole column.
    """

    bits: int
    window: int
    group_size: int | None = None

    def __post_init__(self) -> None:
        if (self.bits, self.window) not in GAUSSIAN_TABLES:
            known = ", ".join(f"{bits} with {window}" for bits, window in GAUSSIAN_TABLES)
            raise ValueError(f"no table for {self.bits} bits with window {self.window}; there are {known}")
        _ = self.levels

    @property
    def levels(self) -> UniformFormat:
        """The uniform format of the decoded weight."""
        return UniformFormat(LEVEL_BITS, self.group_size, ZeroPoint.MIDRISE)

    @property
    def table(self) -> np.ndarray:
        """Level by index, uint8 [2**window]."""
        return np.array(GAUSSIAN_TABLES[self.bits, self.window].entries, np.uint8)

    @property
    def unit(self) -> float:
        """Step of the grid for weights of standard deviation 1."""
        return GAUSSIAN_TABLES[self.bits, self.window].step

    def effective_group(self, k: int) -> int:
        """See `UniformFormat.effective_group`."""
        return self.levels.effective_group(k)

    def groups(self, k: int) -> int:
        """Number of groups in a column of K inputs."""
        return self.levels.groups(k)

    def index(self, codes: np.ndarray) -> np.ndarray:
        """Table indices of codes: uint8 [32 T, K] to the same."""
        tiles = codes.reshape(-1, packing.TILE_N, codes.shape[1])
        index = tiles.copy()
        shift = self.bits
        while shift < self.window:
            tiles = np.roll(tiles, 1, axis=0)
            index |= tiles << shift
            shift += self.bits
        index &= (1 << self.window) - 1
        shaped: np.ndarray = index.reshape(codes.shape)
        return shaped

    def cost_bits(self, n: int, k: int) -> int:
        """Bits on disk of a weight [N, K]: codes, scales, table, zero point, gain and padding."""
        narrow = UniformFormat(self.bits, self.group_size, ZeroPoint.MIDRISE)
        return narrow.cost_bits(n, k) + 8 * (1 << self.window)

    def label(self) -> str:
        """Short name for reports."""
        group = "column" if self.group_size is None else f"g{self.group_size}"
        return f"{'codebook' if self.window == self.bits else 'trellis'} {self.bits}-bit w{self.window} {group}"


@dataclasses.dataclass(frozen=True)
class CodebookEncoding:
    """One weight [N, K] in a codebook format.

    Attributes:
        format: width, window and grouping.
        codes: uint8 [32 T, K], T = ceil(N / 32); the rows behind N are codes too, that the first tile looks back at.
        scales: float16 [N, G].
        gain: power of two that multiplies every scale.
    """

    format: CodebookFormat
    codes: np.ndarray
    scales: np.ndarray
    gain: float = 1.0

    def __post_init__(self) -> None:
        rows, k = self.codes.shape
        n, groups = self.scales.shape
        if rows != packing.ceil_div(n, packing.TILE_N) * packing.TILE_N or groups != self.format.groups(k):
            raise ValueError(f"codes [{rows}, {k}] and scales [{n}, {groups}] don't fit {self.format.label()}")
        if (self.codes.dtype, self.scales.dtype) != (np.dtype(np.uint8), np.dtype(np.float16)):
            raise ValueError("codes must be uint8 and scales float16")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.scales.shape[0], self.codes.shape[1]

    def as_uniform(self) -> UniformEncoding:
        """The same weight on the 7-bit grid of its table."""
        levels = self.format.table[self.format.index(self.codes)[: self.shape[0]]]
        grid = self.format.levels
        zero = grid.quantize_zero(grid.shared_zero()).reshape(1, 1)
        return UniformEncoding(grid, levels, self.scales, zero, self.gain)

    def dequantize(self) -> np.ndarray:
        """The weight that every runtime computes with, float32 [N, K]."""
        return self.as_uniform().dequantize()

    def cost_bits(self) -> int:
        """Bits on disk, everything counted."""
        return self.format.cost_bits(*self.shape)

    def pack(self) -> PackedUniform:
        """Codes, scales and zero point in kernel order."""
        zero = self.format.levels.quantize_zero(self.format.levels.shared_zero()).reshape(1, 1, 1)
        return PackedUniform(packing.pack_codes(self.codes, self.format.bits), packing.tile_groups(self.scales), zero)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as named arrays, for a file; codes are packed."""
        layout = [self.format.bits, self.format.window, self.format.group_size or 0, self.codes.shape[1]]
        return {
            "packed": packing.pack_codes(self.codes, self.format.bits),
            "scales": self.scales,
            "layout": np.array(layout, np.int64),
            "gain": np.array(self.gain),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> CodebookEncoding:
        """Undoes `to_arrays`."""
        bits, window, group_size, k = (int(value) for value in arrays["layout"])
        packed, format = arrays["packed"], CodebookFormat(bits, window, group_size or None)
        codes = packing.unpack_codes(packed, packed.shape[0] * packing.TILE_N, k)
        return cls(format, codes, arrays["scales"], float(arrays["gain"]))
