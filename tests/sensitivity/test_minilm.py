"""A real model: the ONNX file's gradients against torch's own on the module that it was exported from."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("optimum.exporters.onnx")
import torch

from onnxq.calibration import model_inputs, open_data
from onnxq.export import export
from onnxq.graph import find_weights, load
from onnxq.sensitivity import SensitivitySettings, measure, runs_of_rows
from tools.models import fetch
from tools.packages import FetchError

RELATIVE = 1e-3
"""Of a weight's root mean square sensitivity."""
WEIGHTS = (
    "embeddings.word_embeddings.weight",
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.3.intermediate.dense.weight",
    "encoder.layer.5.output.dense.weight",
)


@pytest.mark.models
def test_as_autograd_on_the_original_module(tmp_path: Path) -> None:
    import transformers

    try:
        source = fetch("minilm")
    except FetchError as error:
        pytest.skip(str(error).splitlines()[-1].strip())
    (exported,) = export(source, tmp_path / "out", task="feature-extraction").graphs
    loaded = load(exported.path)
    ids = np.random.default_rng(0).integers(1000, 20000, (1, 12))
    mask = (np.arange(12) < 9).astype(np.int64)[None]
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    data = open_data([feed], model_inputs(loaded.model))
    weights = [weight for weight in find_weights(loaded.model).weights if weight.name in WEIGHTS]
    assert len(weights) == len(WEIGHTS)
    settings = SensitivitySettings("output", "pca", components=1, tokens=2, passes=2)
    found = measure(loaded, weights, data, settings, row_groups=partial(runs_of_rows, size=1))
    module = transformers.AutoModel.from_pretrained(source, attn_implementation="eager").eval()
    hidden = module(**{name: torch.from_numpy(array) for name, array in feed.items()}).last_hidden_state[0, :9]
    rows = hidden.detach().double()
    axis = torch.linalg.eigh((rows - rows.mean(0)).T @ (rows - rows.mean(0)))[1][:, -1].float()
    energy = float(rows.square().sum(1).mean())
    parameters = dict(module.named_parameters())
    for weight in weights:
        parameter = parameters[weight.name]
        squares = [torch.autograd.grad(hidden[t] @ axis, parameter, retain_graph=True)[0].square() for t in (0, 8)]
        expected = (squares[0] + squares[1]).numpy() / (2 * energy)
        got = found.weights[weight.name].groups
        assert got.shape == expected.shape
        assert np.linalg.norm(got - expected) < RELATIVE * np.linalg.norm(expected), weight.name
