"""Calibrate block by block, each on a model whose earlier weights are quantised already.

    sequence = SequentialCalibration(loaded, requests, data)
    with sequence:
        for block, collected in sequence:
            for request in block.requests:
                solved = solve(weight_of(request), collected.site(request.site_name))
                sequence.replace(initializer_name, solved_in_the_initializers_layout)

Every block runs the model from its inputs, so the cost over L blocks is about L / 2 forward passes over the data.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as ir

from onnxq.calibration.collect import TAP_BYTES, Collected, Loaded, Progress, collect
from onnxq.calibration.data import CalibrationData
from onnxq.calibration.session import SessionHook
from onnxq.calibration.taps import GraphIndex, TapRequest

_LAYER = re.compile(r"^(.*?(?:^|[./_])(?:layers?|h|blocks?)[./_]\d+)(?:[./_]|$)")

SPILL_BYTES = 512 << 20
"""Replaced weights beyond this total wait in temporary files, memory-mapped."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Attributes: name: the layer's prefix, or the first site's name; requests: in topological order."""

    name: str
    requests: tuple[TapRequest, ...]


def layer_of(name: str) -> str | None:
    """The part of a node name up to its layer index: ``/bert/encoder/layer.3`` (also layers.3, h.3, blocks.3)."""
    found = _LAYER.match(name)
    return found.group(1) if found else None


def group_blocks(model: ir.Model, requests: Iterable[TapRequest]) -> tuple[Block, ...]:
    """One block per transformer layer, by the site names; between layers, one per run of other sites.

    Where no site name has a layer index, each distinct input is a block. Blocks come in the topological order of
    their first site, and so do the requests in them.
    """
    index = GraphIndex(model)
    ordered = sorted((r for r in requests if r.level != "none"), key=lambda r: index.position(r.value))
    named = any(layer_of(r.site_name) for r in ordered)
    groups: dict[object, list[TapRequest]] = {}
    outside = 0
    before: str | None = None
    for request in ordered:
        layer = layer_of(request.site_name)
        key: object
        if not named:
            key = id(request.value)
        elif layer is not None:
            key = layer
        else:
            # Sites outside of layers: what stands before, between and after the layers is kept apart.
            outside += before is not None
            key = outside
        before = layer
        groups.setdefault(key, []).append(request)
    return tuple(
        Block(key if isinstance(key, str) else members[0].site_name, tuple(members)) for key, members in groups.items()
    )


class SequentialCalibration:
    """Iterate to get (block, statistics); call `replace` for the solved weights before going on.

    A context manager: leaving it removes the temporary files of spilled weights.
    """

    def __init__(
        self,
        loaded_model: Loaded,
        requests: Sequence[TapRequest],
        data: CalibrationData,
        *,
        blocks: Sequence[Block] | None = None,
        threads: int | None = None,
        progress: Callable[[Progress], None] | None = None,
        session_options: SessionHook | None = None,
        tap_bytes: int = TAP_BYTES,
        spill_bytes: int = SPILL_BYTES,
    ) -> None:
        self.blocks = tuple(blocks) if blocks is not None else group_blocks(loaded_model.model, requests)
        self.overrides: dict[str, np.ndarray] = {}
        self._loaded, self._data = loaded_model, data
        self._threads, self._progress, self._hook = threads, progress, session_options
        self._tap_bytes, self._spill_bytes = tap_bytes, spill_bytes
        self._held = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __iter__(self) -> Iterator[tuple[Block, Collected]]:
        for block in self.blocks:
            yield (
                block,
                collect(
                    self._loaded,
                    block.requests,
                    self._data,
                    weight_overrides=self.overrides,
                    threads=self._threads,
                    progress=self._progress,
                    session_options=self._hook,
                    tap_bytes=self._tap_bytes,
                ),
            )

    def replace(self, initializer: str, array: np.ndarray) -> None:
        """From the next block on, run with this array in the initializer's place (its layout, any float dtype)."""
        if self._held + array.nbytes > self._spill_bytes:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="onnxq-calibration-")
            file = Path(self._folder.name) / f"{len(self.overrides)}.npy"
            np.save(file, array, allow_pickle=False)
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        else:
            self._held += array.nbytes
        self.overrides[initializer] = array

    def close(self) -> None:
        """Forget the replaced weights and remove their temporary files."""
        self.overrides.clear()
        self._held = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> SequentialCalibration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
