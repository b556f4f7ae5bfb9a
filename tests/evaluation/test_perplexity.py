from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from onnxq.errors import CalibrationError, ModelError
from onnxq.evaluation import compare_perplexities, measure_perplexity
from onnxq.evaluation.perplexity import PerplexityReport, token_nll
from tests.evaluation.models import write_bigram_model, write_classifier, write_encoder

WINDOWS = np.array([[0, 1, 2, 3], [3, 3, 1, 0]])


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_uniform_logits_give_the_vocabulary_size(tmp_path: Path, positions: bool, batch: int) -> None:
    model = write_bigram_model(tmp_path / "m.onnx", np.full((7, 7), 3.0), positions=positions)
    found = measure_perplexity(model, WINDOWS, batch=batch)
    assert found.perplexity == pytest.approx(7, rel=1e-12)
    assert (found.context, found.windows, found.tokens) == (4, 2, 6)
    assert found.window_nll == pytest.approx([math.log(7)] * 2)


def test_bigrams_by_hand(tmp_path: Path) -> None:
    # After 0 comes 1 with probability 1/2, after 1 comes 0 with probability 1/8.
    table = np.log(np.array([[0.5, 0.5], [0.125, 0.875]]))
    model = write_bigram_model(tmp_path / "m.onnx", table)
    found = measure_perplexity(model, np.array([[0, 1, 0]]))
    assert found.nll == pytest.approx((math.log(2) + math.log(8)) / 2, rel=1e-6)
    assert found.perplexity == pytest.approx(4, rel=1e-6)


def test_the_token_predicted_is_the_next_one(tmp_path: Path) -> None:
    """A model that is sure of i + 1 after i: nothing lost on a rising window, much on a falling one."""
    sure = np.where(np.eye(5, k=1) > 0, 50.0, 0.0)
    model = write_bigram_model(tmp_path / "m.onnx", sure)
    rising, falling = measure_perplexity(model, np.array([[0, 1, 2, 3, 4], [3, 2, 1, 0, 0]])).window_nll
    assert rising == pytest.approx(0, abs=1e-12)
    assert falling == pytest.approx(50, rel=1e-6)


def test_likelihoods_in_pieces_are_those_of_a_plain_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(0, 30, (23, 11)).astype(np.float32), rng.integers(0, 11, 23)
    exact = logits.astype(np.longdouble)
    plain = np.log(np.exp(exact).sum(1)) - exact[np.arange(23), tokens]
    monkeypatch.setattr("onnxq.evaluation.perplexity._PIECE_VALUES", 44)
    np.testing.assert_allclose(token_nll(logits, tokens), plain.astype(np.float64), rtol=1e-13, atol=1e-13)


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[6e4, 0.0], [-6e4, -6e4]], np.float16)
    np.testing.assert_allclose(token_nll(logits, np.array([1, 0])), [float(logits[0, 0]), math.log(2)])


def test_refusals(tmp_path: Path) -> None:
    model = write_bigram_model(tmp_path / "m.onnx", np.zeros((4, 4)))
    with pytest.raises(ModelError, match=r"shape \(0, 4\)"):
        measure_perplexity(model, WINDOWS[:0])
    with pytest.raises(ModelError, match="vocabulary is 4"):
        token_nll(np.zeros((1, 4)), np.array([4]))
    with pytest.raises(ModelError, match="no output 'logits' but hidden"):
        measure_perplexity(write_encoder(tmp_path / "e.onnx"), WINDOWS)
    broken = np.zeros((4, 4))
    broken[2, 0] = np.nan
    with pytest.raises(ModelError, match="window 0 hold NaN"):
        measure_perplexity(write_bigram_model(tmp_path / "n.onnx", broken), WINDOWS)
    with pytest.raises(CalibrationError, match="input_ids"):
        measure_perplexity(write_classifier(tmp_path / "c.onnx"), WINDOWS)


def report(*nll: float) -> PerplexityReport:
    mean = float(np.mean(nll))
    return PerplexityReport(4, len(nll), 3 * len(nll), mean, math.exp(mean), nll)


def test_a_change_by_hand() -> None:
    found = compare_perplexities(report(1, 2, 3), report(1.5, 2.5, 4.0))
    # Rises 0.5, 0.5, 1: their mean is 2/3, their deviation sqrt(1/12).
    assert found.nll == pytest.approx(2 / 3)
    assert found.ratio == pytest.approx(math.exp(2 / 3))
    assert found.standard_error == pytest.approx(math.sqrt(1 / 12 / 3))
    assert math.isnan(compare_perplexities(report(1), report(2)).standard_error)
    with pytest.raises(ModelError, match="cannot be compared"):
        compare_perplexities(report(1), report(1, 2))
