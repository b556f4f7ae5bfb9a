"""Top-1 accuracy of a classifier on labelled arrays."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxq.calibration import CalibrationData, ModelInput, open_data, session_inputs
from onnxq.errors import CalibrationError, ModelError
from onnxq.evaluation.outputs import MASK
from onnxq.evaluation.sessions import Feeds, Model, as_session
from onnxq.progress import Progress

LABELS = "labels"
"""Name of the array of classes in an `.npz`."""

LOGITS = "logits"


@dataclass(frozen=True)
class Labelled:
    """Inputs and the class of each.

    Attributes:
        data: Feeds of the model.
        labels: int64 [samples].
    """

    data: CalibrationData
    labels: np.ndarray


@dataclass(frozen=True)
class AccuracyReport:
    """Top-1 accuracy.

    Attributes:
        samples: How many.
        correct: How many of them have their label's score as the largest.
        top1: Share of `correct`.
        standard_error: Of `top1` as an estimate for samples like these.
    """

    samples: int
    correct: int
    top1: float
    standard_error: float


@dataclass(frozen=True)
class AccuracyChange:
    """A candidate against its reference on the same samples.

    Attributes:
        top1: Rise of the accuracy, negative where it falls.
        agreement: Share of samples that both put into the same class.
        lost, won: Samples that only the reference gets right, and only the candidate.
    """

    top1: float
    agreement: float
    lost: int
    won: int


def open_labelled(
    source: str | Path,
    inputs: tuple[ModelInput, ...],
    *,
    batch_size: int = 64,
    max_samples: int | None = None,
    seed: int = 0,
) -> Labelled:
    """An `.npz` of named inputs and `labels`, row i of each belonging to sample i.

    Args:
        inputs: What the model takes.
        batch_size: Samples in one feed; a model's fixed batch size has precedence.
        max_samples: At most this many, drawn at random from `seed`.

    Raises:
        CalibrationError: No such file, no labels, labels of another form, or arrays that do not fit the model.
    """
    path = Path(source)
    if path.suffix != ".npz" or not path.is_file():
        raise CalibrationError(
            f"{path} is not an .npz file: accuracy needs one with the model's inputs and '{LABELS}', a class for each "
            "sample."
        )
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CalibrationError(f"{path} can't be read as .npz: {error}.") from error
    if LABELS not in arrays:
        raise CalibrationError(
            f"{path} holds no array '{LABELS}' but {', '.join(arrays) or 'nothing'}: store the class of each sample, "
            "an integer, under that name."
        )
    labels = arrays.pop(LABELS)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise CalibrationError(
            f"{path}: '{LABELS}' is {labels.dtype} of shape {list(labels.shape)}; it must be one integer a sample."
        )
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != len(labels):
            raise CalibrationError(
                f"{path}: '{name}' has shape {list(array.shape)}, but there are {len(labels)} labels; the leading axis "
                "of every array counts the samples."
            )
    if max_samples is not None and max_samples < len(labels):
        chosen = np.sort(np.random.default_rng(seed).choice(len(labels), max_samples, replace=False))
        labels, arrays = labels[chosen], {name: array[chosen] for name, array in arrays.items()}
    size = _fixed_batch(inputs) or batch_size

    def feeds() -> Iterator[Feeds]:
        for start in range(0, len(labels), size):
            yield {name: array[start : start + size] for name, array in arrays.items()}

    return Labelled(open_data(feeds, inputs), labels.astype(np.int64))


def _fixed_batch(inputs: tuple[ModelInput, ...]) -> int | None:
    sizes = [i.shape[0] for i in inputs if i.shape]
    return next((size for size in sizes if isinstance(size, int)), None)


def predict(model: Model, data: CalibrationData, *, progress: Progress | None = None) -> np.ndarray:
    """The class with the largest score for each sample, int64 [samples]; the first of several equal ones.

    Scores are the output `logits`, or the only output: [batch, classes].

    Args:
        progress: Advanced by the samples done.

    Raises:
        ModelError: Several outputs and none is `logits`, scores of another shape, or NaN in them.
    """
    session = as_session(model)
    names = [output.name for output in session.get_outputs()]
    if LOGITS not in names and len(names) > 1:
        raise ModelError(f"the model has the outputs {', '.join(names)} and none of them is {LOGITS!r}")
    name = LOGITS if LOGITS in names else names[0]
    found: list[np.ndarray] = []
    done = 0
    for feed in data:
        (scores,) = session.run([name], feed)
        if scores.ndim != 2:
            hint = " (a language model? use the task perplexity)" if MASK in feed and scores.ndim == 3 else ""
            raise ModelError(f"{name} has shape {list(scores.shape)}: accuracy needs [batch, classes]{hint}")
        if np.isnan(scores).any():
            raise ModelError(f"{name} holds NaN for samples {done} to {done + len(scores) - 1}")
        found.append(scores.argmax(1))
        done += len(scores)
        if progress is not None:
            progress.advance(len(scores))
    return np.concatenate(found).astype(np.int64)


def score(predictions: np.ndarray, labels: np.ndarray) -> AccuracyReport:
    """Accuracy of predictions [samples] given labels [samples]."""
    correct, samples = int((predictions == labels).sum()), len(labels)
    top1 = correct / samples
    return AccuracyReport(samples, correct, top1, math.sqrt(top1 * (1 - top1) / samples))


def compare_predictions(reference: np.ndarray, candidate: np.ndarray, labels: np.ndarray) -> AccuracyChange:
    """What became of the reference's predictions; all three [samples]."""
    before, after = reference == labels, candidate == labels
    return AccuracyChange(
        top1=float(after.mean() - before.mean()),
        agreement=float((reference == candidate).mean()),
        lost=int((before & ~after).sum()),
        won=int((after & ~before).sum()),
    )


def top1(model: Model, source: str | Path, *, batch_size: int = 64, max_samples: int | None = None) -> AccuracyReport:
    """Top-1 accuracy of a classifier on an `.npz` of inputs and labels; see `open_labelled` and `predict`."""
    session = as_session(model)
    labelled = open_labelled(source, session_inputs(session), batch_size=batch_size, max_samples=max_samples)
    return score(predict(session, labelled.data), labelled.labels)
