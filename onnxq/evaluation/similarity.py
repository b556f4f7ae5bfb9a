"""How well a candidate keeps a reference's sentence embeddings, and what that does to ranking and a small task.

Embeddings are token vectors averaged over the tokens that are not padding and scaled to length 1, as
sentence-transformers does for models with mean pooling (Reimers and Gurevych, 2019).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from onnxq.errors import ModelError
from onnxq.evaluation.outputs import MASK
from onnxq.evaluation.sessions import Feeds, Model, as_session, run

ALL_PAIRS_LIMIT = 1500
"""Up to this many sentences every pair is ranked (1.1 million pairs); beyond it, a random million."""

SAMPLED_PAIRS = 1_000_000


@dataclass(frozen=True)
class SimilarityReport:
    """A candidate's sentence embeddings against the reference's.

    Attributes:
        sentences: How many.
        cosine_mean: Mean cosine between the two embeddings of a sentence; also the 1st percentile and the
            smallest.
        spearman: Rank correlation of the cosines of sentence pairs, the usual score of semantic similarity,
            with the reference as truth.
        nearest: Share of sentences whose nearest other sentence is the same.
    """

    sentences: int
    cosine_mean: float
    cosine_p01: float
    cosine_min: float
    spearman: float
    nearest: float


def mean_pool(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Normalised means [batch, width] of vectors [batch, tokens, width] where mask [batch, tokens] is set."""
    weights = (mask != 0).astype(hidden.dtype)[..., None]
    means = (hidden * weights).sum(1) / np.maximum(weights.sum(1), 1)
    return np.asarray(means / np.maximum(np.linalg.norm(means, axis=-1, keepdims=True), 1e-12))


def embed(model: Model, data: Iterable[Feeds], *, output: str | None = None) -> np.ndarray:
    """Embeddings [sentences, width], float32, of all samples in `data`.

    Args:
        data: Feeds with `attention_mask` [batch, tokens].
        output: Token vectors [batch, tokens, width], or finished embeddings [batch, width]; the first output
            where None.

    Raises:
        ModelError: No such output, no mask, no data, or an output of another form.
    """
    session = as_session(model)
    name = output or session.get_outputs()[0].name
    parts = []
    for feeds in data:
        outputs = run(session, feeds)
        if name not in outputs:
            raise ModelError(f"the model has no output {name!r}; it has {', '.join(outputs)}")
        value = outputs[name].astype(np.float32, copy=False)
        if value.ndim == 2:
            parts.append(value / np.maximum(np.linalg.norm(value, axis=-1, keepdims=True), 1e-12))
        elif value.ndim == 3 and MASK in feeds:
            parts.append(mean_pool(value, feeds[MASK]))
        else:
            raise ModelError(
                f"{name} has shape {value.shape}: embeddings need [batch, width], or [batch, tokens, width] and {MASK}"
            )
    if not parts:
        raise ModelError("there is no data to embed: give at least one sentence")
    return np.concatenate(parts)


def compare_embeddings(reference: np.ndarray, candidate: np.ndarray, *, seed: int = 0) -> SimilarityReport:
    """Compare embeddings [sentences, width] of the same sentences, rows of length 1.

    Args:
        seed: Of the choice of pairs where there are too many.

    Raises:
        ModelError: Other shapes, or fewer than three sentences.
    """
    if reference.shape != candidate.shape or reference.ndim != 2 or len(reference) < 3:
        raise ModelError(
            f"embeddings {reference.shape} and {candidate.shape} must have one shape and at least three rows"
        )
    n = len(reference)
    own = (reference.astype(np.float64) * candidate).sum(1)
    if n <= ALL_PAIRS_LIMIT:
        first, second = np.triu_indices(n, 1)
    else:
        rng = np.random.default_rng(seed)
        first = rng.integers(0, n, SAMPLED_PAIRS)
        second = (first + rng.integers(1, n, SAMPLED_PAIRS)) % n
    return SimilarityReport(
        sentences=n,
        cosine_mean=float(own.mean()),
        cosine_p01=float(np.percentile(own, 1)),
        cosine_min=float(own.min()),
        spearman=spearman(_pair_cosines(reference, first, second), _pair_cosines(candidate, first, second)),
        nearest=float((_nearest(reference) == _nearest(candidate)).mean()),
    )


def _pair_cosines(embeddings: np.ndarray, first: np.ndarray, second: np.ndarray, piece: int = 65536) -> np.ndarray:
    starts = range(0, len(first), piece)
    return np.concatenate(
        [np.einsum("ij,ij->i", embeddings[first[s : s + piece]], embeddings[second[s : s + piece]]) for s in starts]
    )


def _nearest(embeddings: np.ndarray, piece: int = 1024) -> np.ndarray:
    """Index of the nearest other row, for each row."""
    found = []
    for start in range(0, len(embeddings), piece):
        cosines = embeddings[start : start + piece] @ embeddings.T
        rows = np.arange(len(cosines))
        cosines[rows, start + rows] = -np.inf
        found.append(cosines.argmax(1))
    return np.concatenate(found)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], np.float64)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two vectors; NaN where one is constant."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    norms = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norms) if norms > 0 else float("nan")


def rating_correlation(
    train: np.ndarray,
    train_ratings: np.ndarray,
    test: np.ndarray,
    test_ratings: np.ndarray,
    *,
    ridge: float = 1.0,
) -> float:
    """Spearman correlation of human ratings with a ridge regression from embeddings.

    The regression is fitted on one part and tested on the other.

    Args:
        train, test: Embeddings [sentences, width].
        train_ratings, test_ratings: [sentences].
        ridge: Weight of the squared norm of the coefficients.
    """
    x, mean = train.astype(np.float64), train.mean(0, dtype=np.float64)
    x = x - mean
    rating_mean = train_ratings.mean()
    coefficients = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ (train_ratings - rating_mean))
    return spearman((test - mean) @ coefficients + rating_mean, test_ratings)
