"""The exported model takes exactly the codes that were trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

import onnxq
from onnxq.export import ModuleSource, export
from onnxq.formats.binary import BinaryEncoding
from onnxq.recipe import Recipe
from onnxq.train import Phase, Target, retrain, save_encodings
from tests.train.test_projection import Pair

RULES = [Target("embed.weight", np.arange(12) % 3 + 1), Target("inner.weight", 2)]
SMALL = Recipe("small", min_elements=64)


def _retrained() -> tuple[Pair, Mapping[str, BinaryEncoding]]:
    pair = Pair()

    def loss(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(module(ids), (ids + 1) % 12)

    def batch(step: int) -> torch.Tensor:
        return torch.randint(0, 12, (8,), generator=torch.Generator().manual_seed(step))

    phase = Phase(RULES, 20, "straight-through", rate=1e-3)
    return pair, retrain(pair, [phase], batch, loss).encodings


def test_quantize_takes_the_trained_codes(tmp_path: Path) -> None:
    pair, encodings = _retrained()
    save_encodings(encodings, tmp_path / "bank")
    ids = torch.arange(12)
    export(ModuleSource(pair.eval(), {"ids": ids}, output_names=("logits",)), tmp_path / "float")
    report = onnxq.quantize(
        tmp_path / "float" / "model.onnx", tmp_path / "out.onnx", recipe=SMALL, encodings=tmp_path / "bank"
    )
    assert [(weight.solver, weight.relative_error) for weight in report.weights] == [("training", 0.0)] * 2
    assert sorted(weight.format for weight in report.weights) == ["binary 2-bit", "binary 2-bit by row"]
    with torch.no_grad():
        expected = pair(ids).numpy()
    session = onnxq.session(tmp_path / "out.onnx", library=False)
    (found,) = session.run(None, {"ids": ids.numpy()})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
