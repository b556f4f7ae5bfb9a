"""`onnxq eval` from the outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from onnxq.cli import app
from tests.evaluation.models import feeds, write_bigram_model, write_classifier, write_encoder, write_tokenizer

pytest.importorskip("tokenizers")

TOKENS = 5


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["eval", *(str(word) for word in words)])


def run_json(*words: object) -> Any:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """uniform.onnx and sharper.onnx (language models), flat.onnx and flipped.onnx (classifiers), one.onnx and
    noisy.onnx (encoders), with their data.
    """
    made = tmp_path_factory.mktemp("eval")
    write_bigram_model(made / "uniform.onnx", np.zeros((TOKENS, TOKENS)))
    # Twice the probability for token 1 as for each other one: 1/3 and 1/6.
    write_bigram_model(made / "sharper.onnx", np.tile(np.log([1.0, 2, 1, 1, 1]), (TOKENS, 1)))
    write_tokenizer(made / "tokenizer")
    (made / "text.txt").write_text("a a\na a\n" * 20, encoding="utf-8")
    write_classifier(made / "straight.onnx")
    write_classifier(made / "flipped.onnx", flip=-1)
    labels = np.arange(30) % 3
    np.savez(made / "labelled.npz", x=np.eye(3, dtype=np.float32)[labels], labels=labels)
    write_encoder(made / "one.onnx")
    write_encoder(made / "noisy.onnx", noise=0.2)
    batch = feeds(1, batch=8)[0]
    np.savez(made / "sentences.npz", **batch)
    return made


def text_words(folder: Path) -> tuple[object, ...]:
    return ("--task", "perplexity", "--data", folder / "text.txt", "--tokenizer", folder / "tokenizer", "--context", 4)


def test_perplexity(folder: Path) -> None:
    plain = run_json(folder / "uniform.onnx", *text_words(folder), "--windows", 3)
    assert plain["found"]["model"]["perplexity"] == pytest.approx(TOKENS)
    assert (plain["found"]["model"]["context"], plain["found"]["model"]["windows"]) == (4, 3)
    assert plain["found"]["reference"] is None


def test_perplexity_beside_a_reference(folder: Path) -> None:
    words = (folder / "sharper.onnx", *text_words(folder), "--reference", folder / "uniform.onnx")
    found = run_json(*words)["found"]
    assert found["model"]["perplexity"] == pytest.approx(3, rel=1e-6)
    assert found["change"]["ratio"] == pytest.approx(3 / TOKENS, rel=1e-6)
    assert found["model"]["windows"] == 16
    shown = run(*words).stdout
    assert all(said in shown for said in ("sharper.onnx", "uniform.onnx", "3.000", "5.000", "0.6000", "16 windows"))


def test_accuracy(folder: Path) -> None:
    words = (folder / "flipped.onnx", "--task", "accuracy", "--data", folder / "labelled.npz")
    beside = (*words, "--reference", folder / "straight.onnx")
    found = run_json(*beside)["found"]
    assert (found["model"]["correct"], found["reference"]["correct"], found["change"]["lost"]) == (0, 30, 30)
    assert "100.00 %" in run(*beside).stdout
    assert run_json(*words, "--samples", 7)["found"]["model"]["samples"] == 7
    assert "0 of 30" in run(*words).stdout


def test_similarity(folder: Path) -> None:
    words = ("--task", "similarity", "--data", folder / "sentences.npz", "--reference", folder / "one.onnx")
    assert run_json(folder / "one.onnx", *words)["found"]["model"]["cosine_min"] == pytest.approx(1)
    found = run_json(folder / "noisy.onnx", *words)["found"]["model"]
    assert 0.5 < found["cosine_mean"] < 0.9999
    assert "noisy.onnx" in run(folder / "noisy.onnx", *words).stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("uniform.onnx", "--task", "perplexity", "--data", "text.txt"), "--tokenizer DIR"),
        (("one.onnx", "--task", "similarity", "--data", "sentences.npz"), "--reference MODEL"),
        (("straight.onnx", "--task", "accuracy", "--data", "sentences.npz"), "no array 'labels'"),
        (("one.onnx", "--task", "perplexity", "--data", "text.txt", "--tokenizer", "tokenizer"), "'logits'"),
        (("none.onnx", "--task", "accuracy", "--data", "labelled.npz"), "none.onnx"),
    ],
)
def test_what_is_missing_is_said(
    folder: Path, words: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    result = run(*words, *(("--context", "4") if "perplexity" in words else ()))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert said in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr


def test_a_task_that_is_none_is_a_usage_error(folder: Path) -> None:
    assert run(folder / "one.onnx", "--task", "translation", "--data", folder / "text.txt").exit_code == 2


def test_progress_stays_off_standard_output(folder: Path) -> None:
    result = run(folder / "uniform.onnx", *text_words(folder), "--json")
    json.loads(result.stdout)
    assert "tokenising" in result.stderr
