"""What a loop over several graphs fed them: an encoder once, a decoder token by token.

A *trace* holds every run of every session in order. An input that is, byte for byte, what an earlier run put out is
kept as a link to it; token ids and masks are kept as they were. So a trace serves twice: its feeds are each graph's
calibration data, and it can be played again with changed weights, where an error of the encoder reaches the decoder and
one of a step the next, while the tokens stay those of the first time (teacher forcing).

Works for any loop that calls ``session.run``: caches, recurrent states and cross-attention need no special case.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnxruntime as ort

from onnxq.errors import CalibrationError

_INDEX, _ARRAYS = "trace.json", "arrays.bin"
_ALIGNMENT = 64

Feed = Mapping[str, np.ndarray]
Run = Callable[[Feed], Mapping[str, np.ndarray]]
"""Runs a graph: its inputs by name to its outputs by name."""


@dataclasses.dataclass(frozen=True)
class Link:
    """An input that an earlier call put out.

    Attributes:
        call: its number.
        output: which of its outputs.
    """

    call: int
    output: str


@dataclasses.dataclass(frozen=True)
class Region:
    """Where an array is in the file of arrays.

    Attributes:
        offset: in bytes.
        dtype: its NumPy name.
        shape: its shape.
    """

    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Call:
    """One run of a session.

    Attributes:
        graph: file name of its model.
        arrays: where each input is kept.
        links: where inputs came from, of those that came from somewhere.
        sequence: number of the sentence, clip or other sample that it belongs to.
    """

    graph: str
    arrays: Mapping[str, Region]
    links: Mapping[str, Link]
    sequence: int


class Trace:
    """A recorded trace in a folder. Arrays are memory-mapped and never held together.

    Raises:
        CalibrationError: the folder holds no trace.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            plain = json.loads((self.folder / _INDEX).read_text())
        except (OSError, ValueError) as error:
            raise CalibrationError(
                f"{self.folder} holds no recorded trace ({error}). Record one with onnxq.calibration.Recorder."
            ) from error
        self.calls = tuple(
            Call(
                call["graph"],
                {name: Region(offset, dtype, tuple(shape)) for name, (offset, dtype, shape) in call["arrays"].items()},
                {name: Link(*link) for name, link in call["links"].items()},
                call["sequence"],
            )
            for call in plain
        )
        # One map for all: a decoder's steps are thousands of small arrays.
        self._data = np.memmap(self.folder / _ARRAYS, np.uint8, "r")

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether a folder holds a trace."""
        return (folder / _INDEX).is_file()

    @property
    def graphs(self) -> tuple[str, ...]:
        """The models that ran, in the order of their first run."""
        return tuple(dict.fromkeys(call.graph for call in self.calls))

    @property
    def sequences(self) -> int:
        """How many sentences, clips or other samples were recorded."""
        return len({call.sequence for call in self.calls})

    def feeds(self, graph: str) -> Iterator[dict[str, np.ndarray]]:
        """What a graph was fed, call by call."""
        for call in self.calls:
            if call.graph == graph:
                yield self._feed(call)

    def calls_per_step(self, graph: str) -> float:
        """Runs of a graph for each run of the graph that ran most: 1 for a decoder, little for its encoder."""
        counts = [sum(call.graph == name for call in self.calls) for name in self.graphs]
        runs = sum(call.graph == graph for call in self.calls)
        return runs / max(counts, default=1)

    def head(self, sequences: int) -> Trace:
        """The trace of the first samples alone."""
        kept = sorted({call.sequence for call in self.calls})[:sequences]
        last = kept[-1] if kept else -1
        # Samples are recorded one after the other, so that no call of a kept one lies behind.
        part = object.__new__(Trace)
        part.folder, part._data = self.folder, self._data
        part.calls = tuple(call for call in self.calls if call.sequence <= last)
        return part

    def play(self, runs: Mapping[str, Run]) -> Iterator[tuple[Call, Mapping[str, np.ndarray]]]:
        """Plays it again.

        Args:
            runs: how to run each graph.

        Yields:
            Each call and its outputs by name. Outputs that a later call takes are held until then.
        """
        last_use: dict[int, int] = {}
        for number, call in enumerate(self.calls):
            for link in call.links.values():
                last_use[link.call] = number
        held: dict[int, Mapping[str, np.ndarray]] = {}
        for number, call in enumerate(self.calls):
            feed = self._feed(call)
            feed |= {name: held[link.call][link.output] for name, link in call.links.items()}
            outputs = runs[call.graph](feed)
            if number in last_use:
                held[number] = outputs
            for done in [earlier for earlier in held if last_use[earlier] <= number and earlier != number]:
                del held[done]
            yield call, outputs

    def _feed(self, call: Call) -> dict[str, np.ndarray]:
        return {name: self._array(region) for name, region in call.arrays.items()}

    def _array(self, region: Region) -> np.ndarray:
        dtype = np.dtype(region.dtype)
        count = math.prod(region.shape)
        data = self._data[region.offset : region.offset + count * dtype.itemsize]
        array: np.ndarray = data.view(np.ndarray).view(dtype).reshape(region.shape)
        return array


class Recorder:
    """Records what sessions are fed.

    Example::

        with Recorder(folder) as recorder:
            encoder = recorder.wrap(encoder_session, "encoder_model.onnx")
            decoder = recorder.wrap(decoder_session, "decoder_model.onnx")
            for sentence in sentences:
                recorder.next_sequence()
                translate(sentence, encoder, decoder)   # calls .run on both
        trace = Trace(folder)

    Samples go one by one: a batch has padding that is looked up and multiplied like any token.

    Args:
        folder: an empty folder, or a new one; the index is written last, at the end of the ``with`` block.

    Raises:
        CalibrationError: the folder is not empty.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self.folder.iterdir()):
            raise CalibrationError(f"{self.folder} is not empty: record into a new folder.")
        self._file = (self.folder / _ARRAYS).open("wb")
        self._regions: dict[bytes, Region] = {}
        self._calls: list[Call] = []
        self._origins: dict[bytes, Link] = {}
        self._sequence = -1

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.write(b"\0")  # an empty file can't be mapped
        self._file.close()
        if kind is not None:
            return
        plain = [
            {
                "graph": call.graph,
                "arrays": {name: dataclasses.astuple(region) for name, region in call.arrays.items()},
                "links": {name: dataclasses.astuple(link) for name, link in call.links.items()},
                "sequence": call.sequence,
            }
            for call in self._calls
        ]
        handle, partial = tempfile.mkstemp(dir=self.folder)
        with os.fdopen(handle, "w") as file:
            json.dump(plain, file)
        os.replace(partial, self.folder / _INDEX)

    def next_sequence(self) -> None:
        """What runs from here on belongs to the next sample; nothing of it comes from the one before."""
        self._sequence += 1
        self._origins.clear()

    def wrap(self, session: ort.InferenceSession, graph: str) -> RecordedSession:
        """A session that records, to be used in place of the other.

        Args:
            session: of a float model.
            graph: the file name of its model.
        """
        return RecordedSession(session, graph, self)

    def record(self, graph: str, feed: Feed, outputs: Mapping[str, np.ndarray]) -> None:
        """Notes a run that happened."""
        number = len(self._calls)
        arrays, links = {}, {}
        for name, array in feed.items():
            digest = _digest(array)
            arrays[name] = self._kept(digest, array)
            # Integers are tokens and masks, which stay; an empty cache is nobody's output.
            if array.dtype.kind == "f" and array.size and digest in self._origins:
                links[name] = self._origins[digest]
        self._calls.append(Call(graph, arrays, links, max(self._sequence, 0)))
        for name, array in outputs.items():
            if array.dtype.kind == "f" and array.size:
                self._origins[_digest(array)] = Link(number, name)

    def _kept(self, digest: bytes, array: np.ndarray) -> Region:
        """Where an array is, written unless an equal one is there."""
        if digest not in self._regions:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
            self._regions[digest] = Region(self._file.tell(), array.dtype.name, array.shape)
            self._file.write(np.ascontiguousarray(array).tobytes())
        return self._regions[digest]


class RecordedSession:
    """Stands in for an `onnxruntime.InferenceSession` and records its runs."""

    def __init__(self, session: ort.InferenceSession, graph: str, recorder: Recorder) -> None:
        self._session, self._graph, self._recorder = session, graph, recorder
        self._names = [output.name for output in session.get_outputs()]

    def run(self, output_names: Sequence[str] | None, feed: Feed, run_options: Any = None) -> list[Any]:
        """As the session's own; all outputs are computed, since any may be what a later run is fed."""
        values = self._session.run(None, dict(feed), run_options)
        outputs = dict(zip(self._names, values, strict=True))
        self._recorder.record(self._graph, feed, outputs)
        return [outputs[name] for name in output_names or self._names]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def _digest(array: np.ndarray) -> bytes:
    digest = hashlib.blake2b(f"{array.dtype} {array.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.digest()
