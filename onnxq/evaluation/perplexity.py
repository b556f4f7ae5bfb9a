"""Perplexity of a causal language model on windows of running text.

The perplexity is exp of the mean negative log likelihood of a token given those before it in its window. A window's
first token is given and not scored, so windows of T tokens score T - 1 each. The number depends on T and on the
tokenizer: compare models on the same windows only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from onnxq.calibration import session_inputs, window_feeds
from onnxq.errors import ModelError
from onnxq.evaluation.sessions import Model, as_session
from onnxq.progress import Progress

LOGITS = "logits"

_PIECE_VALUES = 1 << 22
"""Logits turned to float64 at a time: 32 MB."""


@dataclass(frozen=True)
class PerplexityReport:
    """Perplexity over windows.

    Attributes:
        context: Tokens of a window.
        windows: How many.
        tokens: Tokens scored: windows x (context - 1).
        nll: Mean negative log likelihood of a token, in nats.
        perplexity: exp(nll).
        window_nll: Mean negative log likelihood in each window.
    """

    context: int
    windows: int
    tokens: int
    nll: float
    perplexity: float
    window_nll: tuple[float, ...]


@dataclass(frozen=True)
class PerplexityChange:
    """A candidate against its reference on the same windows.

    Attributes:
        ratio: Of the perplexities, candidate over reference.
        nll: Rise of the mean negative log likelihood.
        standard_error: Of `nll`, from the differences window by window; NaN for one window.
    """

    ratio: float
    nll: float
    standard_error: float


def measure_perplexity(
    model: Model,
    windows: np.ndarray,
    *,
    batch: int = 1,
    progress: Progress | None = None,
) -> PerplexityReport:
    """Perplexity of a causal language model.

    Memory: the logits of one batch, and 32 MB.

    Args:
        model: Takes `input_ids` [batch, tokens] and gives `logits` [batch, tokens, vocabulary] for every position.
        windows: [windows, context] token numbers (`text_windows`).
        batch: Windows in one run.
        progress: Advanced by the windows done.

    Raises:
        ModelError: No logits, logits of another shape, or NaN in them.
        CalibrationError: As in `window_feeds`.
    """
    if windows.ndim != 2 or not windows.shape[0] or windows.shape[1] < 2:
        raise ModelError(f"windows have shape {windows.shape}: give [windows, context], at least one of two tokens")
    session = as_session(model)
    names = [output.name for output in session.get_outputs()]
    if LOGITS not in names:
        raise ModelError(
            f"the model has no output {LOGITS!r} but {', '.join(names)}: perplexity needs a causal language model"
        )
    means: list[float] = []
    for feed in window_feeds(windows, session_inputs(session), batch=batch):
        ids = feed["input_ids"]
        (logits,) = session.run([LOGITS], feed)
        if logits.ndim != 3 or logits.shape[:2] != ids.shape:
            raise ModelError(
                f"{LOGITS} has shape {list(logits.shape)} for {ids.shape[0]} x {ids.shape[1]} tokens: perplexity needs "
                "[batch, tokens, vocabulary], a row for every position"
            )
        for row, tokens in zip(logits, ids, strict=True):
            means.append(float(token_nll(row[:-1], tokens[1:]).mean()))
            if math.isnan(means[-1]):
                raise ModelError(f"{LOGITS} of window {len(means) - 1} hold NaN: the model does not compute")
        if progress is not None:
            progress.advance(len(ids))
    mean = float(np.mean(means))
    return PerplexityReport(
        context=windows.shape[1],
        windows=len(means),
        tokens=len(means) * (windows.shape[1] - 1),
        nll=mean,
        perplexity=math.exp(mean) if mean < math.log(np.finfo(np.float64).max) else math.inf,
        window_nll=tuple(means),
    )


def token_nll(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Negative log likelihoods [tokens], float64, in nats.

    Args:
        logits: [tokens, vocabulary], any float; taken to float64 in pieces.
        tokens: [tokens] integers below the vocabulary size.

    Raises:
        ModelError: A token beyond the vocabulary.
    """
    count, vocabulary = logits.shape
    if count and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise ModelError(
            f"tokens range from {tokens.min()} to {tokens.max()}, but the model's vocabulary is {vocabulary}: use the "
            "model's own tokenizer"
        )
    found = np.empty(count, np.float64)
    step = max(1, _PIECE_VALUES // vocabulary)
    for start in range(0, count, step):
        piece = logits[start : start + step].astype(np.float64)
        right = np.take_along_axis(piece, tokens[start : start + step, None], 1)[:, 0]
        largest = piece.max(1)
        piece -= largest[:, None]
        np.exp(piece, out=piece)
        found[start : start + step] = np.log(piece.sum(1)) + largest - right
    return found


def compare_perplexities(reference: PerplexityReport, candidate: PerplexityReport) -> PerplexityChange:
    """How much worse the candidate predicts the same windows.

    Raises:
        ModelError: Other windows.
    """
    if (reference.context, reference.windows) != (candidate.context, candidate.windows):
        raise ModelError(
            f"perplexities over {reference.windows} windows of {reference.context} and {candidate.windows} of "
            f"{candidate.context} cannot be compared"
        )
    rise = np.array(candidate.window_nll) - np.array(reference.window_nll)
    error = float(rise.std(ddof=1) / math.sqrt(len(rise))) if len(rise) > 1 else math.nan
    return PerplexityChange(candidate.perplexity / reference.perplexity, float(rise.mean()), error)
