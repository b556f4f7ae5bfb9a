"""A real model, output for output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("optimum.exporters.onnx")
import torch

import onnxq
from onnxq.backprop import TorchGraph, missing_ops
from onnxq.export import export
from onnxq.graph import load
from tools.models import fetch
from tools.packages import FetchError

LARGEST_DIFFERENCE = 1e-4


@pytest.mark.models
def test_minilm_as_onnxruntime_runs_it(tmp_path: Path) -> None:
    try:
        source = fetch("minilm")
    except FetchError as error:
        pytest.skip(str(error).splitlines()[-1].strip())
    (exported,) = export(source, tmp_path / "out", task="feature-extraction").graphs
    loaded = load(exported.path)
    assert missing_ops(loaded.model) == ()
    ids = np.random.default_rng(0).integers(1000, 20000, (3, 12))
    mask = np.ones_like(ids)
    mask[1, 7:] = 0
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    (expected,) = onnxq.session(exported.path).run(["last_hidden_state"], feeds)
    with torch.no_grad():
        found = TorchGraph(loaded).run(feeds)["last_hidden_state"]
    assert np.abs(found.numpy() - expected).max() < LARGEST_DIFFERENCE
