"""How recipes say in which format weights are stored."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Literal

import numpy as np

from onnxq.formats.binary import MOST_PLANES, BinaryFormat
from onnxq.formats.codebook import CodebookFormat
from onnxq.formats.float8 import Float8Format, Float8Kind
from onnxq.formats.framed import FramedFormat
from onnxq.formats.tables import GAUSSIAN_TABLES
from onnxq.formats.uniform import UniformFormat, ZeroPoint
from onnxq.recipe.checks import require, require_choices

GroupSize = int | Literal["column", "weight"]
ZeroPointName = Literal["auto", "midrise", "integer", "per-group", "per-group-integer"]


@dataclasses.dataclass(frozen=True)
class GridSpec:
    """A uniform grid.

    Attributes:
        bits: 1 to 8.
        group_size: weights along K that share a step: a multiple of 32, "column" (all inputs of an output), or "weight"
            (all there are).
        zero_point: see `onnxq.formats.uniform.ZeroPoint`; "auto" is the better of midrise and integer at 1 and
            2 bits and per-group above, and with target "stock" what stock ONNX Runtime can hold.
        window: levels of a table instead of equal steps, looked up by so many bits: the code's own and those of the
            codes before it (see `onnxq.formats.codebook`). For weights in a frame, which are Gaussian. Where there is
            no table (such as 7 bits, target "stock", weights that look-ups read), the grid is uniform.
    """

    bits: int = 4
    group_size: GroupSize = 64
    zero_point: ZeroPointName = "auto"
    window: int | None = None

    def __post_init__(self) -> None:
        require_choices(self)
        require(1 <= self.bits <= 8, f"bits is {self.bits}; it must be 1 to 8")
        _require_group_size(self.group_size)
        one_zero = self.zero_point in ("integer", "midrise")
        require(self.group_size != "weight" or one_zero, 'group_size "weight" needs zero_point "integer" or "midrise"')
        windows = sorted({window for _, window in GAUSSIAN_TABLES})
        valid = self.window is None or self.window in windows
        require(valid, f"window is {self.window}; it must be one of {', '.join(map(str, windows))}, or null")

    def formats(self, target: str, *, tables: bool = True) -> tuple[UniformFormat | CodebookFormat, ...]:
        """The formats that the grid allows, all at one price; the solver keeps the one with the least loss.

        Args:
            target: see `Recipe`.
            tables: whether levels may come from a table: no look-up reads the weight.
        """
        group = self.group_size if isinstance(self.group_size, int) else None
        if self.window is not None and target != "stock" and tables and (self.bits, self.window) in GAUSSIAN_TABLES:
            # Equal steps are better where feedback is so strong that a table's range or its short runs don't suit.
            return CodebookFormat(self.bits, self.window, group), UniformFormat(self.bits, group, ZeroPoint.MIDRISE)
        whole = self.group_size == "weight"
        return tuple(UniformFormat(self.bits, group, zero, one_scale=whole) for zero in self._zero_points(target))

    def _zero_points(self, target: str) -> tuple[ZeroPoint, ...]:
        if self.zero_point != "auto":
            return (ZeroPoint(self.zero_point),)
        if target == "stock" and self.bits in (2, 4, 8):
            return (ZeroPoint.PER_GROUP_INTEGER if self.bits == 8 else ZeroPoint.INTEGER,)
        if self.bits > 2:
            return (ZeroPoint.PER_GROUP,)
        # Levels about zero are best for most weights, but where one input is far louder than the others
        # its weight sets the step, and then only a grid that has zero can leave the others small.
        return ZeroPoint.MIDRISE, ZeroPoint.INTEGER


def _require_group_size(size: GroupSize) -> None:
    whole = size in ("column", "weight") or (isinstance(size, int) and size >= 32 and size % 32 == 0)
    require(whole, f'group_size is {size}; it must be a multiple of 32, "column" or "weight"')


@dataclasses.dataclass(frozen=True)
class FrameSpec:
    """Round in the domain of a frame (`onnxq.frames`).

    Attributes:
        redundancy: coefficients per input, 1 to 8; 1 is a rotation. Numbers of coefficients are whole multiples of 32:
            the report says what became of it.
        output_redundancy: of a frame on the output side too; null for none. It costs a second transform.
    """

    redundancy: float = 1.0
    output_redundancy: float | None = None

    def __post_init__(self) -> None:
        for name in ("redundancy", "output_redundancy"):
            value = getattr(self, name)
            require(value is None or 1 <= value <= 8, f"{name} is {value}; it must be 1 to 8, such as 1.125")

    def around(self, format: UniformFormat | CodebookFormat, seed: int) -> FramedFormat:
        """The format of the coefficients."""
        output = None if self.output_redundancy is None else _as_fraction(self.output_redundancy)
        return FramedFormat(format, _as_fraction(self.redundancy), output, seed)


def _as_fraction(value: float) -> Fraction:
    """1.1 is 11/10, whatever the float nearest to it."""
    return Fraction(value).limit_denominator(1000)


@dataclasses.dataclass(frozen=True)
class MixedSpec:
    """Depths of 0 to 8 bits inside each weight, which a budget chooses (`onnxq.formats.mixed`).

    Attributes:
        band: about so many outputs have depths of their own.
    """

    band: int = 512

    def __post_init__(self) -> None:
        require(self.band >= 32, f"band is {self.band}; it must be 32 or more")


@dataclasses.dataclass(frozen=True)
class Float8Spec:
    """Eight-bit floating-point codes (`onnxq.formats.float8`).

    Attributes:
        kind: which bits are exponent.
        group_size: see `GridSpec`.
        powers_of_two: scales are powers of two.
        or_grid: take the plan's grid instead where it serves a weight better.
    """

    kind: Literal["e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz"] = "e4m3fn"
    group_size: GroupSize = "column"
    powers_of_two: bool = False
    or_grid: bool = False

    def __post_init__(self) -> None:
        require_choices(self)
        _require_group_size(self.group_size)

    @property
    def format(self) -> Float8Format:
        """The format of a weight."""
        group = self.group_size if isinstance(self.group_size, int) else None
        return Float8Format(Float8Kind(self.kind), group, self.group_size == "weight", self.powers_of_two)


@dataclasses.dataclass(frozen=True)
class WordSpec:
    """Planes of a table row by row, from how often each row is looked up (`onnxq.solvers.planes`).

    Attributes:
        by: "frequency" puts rows in clusters of falling frequency, each with a plane less than the one before;
            "loss" puts planes where they save most.
        clusters: of "frequency"; the most frequent rows have so many planes, the rarest 1.
        ratio: of "frequency": sizes of neighbouring clusters; 1 makes them alike, more makes more rows narrow.
        mean_planes: of "loss": planes of a row on average, at most.
        every_row: of "loss", for a table that is also an output projection: what all its rows together count as those
            of a projection, which reads every row for every token, where all look-ups count 1.
    """

    by: Literal["frequency", "loss"] = "loss"
    clusters: int = 4
    ratio: float = 1.0
    mean_planes: float = 2.5
    every_row: float = 1.0

    def __post_init__(self) -> None:
        require_choices(self)
        require(1 <= self.clusters <= MOST_PLANES, f"clusters is {self.clusters}; it must be 1 to {MOST_PLANES}")
        require(0 < self.ratio < math.inf, f"ratio is {self.ratio}; it must be above 0, such as 1 or 4")
        require(
            1 <= self.mean_planes <= MOST_PLANES,
            f"mean_planes is {self.mean_planes}; it must be 1 to {MOST_PLANES}, such as 2.5",
        )
        require(0 <= self.every_row < math.inf, f"every_row is {self.every_row}; it must be 0 or more")
        own = {"frequency": ("clusters", "ratio"), "loss": ("mean_planes", "every_row")}
        for name in own["loss" if self.by == "frequency" else "frequency"]:
            untouched = getattr(self, name) == getattr(WordSpec, name)
            require(untouched, f'{name} has no meaning with by "{self.by}", which takes {" and ".join(own[self.by])}')


@dataclasses.dataclass(frozen=True)
class BinarySpec:
    """Planes of signs, each with a scale (`onnxq.formats.binary`).

    Attributes:
        planes: 1 to 6.
        group_size: inputs that share a scale: a multiple of 32, or "column".
        offset: of each group, beside its planes.
        words: planes row by row where look-ups read a weight, which takes counts of tokens; others have `planes`.
            Null gives all weights `planes`.
    """

    planes: int = 3
    group_size: GroupSize = "column"
    offset: bool = False
    words: WordSpec | None = None

    def __post_init__(self) -> None:
        _require_group_size(self.group_size)
        require(self.group_size != "weight", 'group_size of binary codes is a multiple of 32, or "column"')
        require(1 <= self.planes <= MOST_PLANES, f"planes is {self.planes}; it must be 1 to {MOST_PLANES}")

    def format(self, n: int, planes: int) -> BinaryFormat:
        """The format of a weight of N rows with so many planes, as far as there are."""
        group = self.group_size if isinstance(self.group_size, int) else None
        return BinaryFormat.of(n, min(planes, MOST_PLANES), group, offset=self.offset)

    def by_row(self, planes: np.ndarray) -> tuple[BinaryFormat, np.ndarray | None]:
        """The format for planes of every row, int [N], and the order in which rows are stored: int32 [N], or None."""
        group = self.group_size if isinstance(self.group_size, int) else None
        return BinaryFormat.by_row(planes, group, offset=self.offset)
