"""What calibration knows about a site's inputs, gathered row by row, merged, saved and loaded.

Sums are kept in float64: each block of at most `BLOCK_ROWS` rows is multiplied in float32 (so the error of one
block stays near float32's own) and added to a float64 total. Results are float32.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from onnxq.calibration.ranges import RangeStatistics
from onnxq.errors import CalibrationError

Level = Literal["none", "diagonal", "full", "ranges"]
"""none: the site is not tapped. diagonal: count, mean, absmax, mean square. full: the second moment as well.
ranges: what rounding of activations needs instead, see `onnxq.calibration.ranges`."""

LEVELS: tuple[Level, ...] = ("none", "diagonal", "full", "ranges")
BLOCK_ROWS = 2048
_ROWS_AT_ONCE = 256
_VERSION = 1
_INDEX = "statistics.json"


@dataclasses.dataclass(frozen=True, eq=False)
class InputStatistics:
    """Statistics of the input rows of one linear site (or of several that share the input).

    Attributes:
        count: Rows seen, padding left out.
        second_moment: float32 [K, K], mean of x x^T; None when only the diagonal was asked for.
        diagonal: float32 [K], mean of x^2.
        mean: float32 [K].
        absmax: float32 [K].
    """

    count: int
    second_moment: np.ndarray | None
    diagonal: np.ndarray
    mean: np.ndarray
    absmax: np.ndarray

    def merge(self, other: InputStatistics) -> InputStatistics:
        """Of both sets of rows together; second moments only when both have them."""
        if self.diagonal.shape != other.diagonal.shape:
            raise CalibrationError(
                f"Statistics of inputs of width {self.diagonal.size} and {other.diagonal.size} can't be merged; they "
                "belong to different sites."
            )
        total = self.count + other.count
        a, b = (self.count / total, other.count / total) if total else (0.5, 0.5)
        moment = None
        if self.second_moment is not None and other.second_moment is not None:
            moment = np.asarray(self.second_moment * np.float32(a) + other.second_moment * np.float32(b))
        return InputStatistics(
            total,
            moment,
            (self.diagonal * a + other.diagonal * b).astype(np.float32),
            (self.mean * a + other.mean * b).astype(np.float32),
            np.maximum(self.absmax, other.absmax),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class TableStatistics:
    """Attributes: counts: int64 [N], how often each row was looked up, padding left out."""

    counts: np.ndarray

    def merge(self, other: TableStatistics) -> TableStatistics:
        """Of both sets of look-ups together."""
        if self.counts.shape != other.counts.shape:
            raise CalibrationError(
                f"Statistics of tables of {self.counts.size} and {other.counts.size} rows can't be merged."
            )
        return TableStatistics(self.counts + other.counts)


Statistics = InputStatistics | TableStatistics | RangeStatistics
_KINDS = {InputStatistics: "input", TableStatistics: "table", RangeStatistics: "ranges"}


class InputAccumulator:
    """Adds up rows of width K.

    Peak memory, full level: 8 K^2 (totals) + 4 K^2 (one block's product) bytes, and two blocks of rows in float32;
    `finish` holds 12 K^2 for a moment and leaves 4 K^2. Diagonal level: 24 K bytes.
    """

    def __init__(self, width: int, level: Level) -> None:
        self.width = width
        self.count = 0
        self._sum = np.zeros(width)
        self._squares = np.zeros(width)
        self._absmax = np.zeros(width, np.float32)
        self._moment = np.zeros((width, width)) if level == "full" else None
        self._waiting: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        """Rows [n, K] of any float dtype."""
        for start in range(0, rows.shape[0], BLOCK_ROWS):
            block = np.ascontiguousarray(rows[start : start + BLOCK_ROWS], dtype=np.float32)
            self.count += block.shape[0]
            self._absmax = np.maximum(self._absmax, np.abs(block).max(axis=0))
            if not self.finite:  # the sums are lost anyway; the caller asks and says where it happened
                return
            self._sum += block.sum(axis=0, dtype=np.float64)
            if self._moment is None:
                self._squares += np.einsum("nk,nk->k", block, block, dtype=np.float64)
            else:
                self._wait(block)

    def _wait(self, block: np.ndarray) -> None:
        """A decoder's step is one row, and to add a product to the totals costs as much for it as for hundreds."""
        self._waiting.append(block.copy())
        if sum(len(part) for part in self._waiting) >= _ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self._moment is not None and self._waiting:
            rows = np.concatenate(self._waiting)
            self._moment += rows.T @ rows
        self._waiting.clear()

    @property
    def finite(self) -> bool:
        """False once a NaN or infinity was added."""
        return bool(np.isfinite(self._absmax).all())

    def finish(self) -> InputStatistics:
        """The means. The accumulator is spent afterwards: its totals are divided in place."""
        self._flush()
        rows = max(self.count, 1)
        moment = None
        if self._moment is not None:
            self._moment /= rows
            moment = self._moment.astype(np.float32)
            self._squares, self._moment = np.diagonal(self._moment) * rows, None
        return InputStatistics(
            self.count,
            moment,
            (self._squares / rows).astype(np.float32),
            (self._sum / rows).astype(np.float32),
            self._absmax,
        )


class TableAccumulator:
    """Counts look-ups of the rows of a table. Peak memory: 16 N bytes; without a known N it grows as needed."""

    def __init__(self, rows: int | None) -> None:
        self.rows = rows
        self._counts = np.zeros(rows or 0, np.int64)

    def add(self, indices: np.ndarray) -> None:
        """Indices of any shape; negative ones count from the end, as in ONNX Gather."""
        flat = indices.reshape(-1)
        if not flat.size:
            return
        if self.rows is not None:
            flat = np.where(flat < 0, flat + self.rows, flat)
        if int(flat.min()) < 0 or (self.rows is not None and int(flat.max()) >= self.rows):
            raise CalibrationError(
                f"An index is out of range: {int(indices.min())} .. {int(indices.max())} were looked up in a table of "
                f"{self.rows if self.rows is not None else 'unknown'} rows. Is the data tokenised for this model?"
            )
        seen = np.bincount(flat, minlength=self._counts.size)
        seen[: self._counts.size] += self._counts
        self._counts = seen

    def finish(self) -> TableStatistics:
        """The counts so far."""
        return TableStatistics(self._counts)


def save_statistics(folder: str | Path, statistics: Mapping[str, Statistics]) -> None:
    """Write to a folder: an index and one ``.npy`` per array; the index comes last, so a cut-off write is noticed."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / _INDEX).unlink(missing_ok=True)
    entries: dict[str, dict[str, Any]] = {}
    for number, (key, item) in enumerate(statistics.items()):
        entry: dict[str, Any] = {
            "kind": _KINDS[type(item)],
            "arrays": {},
        }
        for field in dataclasses.fields(item):
            value = getattr(item, field.name)
            if isinstance(value, np.ndarray):
                name = f"{number:05d}.{field.name}.npy"
                np.save(target / name, value, allow_pickle=False)
                entry["arrays"][field.name] = name
            elif value is not None:
                entry[field.name] = value
        entries[key] = entry
    text = json.dumps({"version": _VERSION, "statistics": entries}, indent=1)
    (target / _INDEX).write_text(text, encoding="utf-8")


def load_statistics(folder: str | Path) -> dict[str, Statistics]:
    """Read what `save_statistics` wrote; second moments stay memory-mapped, read-only.

    Raises:
        CalibrationError: the folder is incomplete or of another version.
    """
    source = Path(folder)
    try:
        index = json.loads((source / _INDEX).read_text(encoding="utf-8"))
        if index["version"] != _VERSION:
            raise CalibrationError(
                f"{source} holds statistics of version {index['version']}, this onnxq reads version {_VERSION}. "
                "Calibrate again."
            )
        found: dict[str, Statistics] = {}
        for key, entry in index["statistics"].items():
            arrays = {
                field: np.load(source / name, mmap_mode="r" if field == "second_moment" else None, allow_pickle=False)
                for field, name in entry["arrays"].items()
            }
            if entry["kind"] == "table":
                found[key] = TableStatistics(arrays["counts"])
            elif entry["kind"] == "ranges":
                numbers = {name: value for name, value in entry.items() if name not in ("kind", "arrays")}
                found[key] = RangeStatistics(**numbers, **arrays)
            else:
                moment = arrays.pop("second_moment", None)
                found[key] = InputStatistics(int(entry["count"]), moment, **arrays)
        return found
    except (OSError, EOFError, KeyError, ValueError, TypeError) as error:
        raise CalibrationError(
            f"The statistics in {source} can't be read ({error}); the write may have been cut off. Calibrate again."
        ) from error
