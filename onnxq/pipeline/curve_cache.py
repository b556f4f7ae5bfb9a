"""Measured curves on disk, so that another size of the same model costs seconds.

One file for each model, recipe and calibration data. It holds no formats: a point is its plan among a weight's options,
and a width, the depths of every block, or the planes of every row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.allocation.budget import Point
from onnxq.formats.binary import BinaryFormat
from onnxq.formats.float8 import Float8Format
from onnxq.formats.mixed import MixedFormat
from onnxq.pipeline.plan import Planned
from onnxq.pipeline.words import planes_of_rows

_VERSION = 4
"""Curves of another version of their measurement are not taken up again."""
_MOST_FILES = 32


@dataclasses.dataclass(frozen=True)
class Curves:
    """What was measured.

    Attributes:
        points: by weight name.
        kind: what losses are: that of `onnxq.sensitivity.Sensitivities`, or "layer" for sums of relative errors.
        notes: how they were measured, in sentences.
    """

    points: dict[str, list[Point[Planned]]]
    kind: str
    notes: tuple[str, ...]


def default_folder() -> Path:
    """Where the command line keeps curves: ``$ONNXQ_CACHE/curves``, or ``~/.cache/onnxq/curves``."""
    return Path(os.environ.get("ONNXQ_CACHE", "~/.cache/onnxq")).expanduser() / "curves"


class CurveCache:
    """The file of one model, recipe and calibration data.

    Args:
        folder: where files are kept, the newest 32; None keeps nothing.
        key: plain data that identifies the measurement.
    """

    def __init__(self, folder: Path | None, key: dict[str, Any]) -> None:
        self._folder = folder
        text = json.dumps([_VERSION, key], sort_keys=True)
        self._file = None if folder is None else folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"

    def load(self, items: Sequence[Planned]) -> Curves | None:
        """The curves of these weights; None if one is missing."""
        if self._file is None or not self._file.is_file():
            return None
        with np.load(self._file) as arrays:
            about = json.loads(str(arrays["about"]))
            places = {name: place for place, name in enumerate(about["names"])}
            if any(item.weight.name not in places for item in items):
                return None
            points = {item.weight.name: _restored(item, arrays, places[item.weight.name]) for item in items}
        os.utime(self._file)
        return Curves(points, about["kind"], tuple(about["notes"]))

    def _others(self, names: Sequence[str], kind: str) -> tuple[list[str], dict[str, np.ndarray]]:
        """Other weights whose losses are of the same kind, and their arrays, numbered behind `names`."""
        if self._file is None or not self._file.is_file():
            return [], {}
        with np.load(self._file) as known:
            about = json.loads(str(known["about"]))
            others = [name for name in about["names"] if name not in names] if about["kind"] == kind else []
            places = {str(about["names"].index(name)): len(names) + i for i, name in enumerate(others)}
            keys = [key.rpartition(".") for key in known.files if key != "about"]
            kept = {f"{what}.{places[at]}": known[f"{what}.{at}"] for what, _, at in keys if at in places}
        return others, kept

    def save(self, items: Sequence[Planned], curves: Curves) -> None:
        """Keeps the curves of these weights beside those of others: products and tables may have a ceiling each."""
        if self._file is None or self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        names = [item.weight.name for item in items]
        arrays: dict[str, np.ndarray] = {}
        for place, item in enumerate(items):
            arrays |= _stored(item, curves.points[item.weight.name], place)
        others, kept = self._others(names, curves.kind)
        arrays |= kept
        about = {"names": [*names, *others], "kind": curves.kind, "notes": curves.notes}
        arrays["about"] = np.array(json.dumps(about))
        partial = self._file.with_suffix(f".{os.getpid()}.npz")
        with partial.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the first for a flag
        partial.replace(self._file)
        newest = sorted(self._folder.glob("*.npz"), key=lambda file: file.stat().st_mtime, reverse=True)
        for old in newest[_MOST_FILES:]:
            old.unlink(missing_ok=True)


def _stored(item: Planned, points: Sequence[Point[Planned]], place: int) -> dict[str, np.ndarray]:
    """Arrays for the file: bits, loss, option and width of each point; planes by row; order and depths if mixed."""
    recipes = [option.recipe.linear for option in item.options]
    rows, planes, depths, order = [], [], [], b""
    for point in points:
        format, width = point.choice.formats[0], 0
        if isinstance(format, MixedFormat):
            depths.append(format.by_band())
            order = format.order
        elif point.choice.words is not None:
            planes.append(planes_of_rows(point.choice.formats, point.choice.rows))
        elif isinstance(format, BinaryFormat):
            width = len(format.planes)
        elif not isinstance(format, Float8Format):
            width = format.bits
        rows.append([point.bits, point.loss, recipes.index(point.choice.recipe.linear), width])
    arrays = {f"points.{place}": np.array(rows, np.float64)}
    if planes:
        arrays[f"planes.{place}"] = np.stack(planes)
    if depths:
        arrays |= {f"depths.{place}": np.stack(depths), f"order.{place}": np.frombuffer(order, np.uint16)}
    return arrays


def _restored(item: Planned, arrays: Any, place: int) -> list[Point[Planned]]:
    plans = item.options
    depths, planes = (iter(arrays.get(f"{kind}.{place}", ())) for kind in ("depths", "planes"))
    points = []
    for bits, loss, option, width in arrays[f"points.{place}"]:
        plan = plans[int(option)]
        flat = plan.formats[0]
        if isinstance(flat, MixedFormat):
            mixed = MixedFormat.of(flat.band, arrays[f"order.{place}"], next(depths))
            choice = dataclasses.replace(plan, formats=(mixed,))
        elif plan.words is not None:
            choice = plan.with_planes(next(planes))
        else:
            choice = dataclasses.replace(plan, formats=plan.formats_at(int(width)))
        points.append(Point(int(bits), float(loss), choice))
    return points
