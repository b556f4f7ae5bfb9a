from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxq.errors import ModelError
from onnxq.evaluation import compare_embeddings, embed, rating_correlation, similarity, spearman
from tests.evaluation.models import feeds, write_encoder


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_mean_pool_by_hand() -> None:
    hidden = np.array([[[3.0, 0.0], [3.0, 8.0], [99.0, 99.0]]])
    np.testing.assert_allclose(similarity.mean_pool(hidden, np.array([[1, 1, 0]])), [[0.6, 0.8]])


def test_mean_pool_of_nothing_is_zero_not_nan() -> None:
    np.testing.assert_array_equal(similarity.mean_pool(np.ones((1, 2, 3)), np.zeros((1, 2))), np.zeros((1, 3)))


def test_ranks_share_ties() -> None:
    np.testing.assert_array_equal(similarity.ranks(np.array([10.0, 20.0, 10.0, 30.0])), [1.5, 3, 1.5, 4])


def test_spearman_by_hand() -> None:
    assert spearman(np.array([1, 2, 3, 4]), np.array([1, 10, 100, 1000])) == pytest.approx(1)
    assert spearman(np.array([1, 2, 3, 4]), np.array([4, 3, 2, 1])) == pytest.approx(-1)
    # d = (0, 1, 1, 0): 1 - 6 * 2 / (4 * 15)
    assert spearman(np.array([1, 2, 3, 4]), np.array([1, 3, 2, 4])) == pytest.approx(0.8)
    assert np.isnan(spearman(np.ones(3), np.arange(3)))


def test_spearman_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 20, 200), rng.integers(0, 20, 200)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


def test_embeddings_by_hand() -> None:
    reference = unit(np.array([[1.0, 0], [1, 0.2], [0, 1], [-1, 0.1]]))
    same = compare_embeddings(reference, reference)
    assert (same.sentences, same.spearman, same.nearest) == (4, pytest.approx(1), 1.0)
    assert same.cosine_min == pytest.approx(1)
    turned = reference.copy()
    turned[0] = [0, 1]
    other = compare_embeddings(reference, turned)
    assert other.cosine_min == pytest.approx(0)
    assert other.cosine_mean == pytest.approx(0.75)
    # nearest in the reference: 1, 0, 1, 2; with sentence 0 turned onto sentence 2: 2, 0, 0, 0
    assert other.nearest == 0.25


def test_sampled_pairs_estimate_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    reference = unit(rng.standard_normal((300, 16)))
    candidate = unit(reference + 0.1 * rng.standard_normal((300, 16)))
    everything = compare_embeddings(reference, candidate)
    monkeypatch.setattr(similarity, "ALL_PAIRS_LIMIT", 10)
    monkeypatch.setattr(similarity, "SAMPLED_PAIRS", 100_000)
    sampled = compare_embeddings(reference, candidate, seed=1)
    # The standard error of a rank correlation of 0.9 from 1e5 pairs is below 1e-3.
    assert sampled.spearman == pytest.approx(everything.spearman, abs=5e-3)
    assert sampled == compare_embeddings(reference, candidate, seed=1)


def test_embed_leaves_padding_out(tmp_path: Path) -> None:
    model = write_encoder(tmp_path / "m.onnx")
    (batch,) = feeds(1)
    embeddings = embed(model, [batch])
    assert embeddings.shape == (4, 8)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-6)
    other = {**batch, "input_ids": np.where(batch["attention_mask"] == 0, 17, batch["input_ids"])}
    np.testing.assert_allclose(embed(model, [other]), embeddings, rtol=1e-6)


def test_embed_refusals(tmp_path: Path) -> None:
    model = write_encoder(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="no output 'pooled'"):
        embed(model, feeds(1), output="pooled")
    with pytest.raises(ModelError, match="at least one sentence"):
        embed(model, [])
    with pytest.raises(ModelError, match="one shape"):
        compare_embeddings(np.ones((4, 2)), np.ones((3, 2)))


def test_rating_correlation_finds_a_linear_rating() -> None:
    rng = np.random.default_rng(0)
    x, direction = rng.standard_normal((300, 8)), rng.standard_normal(8)
    assert rating_correlation(x[:200], x[:200] @ direction + 2, x[200:], x[200:] @ direction + 2) > 0.999
    assert abs(rating_correlation(x[:200], rng.standard_normal(200), x[200:], x[200:] @ direction)) < 0.6
