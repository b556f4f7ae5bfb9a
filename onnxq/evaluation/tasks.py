"""How well a model does its task, and a reference on the same data beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import onnxruntime as ort

from onnxq.calibration import open_data, session_inputs, text_windows
from onnxq.calibration.inputs import Feed
from onnxq.evaluation.accuracy import (
    AccuracyChange,
    AccuracyReport,
    compare_predictions,
    open_labelled,
    predict,
    score,
)
from onnxq.evaluation.perplexity import PerplexityChange, PerplexityReport, compare_perplexities, measure_perplexity
from onnxq.evaluation.similarity import SimilarityReport, compare_embeddings, embed
from onnxq.progress import NullProgress, Progress

Task: TypeAlias = Literal["perplexity", "accuracy", "similarity"]


@dataclass(frozen=True)
class PerplexityTask:
    """Perplexity of a model; of a reference and what became of it where one was given."""

    model: PerplexityReport
    reference: PerplexityReport | None
    change: PerplexityChange | None


@dataclass(frozen=True)
class AccuracyTask:
    """Accuracy of a model; of a reference and what became of it where one was given."""

    model: AccuracyReport
    reference: AccuracyReport | None
    change: AccuracyChange | None


@dataclass(frozen=True)
class SimilarityTask:
    """A model's embeddings against the reference's."""

    model: SimilarityReport


TaskReport: TypeAlias = PerplexityTask | AccuracyTask | SimilarityTask


def evaluate_perplexity(
    model: ort.InferenceSession,
    text: Path,
    tokenizer: Path,
    *,
    reference: ort.InferenceSession | None = None,
    context: int = 512,
    windows: int | None = 16,
    batch: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> PerplexityTask:
    """Perplexity on windows of a text file; see `text_windows` and `measure_perplexity`.

    Raises:
        CalibrationError: No such text or tokenizer, or less text than one window.
        ModelError: A model is no causal language model.
    """
    tell = progress or NullProgress()
    tell.start("tokenising", None)
    chosen = text_windows(text, tokenizer, context=context, windows=windows, seed=seed)

    def measure(session: ort.InferenceSession, stage: str) -> PerplexityReport:
        tell.start(stage, len(chosen))
        return measure_perplexity(session, chosen, batch=batch, progress=tell)

    before = None if reference is None else measure(reference, "reference")
    after = measure(model, "model")
    tell.finish()
    return PerplexityTask(after, before, None if before is None else compare_perplexities(before, after))


def evaluate_accuracy(
    model: ort.InferenceSession,
    data: Path,
    *,
    reference: ort.InferenceSession | None = None,
    batch: int = 64,
    samples: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> AccuracyTask:
    """Top-1 accuracy on an `.npz` of inputs and labels; see `open_labelled` and `predict`.

    Raises:
        CalibrationError: The data does not fit a model, or has no labels.
        ModelError: A model is no classifier.
    """
    tell = progress or NullProgress()

    def measure(session: ort.InferenceSession, stage: str) -> tuple[np.ndarray, np.ndarray]:
        given = open_labelled(data, session_inputs(session), batch_size=batch, max_samples=samples, seed=seed)
        tell.start(stage, given.data.samples)
        return predict(session, given.data, progress=tell), given.labels

    before = None if reference is None else measure(reference, "reference")[0]
    after, labels = measure(model, "model")
    tell.finish()
    if before is None:
        return AccuracyTask(score(after, labels), None, None)
    return AccuracyTask(score(after, labels), score(before, labels), compare_predictions(before, after, labels))


def evaluate_similarity(
    model: ort.InferenceSession,
    data: Path,
    *,
    reference: ort.InferenceSession,
    tokenizer: Path | None = None,
    batch: int = 8,
    samples: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SimilarityTask:
    """Sentence embeddings of both models on the same data; see `embed` and `compare_embeddings`.

    Raises:
        CalibrationError: The data does not fit a model.
        ModelError: A model gives no embeddings, or there are fewer than three samples.
    """
    tell = progress or NullProgress()

    def measure(session: ort.InferenceSession, stage: str) -> np.ndarray:
        given = open_data(
            data, session_inputs(session), tokenizer=tokenizer, batch_size=batch, max_samples=samples, seed=seed
        )
        tell.start(stage, given.batches)

        def watched() -> Iterator[Feed]:
            for feed in given:
                yield feed
                tell.advance()

        return embed(session, watched())

    before, after = measure(reference, "reference"), measure(model, "model")
    tell.finish()
    return SimilarityTask(compare_embeddings(before, after, seed=seed))
