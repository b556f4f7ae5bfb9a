"""Calibration and evaluation data in its several forms, as one thing that can be iterated again and again.

Forms: an ``.npz`` of named inputs (leading axis = samples), a folder of such files, a text file with a tokenizer
folder (one sample a line), any re-iterable of feeds, a callable that returns a fresh iterable, or an onnxruntime
``CalibrationDataReader``. All of it is read and checked once when opened, before any model runs.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.calibration.inputs import Feed, InputChecker, ModelInput
from onnxq.errors import CalibrationError

CACHE_BYTES = 1 << 30
"""One-shot sources (generators, readers without rewind) are kept in memory up to this size."""


class FeedSource(abc.ABC):
    """Gives the checked feeds in the same order at every call of `feeds`."""

    name: str

    @abc.abstractmethod
    def feeds(self, checker: InputChecker) -> Iterator[tuple[Feed, int]]:
        """Yield (feed, number of samples in it).

        Raises:
            CalibrationError: the data does not fit the model.
        """


class CalibrationData:
    """Checked feeds of one model; iterate as often as needed, the order is always the same.

    Attributes:
        samples: Samples in one pass.
        batches: Feeds in one pass.
        largest: Index of the feed with the most elements (the one to plan memory with).
        casts: Casts that were made, as sentences.
        notes: Anything else the reader of a report should know.
    """

    def __init__(self, source: FeedSource, inputs: Sequence[ModelInput]) -> None:
        self.inputs = tuple(inputs)
        self._source = source
        checker = InputChecker(self.inputs)
        self.samples = self.batches = self.largest = 0
        most = -1
        for index, (feed, count) in enumerate(source.feeds(checker)):
            self.samples += count
            self.batches += 1
            elements = sum(a.size for a in feed.values())
            if elements > most:
                most, self.largest = elements, index
        if not self.samples:
            raise CalibrationError(
                f"{source.name}: there is no sample in it, so there is nothing to measure the model's inputs on. "
                "Give a source with at least one sample."
            )
        self.casts = tuple(checker.casts.values())
        self.notes: tuple[str, ...] = tuple(getattr(source, "notes", ()))

    def __iter__(self) -> Iterator[Feed]:
        for feed, _ in self._source.feeds(InputChecker(self.inputs)):
            yield feed

    def __len__(self) -> int:
        return self.batches

    @property
    def name(self) -> str:
        """Where the data came from, for messages."""
        return self._source.name

    def halves(self) -> tuple[CalibrationData, CalibrationData] | None:
        """Every other batch, and the rest; None of a single batch."""
        if self.batches < 2:
            return None
        first, second = (CalibrationData(_EveryOther(self._source, start), self.inputs) for start in (0, 1))
        return first, second


class _EveryOther(FeedSource):
    """Every other batch of a source, the first or the second of each two."""

    def __init__(self, source: FeedSource, start: int) -> None:
        self.name = source.name
        self._source, self._start = source, start

    def feeds(self, checker: InputChecker) -> Iterator[tuple[Feed, int]]:
        """See `FeedSource.feeds`."""
        return itertools.islice(self._source.feeds(checker), self._start, None, 2)


def open_data(
    source: Any,
    model_inputs: Sequence[ModelInput],
    *,
    tokenizer: str | Path | None = None,
    batch_size: int = 8,
    max_samples: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> CalibrationData:
    """Open any data form and check all of it against the model.

    Args:
        source: Path of an ``.npz``, a folder of them, or a text file; or feeds (see the module).
        model_inputs: What the model takes (`onnxq.calibration.inputs.model_inputs`).
        tokenizer: Folder with ``tokenizer.json``, or that file; needed for a text file.
        batch_size: Samples per feed for the file forms. Feeds from Python keep their own batches.
        max_samples: At most this many samples. File forms draw them at random from `seed` and keep their order;
            feeds from Python are taken from the start, a feed is never split.
        max_length: Tokens per text sample, longer ones are cut (default 512, or the model's fixed length).
        seed: For the draw.

    Raises:
        CalibrationError: the data does not fit the model; nothing has run.
    """
    for label, number in (
        ("batch_size", batch_size),
        ("max_samples", max_samples),
        ("max_length", max_length),
    ):
        if number is not None and number < 1:
            raise CalibrationError(f"{label} is {number}; it must be at least 1.")
    if isinstance(source, (str, Path)):
        opened = _open_path(Path(source), model_inputs, tokenizer, batch_size, max_samples, max_length, seed)
    else:
        opened = _open_feeds(source, max_samples)
    return CalibrationData(opened, model_inputs)


def _open_path(
    path: Path,
    inputs: Sequence[ModelInput],
    tokenizer: str | Path | None,
    batch_size: int,
    max_samples: int | None,
    max_length: int | None,
    seed: int,
) -> FeedSource:
    if not path.exists():
        raise CalibrationError(f"Calibration data {path} does not exist. Check the path.")
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise CalibrationError(
                f"Folder {path} holds no .npz file. Give a folder of .npz files of named inputs, one .npz, or a text "
                "file with a tokenizer."
            )
        return NpzSource(tuple(files), str(path), batch_size, max_samples, seed)
    if path.suffix == ".npz":
        return NpzSource((path,), str(path), batch_size, max_samples, seed)
    if tokenizer is None:
        raise CalibrationError(
            f"{path} is taken as text, one sample a line, and text needs a tokenizer. Name the folder that holds "
            "tokenizer.json (--tokenizer DIR), or give an .npz."
        )
    # Imported here: the tokenizers library is only needed for text.
    from onnxq.calibration.text import TextSource

    return TextSource.open(path, Path(tokenizer), inputs, batch_size, max_samples, max_length, seed)


def draw(total: int, wanted: int | None, seed: int) -> np.ndarray:
    """Indices of at most `wanted` of `total` samples, drawn from `seed`, in their own order."""
    if wanted is None or wanted >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, size=wanted, replace=False))


@dataclasses.dataclass
class NpzSource(FeedSource):
    """``.npz`` files; batches do not cross files. Peak memory: one file's arrays."""

    files: tuple[Path, ...]
    name: str
    batch_size: int
    max_samples: int | None
    seed: int

    def __post_init__(self) -> None:
        self._counts: tuple[int, ...] | None = None

    def feeds(self, checker: InputChecker) -> Iterator[tuple[Feed, int]]:
        """As `FeedSource.feeds`; reads one file at a time."""
        if self._counts is None:
            self._counts = tuple(self._rows(path, checker) for path in self.files)
        chosen = draw(sum(self._counts), self.max_samples, self.seed)
        start = 0
        for path, count in zip(self.files, self._counts, strict=True):
            rows = chosen[(chosen >= start) & (chosen < start + count)] - start
            start += count
            if not rows.size:
                continue
            arrays = self._read(path)
            for first in range(0, rows.size, self.batch_size):
                part = rows[first : first + self.batch_size]
                where = f"{path} (samples {part[0]} to {part[-1]})"
                yield checker.check({name: a[part] for name, a in arrays.items()}, where), int(part.size)

    def _rows(self, path: Path, checker: InputChecker) -> int:
        arrays = self._read(path)
        checker.check_names(list(arrays), str(path))
        lengths: dict[str, int] = {}
        for name, array in arrays.items():
            if array.ndim == 0:
                raise CalibrationError(
                    f"{path}: '{name}' is a single number without axes; the leading axis of every array counts the "
                    "samples. Repeat it once per sample."
                )
            lengths[name] = array.shape[0]
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{name}: {n}" for name, n in lengths.items())
            raise CalibrationError(
                f"{path}: the arrays hold different numbers of samples ({listed}); row i of each must belong to "
                "sample i. Store them with one leading length."
            )
        return next(iter(lengths.values()), 0)

    def _read(self, path: Path) -> dict[str, np.ndarray]:
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise CalibrationError(
                f"{path} can't be read as .npz: {error}. Write it with numpy.savez(path, input_name=array, ...); "
                "object arrays are not taken."
            ) from error


def _open_feeds(source: Any, max_samples: int | None) -> FeedSource:
    if callable(getattr(source, "get_next", None)):
        rewind = getattr(source, "rewind", None)
        if callable(rewind):
            return FeedsSource(lambda: _reader_pass(source, rewind), "the CalibrationDataReader", max_samples)
        return _cached(_reader_pass(source, None), "the CalibrationDataReader without rewind()", max_samples)
    if isinstance(source, Mapping):
        raise CalibrationError(
            "A dict was given as calibration data. One feed goes into a list: [feed]; arrays whose leading axis "
            "counts samples go into an .npz."
        )
    if callable(source):
        return FeedsSource(source, "the feeds that the callable returns", max_samples)
    if not isinstance(source, Iterable):
        raise CalibrationError(
            f"{type(source).__name__} is no calibration data. Give a path (.npz, folder, text), an iterable of feeds "
            "(dict of input name -> array), or an onnxruntime CalibrationDataReader."
        )
    if iter(source) is source:
        return _cached(source, "the one-shot iterator", max_samples)
    return FeedsSource(lambda: source, "the feeds", max_samples)


def _reader_pass(reader: Any, rewind: Callable[[], Any] | None) -> Iterator[Any]:
    if rewind is not None:
        rewind()
    while (feed := reader.get_next()) is not None:
        yield feed


@dataclasses.dataclass
class FeedsSource(FeedSource):
    """Feeds from Python; `make` returns a fresh iterable for each pass."""

    make: Callable[[], Iterable[Any]]
    name: str
    max_samples: int | None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._first_pass: int | None = None

    def feeds(self, checker: InputChecker) -> Iterator[tuple[Feed, int]]:
        """As `FeedSource.feeds`; a pass that gives other samples than the first is refused."""
        samples = 0
        for number, feed in enumerate(self.make()):
            if self.max_samples is not None and samples >= self.max_samples:
                break
            checked = checker.check(feed, f"{self.name}, feed {number}")
            count = _samples(checked)
            if count:
                yield checked, count
            samples += count
        if self._first_pass is None:
            self._first_pass = samples
        elif self._first_pass != samples:
            raise CalibrationError(
                f"{self.name}: the first pass gave {self._first_pass} samples, this one {samples}. Calibration reads "
                "the data several times and must see the same; give a list, or a callable that returns a fresh "
                "iterable each time."
            )


def _samples(feed: Feed) -> int:
    """Length of the leading axis of the first array that has one; a feed of scalars is one sample."""
    return next((a.shape[0] for a in feed.values() if a.ndim), 1)


def _cached(stream: Iterable[Any], name: str, max_samples: int | None) -> FeedSource:
    """Read a one-shot stream into memory, since calibration passes over the data more than once."""
    kept: list[dict[str, np.ndarray]] = []
    size = samples = 0
    for feed in stream:
        if max_samples is not None and samples >= max_samples:
            break
        if not isinstance(feed, Mapping):
            raise CalibrationError(
                f"{name}, feed {len(kept)}: a feed must be a dict of input name -> array, not {type(feed).__name__}."
            )
        # Copied: readers and generators often refill one buffer.
        kept.append({key: np.array(value) for key, value in feed.items()})
        samples += _samples(kept[-1])
        size += sum(a.nbytes for a in kept[-1].values())
        if size > CACHE_BYTES:
            raise CalibrationError(
                f"{name} can be read only once, calibration needs several passes, and its feeds exceed "
                f"{CACHE_BYTES >> 20} MiB, too much to keep. Give a list, a callable that returns a fresh iterable, "
                "a reader with rewind(), or a smaller max_samples."
            )
    note = f"{name} can be read only once; its {len(kept)} feeds ({size:,} bytes) were kept in memory"
    return FeedsSource(lambda: kept, name, max_samples, (note,))
