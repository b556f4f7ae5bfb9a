from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("optimum.exporters.onnx")
pytest.importorskip("optimum.onnxruntime")
import torch
from transformers import AutoModelForSeq2SeqLM

from onnxq.export.huggingface import quiet
from onnxq.graph import find_weights, load
from tools import seq2seq


@pytest.fixture(scope="module", params=[("marian", False), ("t5", True)], ids=["marian-separate", "t5-merged"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, bool]:
    """The torch folder, the exported one, and whether its decoder is merged."""
    kind, merged = request.param
    source, out = tmp_path_factory.mktemp(kind) / "source", tmp_path_factory.mktemp(kind) / "out"
    seq2seq.BUILDERS[kind](seq2seq.TINY, source)
    seq2seq.export_seq2seq(source, out, merged)
    return source, out, merged


def test_the_graphs_are_there(made: tuple[Path, Path, bool]) -> None:
    _, out, merged = made
    assert {p.name for p in out.glob("*.onnx")} == set(seq2seq.MERGED if merged else seq2seq.SEPARATE)
    assert (out / "config.json").is_file()


def test_optimum_generates_as_torch_does(made: tuple[Path, Path, bool]) -> None:
    from optimum.onnxruntime import ORTModelForSeq2SeqLM

    source, out, _ = made
    ids = torch.tensor([[5, 9, 17, 33, 2], [8, 4, 101, 7, 2]])
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    with quiet(), torch.inference_mode():
        expected = AutoModelForSeq2SeqLM.from_pretrained(source).eval().generate(**options, num_beams=1)
        got = ORTModelForSeq2SeqLM.from_pretrained(out, use_cache=True).generate(**options, num_beams=1)
    assert torch.equal(got, expected)
    assert len(set(got.flatten().tolist())) > 3  # else any model would do


def test_products_have_meaningful_names_and_the_embedding_is_one(made: tuple[Path, Path, bool]) -> None:
    _, out, merged = made
    first = "decoder_model_merged.onnx" if merged else "decoder_model.onnx"
    weights = find_weights(load(out / first).model).weights
    (tied,) = [w for w in weights if {"table", "linear"} <= {site.kind for site in w.sites}]
    assert tied.shape == (seq2seq.TINY.vocabulary, seq2seq.TINY.hidden)
    assert not [w.name for w in weights if w.name.startswith("onnx::")]


def test_the_command_line_says_what_is_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("here")
    sizes = ["--layers", "1", "--hidden", "32", "--heads", "2", "--ffn", "32", "--vocabulary", "50"]
    assert seq2seq.main(["t5", str(tmp_path), *sizes]) == 1
    assert "exists: remove it" in capsys.readouterr().err
