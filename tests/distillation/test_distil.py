"""Training brings outputs back, gives what is stored, keeps only what helps, and says what can't be done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from onnxq.backprop import TorchGraph
from onnxq.calibration import model_inputs, open_data
from onnxq.distillation import (
    DecodedWeight,
    Distillation,
    DistillationSettings,
    Part,
    distil,
    uniform_weight,
    with_scales,
)
from onnxq.distillation.objective import Objective
from onnxq.distillation.weights import operand
from onnxq.errors import CalibrationError, ModelError
from onnxq.graph import LoadedModel
from onnxq.progress import NullProgress
from tests.distillation.models import batches, linear_weights, network, opened, two_bits
from tests.graph import models

QUICK = DistillationSettings(steps=60, scale_rate=0.02, vector_rate=0.02, held_out=0.25, threads=1)
SAME_RUN = 1e-6  # the same float32 operations in the same order


def _distil(loaded: LoadedModel, settings: DistillationSettings = QUICK, **options: bool) -> Distillation:
    weights = [uniform_weight(found, [two_bits(found)]) for found in linear_weights(loaded)]
    return distil(loaded, weights, batches(loaded, **options), settings)


@pytest.mark.parametrize("written_out", [False, True])
def test_the_outputs_come_back(written_out: bool, tmp_path: Path) -> None:
    loaded = opened(network(written_out=written_out), tmp_path)
    result = _distil(loaded)
    assert result.kept
    assert result.after < 0.8 * result.before
    assert np.mean(result.training[-5:]) < np.mean(result.training[:5])
    assert result.samples == (6, 2)
    assert set(result.scales) == {found.name for found in linear_weights(loaded)}
    assert set(result.initializers) == {"norm.gain", "norm.bias", "up.bias", "down.bias"}
    assert result.trained == (96 * 2 + 64 * 3, 2 * 64 + 96 + 64)


def test_the_result_is_what_is_stored(tmp_path: Path) -> None:
    """Its numbers, put into encodings and initializers, give the loss that it reports."""
    loaded = opened(network(), tmp_path)
    data = batches(loaded)
    result = _distil(loaded)
    graph = TorchGraph(loaded)
    operands = {}
    for found in linear_weights(loaded):
        (scales,) = result.scales[found.name]
        encoding = with_scales(two_bits(found), scales)
        assert np.array_equal(encoding.effective_scales(), scales)
        matrix = torch.from_numpy(encoding.dequantize())
        operands.update({(site.node, site.weight_input): operand(site, matrix) for site in found.sites})
    values = {name: torch.from_numpy(array) for name, array in result.initializers.items()}
    objective = Objective(graph, None)
    losses = [
        float(objective.loss(graph.run(feed, values=values, operands=operands), graph.run(feed), feed)) for feed in data
    ]
    # The held-out batches are two of the eight.
    pairs = [(a + b) / 2 for i, a in enumerate(losses) for b in losses[i + 1 :]]
    assert min(abs(pair - result.after) for pair in pairs) < SAME_RUN


def test_a_result_that_does_not_help_is_dropped(tmp_path: Path) -> None:
    loaded = opened(network(), tmp_path)
    wild = replace(QUICK, steps=3, scale_rate=3.0, vector_rate=3.0, warm_up=0.0)
    result = _distil(loaded, wild)
    assert not result.kept
    assert result.after > result.before
    assert result.initializers == {}
    for found in linear_weights(loaded):
        assert np.array_equal(result.scales[found.name][0], two_bits(found).effective_scales())
    assert "did not fall" in result.notes[-1]


def test_equal_seeds_give_equal_results(tmp_path: Path) -> None:
    loaded = opened(network(), tmp_path)
    short = replace(QUICK, steps=8)
    first, second, other = _distil(loaded, short), _distil(loaded, short), _distil(loaded, replace(short, seed=1))
    assert first.training == second.training
    assert first.training != other.training


def test_one_factor_per_row(tmp_path: Path) -> None:
    loaded = opened(network(), tmp_path)
    only_scales = replace(QUICK, steps=10, per="row", biases=False, norms=False)
    result = _distil(loaded, only_scales)
    assert result.trained == (96 + 64, 0)
    assert result.initializers == {}
    (found, *_) = linear_weights(loaded)
    factors = result.scales[found.name][0] / two_bits(found).effective_scales()
    np.testing.assert_allclose(factors, np.broadcast_to(factors[:, :1], factors.shape), rtol=2e-3)  # float16


def test_logits_are_matched_as_distributions_through_a_tied_head(tmp_path: Path) -> None:
    loaded = opened(network(logits=True), tmp_path)
    objective = Objective(TorchGraph(loaded), None)
    assert objective.outputs == ("logits",)
    wanted = torch.tensor([[[0.0, 1.0, 2.0]]])
    feed = {"attention_mask": np.ones((1, 1), np.int64)}
    # A shift of all logits is no change of the distribution.
    assert float(objective.loss({"logits": wanted + 3}, {"logits": wanted}, feed)) == pytest.approx(0, abs=1e-6)
    p, q = wanted.softmax(-1), torch.full((3,), 1 / 3)
    expected = float((p * (p / q).log()).sum())
    flat = torch.zeros_like(wanted)
    assert float(objective.loss({"logits": flat}, {"logits": wanted}, feed)) == pytest.approx(expected, rel=1e-5)
    result = _distil(loaded)
    assert result.kept
    assert result.after < 0.8 * result.before


def test_padding_does_not_count(tmp_path: Path) -> None:
    objective = Objective(TorchGraph(opened(network(), tmp_path)), None)
    wanted = torch.ones(2, 3, 4)
    found = wanted.clone()
    found[1, 2] = 100.0
    mask = np.array([[1, 1, 1], [1, 1, 0]])
    assert float(objective.loss({"y": found}, {"y": wanted}, {"attention_mask": mask})) == 0.0
    assert float(objective.loss({"y": found}, {"y": wanted}, {"attention_mask": np.ones_like(mask)})) > 100.0


def test_outputs_that_outgrow_the_cache_are_computed_again(tmp_path: Path) -> None:
    loaded = opened(network(), tmp_path)
    short = replace(QUICK, steps=8)
    assert _distil(loaded, replace(short, cache_bytes=0)).training == _distil(loaded, short).training


def test_any_decoder_will_do(tmp_path: Path) -> None:
    """A frame: the stored matrix is rotated, and the scales sit inside the rotation."""
    loaded = opened(network(), tmp_path)
    rotation = torch.linalg.qr(torch.from_numpy(models.weight(96, 96)))[0]
    down = next(found for found in linear_weights(loaded) if found.name.startswith("down"))
    inner = uniform_weight(down, [two_bits(down)]).parts[0]
    framed = Part(inner.scales, lambda scales: inner.decode(scales) @ rotation, inner.round)
    result = distil(loaded, [DecodedWeight(down, (framed,))], batches(loaded), QUICK)
    assert result.kept
    assert result.after < result.before
    assert not np.array_equal(result.scales[down.name][0], inner.scales)


def test_a_weight_can_stand_in_without_being_trained(tmp_path: Path) -> None:
    loaded = opened(network(), tmp_path)
    up, down = linear_weights(loaded)
    items = [uniform_weight(up, [two_bits(up)], trained=False), uniform_weight(down, [two_bits(down)])]
    result = distil(loaded, items, batches(loaded), replace(QUICK, steps=5))
    assert list(result.scales) == [down.name]
    alone = distil(loaded, items[1:], batches(loaded), replace(QUICK, steps=5))
    assert result.before > alone.before  # the untrained weight's error counts


def test_progress_is_told(tmp_path: Path) -> None:
    class Record(NullProgress):
        steps = 0

        def advance(self, count: int = 1, detail: str = "") -> None:
            assert detail.startswith("loss ")
            self.steps += count

    loaded, record = opened(network(), tmp_path), Record()
    weights = [uniform_weight(found, [two_bits(found)]) for found in linear_weights(loaded)]
    distil(loaded, weights, batches(loaded), replace(QUICK, steps=4), progress=record)
    assert record.steps == 4


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    loaded = opened(network(), tmp_path)
    weights = [uniform_weight(found, [two_bits(found)]) for found in linear_weights(loaded)]
    with pytest.raises(CalibrationError, match="has 1 batch: distillation needs at least two"):
        distil(loaded, weights, batches(loaded, 1), QUICK)
    with pytest.raises(ModelError, match="There is nothing to distil"):
        distil(loaded, [], batches(loaded), replace(QUICK, norms=False))
    with pytest.raises(ModelError, match=r"no output \['z'\]; it has y"):
        distil(loaded, weights, batches(loaded), replace(QUICK, outputs=("z",)))
    with pytest.raises(ValueError, match="steps must be at least 1"):
        DistillationSettings(steps=0)


def test_operators_without_a_gradient_are_named(tmp_path: Path) -> None:
    proto = models.model(
        [models.node("MatMul", "x w", "h", "fc"), models.node("Det", "h", "y", "the_det")],
        [models.floats("x", [2, 64, 64])],
        [models.floats("y", [2])],
        {"w": models.weight(64, 64)},
    )
    loaded = opened(proto, tmp_path)
    (found,) = linear_weights(loaded)
    feeds = [{"x": models.weight(2, 64, 64, seed=i)} for i in range(2)]
    data = open_data(feeds, model_inputs(loaded.model))
    with pytest.raises(ModelError, match=r"no gradient is known for Det \('the_det'\)"):
        distil(loaded, [uniform_weight(found, [two_bits(found)])], data, QUICK)
