"""Sensitivities against derivatives that are worked out in other ways."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

pytest.importorskip("torch")
import torch

from onnxq.calibration import CalibrationData, model_inputs, open_data
from onnxq.errors import CalibrationError, ModelError
from onnxq.graph import LoadedModel, Weight, find_weights, load
from onnxq.sensitivity import Sensitivities, SensitivitySettings, equal_parts, measure, runs_of_rows
from onnxq.sensitivity import gradients as rounds
from tests.graph import models
from tests.graph.models import floats, integers, node, weight

EACH = SensitivitySettings("output", tokens=None, passes=99, tokens_at_once=1)
"""Every row of every sample alone: the estimate is exact where the outputs have one coordinate."""
FINITE = 2e-3
"""Relative difference to central differences in float32."""


def opened(proto: onnx.ModelProto, tmp_path: Path, **arrays: np.ndarray) -> tuple[LoadedModel, CalibrationData]:
    loaded = load(models.save(proto, tmp_path / "model.onnx"))
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    return loaded, open_data(path, model_inputs(loaded.model), batch_size=2)


def measured(loaded: LoadedModel, data: CalibrationData, settings: SensitivitySettings = EACH) -> Sensitivities:
    return measure(loaded, find_weights(loaded.model).weights, data, settings, row_groups=partial(runs_of_rows, size=1))


def differences(proto: onnx.ModelProto, feeds: list[dict[str, np.ndarray]], initializer: str) -> np.ndarray:
    """Mean over output rows (of one coordinate) of the squared derivative, over the mean square of the output."""
    step = 1e-2
    position = next(i for i, item in enumerate(proto.graph.initializer) if item.name == initializer)
    array = onnx.numpy_helper.to_array(proto.graph.initializer[position])

    def outputs(changed: np.ndarray) -> np.ndarray:
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        copy.graph.initializer[position].CopyFrom(onnx.numpy_helper.from_array(changed, initializer))
        return np.concatenate([models.run(copy, feed)[0].reshape(-1) for feed in feeds]).astype(np.float64)

    found = np.zeros(array.shape)
    for index in np.ndindex(*array.shape):
        up, down = array.copy(), array.copy()
        up[index] += step
        down[index] -= step
        found[index] = np.mean(np.square((outputs(up) - outputs(down)) / (2 * step)))
    return found / np.mean(np.square(outputs(array)))


def narrow(left: bool = False) -> onnx.ModelProto:
    """ids [b, s] -> table [6, 4] -> MatMul, Tanh -> Gemm with transB, or a constant on the left -> y [b, s, 1]."""
    nodes = [
        node("Gather", "table ids", "e", "embed"),
        node("MatMul", "e up", "u", "up"),
        node("Tanh", "u", "h", "act"),
    ]
    if left:
        nodes += [
            node("Transpose", "h", "ht", perm=[0, 2, 1]),
            node("MatMul", "down ht", "dt", "down"),
            node("Transpose", "dt", "y", perm=[0, 2, 1]),
        ]
    else:
        nodes += [
            node("Reshape", "h flat", "hf", "flatten"),
            node("Gemm", "hf down", "d", "down", transB=1, alpha=0.5),
            node("Reshape", "d back", "y", "back"),
        ]
    initializers = {
        "table": weight(6, 4, seed=1),
        "up": weight(4, 5, seed=2) / 2,
        "down": weight(1, 5, seed=3),
        "flat": np.array([-1, 5]),
        "back": np.array([-1, 3, 1]),
    }
    return models.model(nodes, [integers("ids", ["b", "s"])], [floats("y", ["b", "s", 1])], initializers)


@pytest.mark.parametrize("left", [False, True], ids=["gemm", "left"])
def test_as_finite_differences(left: bool, tmp_path: Path) -> None:
    ids = np.array([[0, 1, 2], [3, 3, 5], [1, 0, 0]])
    loaded, data = opened(narrow(left), tmp_path, ids=ids)
    found = measured(loaded, data)
    assert (found.kind, found.samples, found.rows, found.passes) == ("output", 3, 9, 9)
    feeds = [{"ids": row[None]} for row in ids]
    for name, transposed in (("table", False), ("up", True), ("down", False)):
        expected = differences(narrow(left), feeds, name)
        got = found.weights[name]
        np.testing.assert_allclose(got.groups, expected.T if transposed else expected, rtol=FINITE, atol=1e-6)
        np.testing.assert_allclose(got.rows, got.groups.mean(1), rtol=1e-5)
        assert got.mean == pytest.approx(expected.mean(), rel=FINITE)
        assert got.reached == 9


@pytest.mark.parametrize("stored_twice", [False, True])
def test_tied_weights_add_up_before_they_are_squared(stored_twice: bool, tmp_path: Path) -> None:
    proto = models.tied_embedding(stored_twice, rows=5, width=3)
    ids = np.array([[0, 1], [4, 4]])
    loaded, data = opened(proto, tmp_path, ids=ids)
    (tied,) = find_weights(loaded.model).weights
    # One principal component of a model with one output row at a time: the derivative of u . z by torch itself.
    settings = SensitivitySettings("output", "pca", components=1, tokens=None, passes=2, tokens_at_once=1)
    found = measured(loaded, data, settings).weights[tied.name]
    table = torch.tensor(tied.matrix(), requires_grad=True)
    outputs = (table[torch.tensor(ids)] @ table.T).reshape(4, 5)
    rows = outputs.detach().double()
    axis = torch.linalg.eigh((rows - rows.mean(0)).T @ (rows - rows.mean(0)))[1][:, -1].float()
    squares = [torch.autograd.grad(row @ axis, table, retain_graph=True)[0].square() for row in outputs]
    expected = torch.stack(squares).mean(0) / rows.square().sum(1).mean()
    np.testing.assert_allclose(found.groups, expected.numpy(), rtol=1e-4, atol=1e-7)


def test_random_directions_sum_over_all_coordinates(tmp_path: Path) -> None:
    """Also with tokens and samples that share a pass: the mean over runs is the sum of squares of the Jacobian."""
    proto = models.tied_embedding(False, rows=5, width=3)
    ids = np.array([[0, 1], [4, 2]])
    loaded, data = opened(proto, tmp_path, ids=np.tile(ids, (300, 1)))
    (tied,) = find_weights(loaded.model).weights
    settings = SensitivitySettings("output", tokens=None, passes=1)
    found = measured(loaded, data, settings).weights[tied.name].groups
    table = torch.tensor(tied.matrix())
    jacobian = torch.autograd.functional.jacobian(lambda t: (t[torch.tensor(ids)] @ t.T).reshape(4, 5), table)
    energy = (table[torch.tensor(ids)] @ table.T).square().sum(-1).mean()
    expected = (jacobian.square().sum(1).mean(0) / energy).numpy()
    # 300 runs, each a square with a relative deviation of about 1.4: four deviations of the mean.
    np.testing.assert_allclose(found, expected, rtol=0.33)


def test_fisher_is_the_curvature_of_the_divergence(tmp_path: Path) -> None:
    proto = models.model(
        [node("MatMul", "x head", "logits", "head")],
        [floats("x", ["b", 3])],
        [floats("logits", ["b", 4])],
        {"head": weight(3, 4, seed=1)},
    )
    x = weight(2, 3, seed=2)
    loaded, data = opened(proto, tmp_path, x=np.tile(x, (400, 1)))
    found = measured(loaded, data, SensitivitySettings(passes=1))
    assert found.kind == "fisher"
    logits = x @ weight(3, 4, seed=1)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = (p * (1 - p)).T @ np.square(x) / 2  # the diagonal of diag(p) - p p^T, times x^2
    np.testing.assert_allclose(found.weights["head"].groups, expected, rtol=0.3, atol=0.01)


@pytest.mark.parametrize("cached", [False, True])
def test_branches_that_were_taken(cached: bool, tmp_path: Path) -> None:
    loaded = load(models.save(models.merged_decoder(), tmp_path / "model.onnx"))
    feed = {"ids": np.array([[1, 2], [3, 4]]), "use_cache_branch": np.array([cached])}
    data = open_data([feed], model_inputs(loaded.model))
    found = measured(loaded, data, SensitivitySettings(outputs=("y",), tokens_at_once=2))
    assert found.passes == 4  # two samples, two passes each: the flag goes with both
    assert all(item.reached and item.mean > 0 for item in found.weights.values())


def test_padding_does_not_count(tmp_path: Path) -> None:
    proto = narrow()
    proto.graph.input.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["b", "s"]))
    ids = np.array([[0, 1, 2], [3, 3, 5]])
    full = {"ids": ids, "attention_mask": np.array([[1, 1, 0], [1, 0, 0]])}
    found = measured(*opened(proto, tmp_path, **full))
    assert found.rows == 3
    table = found.weights["table"].rows
    assert (table[[0, 1, 3]] > 0).all()
    assert (table[[2, 4, 5]] == 0).all()
    nothing = {"ids": ids, "attention_mask": np.zeros_like(ids)}
    with pytest.raises(CalibrationError, match="no row of the outputs y counts"):
        measured(*opened(proto, tmp_path, **nothing))


def test_what_no_gradient_reaches_is_named(tmp_path: Path) -> None:
    proto = narrow()
    proto.graph.node.append(node("MatMul", "h side", "z", "side"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight(5, 2), "side"))
    proto.graph.output.append(floats("z", ["b", "s", 2]))
    loaded, data = opened(proto, tmp_path, ids=np.array([[0, 1, 2]]))
    found = measured(loaded, data, SensitivitySettings("output", outputs=("y",)))
    assert found.weights["side"].reached == 0
    assert found.notes == ("no gradient reached side",)
    assert measured(loaded, data).outputs == ("y", "z")


def test_groups_are_means_of_their_elements(tmp_path: Path) -> None:
    loaded, data = opened(models.mlp(), tmp_path, x=weight(3, 8, seed=4))
    weights = find_weights(loaded.model).weights
    fine = measured(loaded, data, SensitivitySettings(seed=3))
    coarse = measure(loaded, weights, data, SensitivitySettings(seed=3), row_groups=partial(equal_parts, count=3))
    whole = measure(loaded, weights, data, SensitivitySettings(seed=3))
    for item in weights:
        elements, grouped = fine.weights[item.name].groups, coarse.weights[item.name]
        for group in range(3):
            own = elements[grouped.row_group == group]
            np.testing.assert_allclose(grouped.groups[group], own.mean(0), rtol=1e-5)
        np.testing.assert_allclose(whole.weights[item.name].groups[0], elements.mean(0), rtol=1e-5)
        np.testing.assert_allclose(grouped.columns, elements.mean(0), rtol=1e-5)


def test_an_interrupted_measurement_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, data = opened(narrow(), tmp_path, ids=np.random.default_rng(0).integers(0, 6, (8, 3)))
    weights = find_weights(loaded.model).weights
    settings = SensitivitySettings("output", "pca", tokens_at_once=6)
    straight = measure(loaded, weights, data, settings)
    kept = tmp_path / "sums"
    monkeypatch.setattr(rounds.Checkpoint, "due", property(lambda self: True))
    runs = []

    class Interrupted:
        def start(self, stage: str, total: int | None) -> None:
            runs.append(stage)

        def advance(self, count: int = 1, detail: str = "") -> None:
            if runs[-1] == "measuring sensitivities":
                raise KeyboardInterrupt

        def finish(self) -> None:
            pass

    with pytest.raises(KeyboardInterrupt):
        measure(loaded, weights, data, settings, checkpoint=kept, progress=Interrupted())
    backward = rounds._Measurement._backward
    seen = []
    monkeypatch.setattr(rounds._Measurement, "_backward", lambda *a: (seen.append(1), backward(*a)))
    resumed = measure(loaded, weights, data, settings, checkpoint=kept)
    assert len(seen) == 3  # of four runs of two samples
    for name, expected in straight.weights.items():
        np.testing.assert_allclose(resumed.weights[name].groups, expected.groups, rtol=1e-6)
    assert (resumed.rows, resumed.samples, resumed.passes) == (straight.rows, straight.samples, straight.passes)
    measure(loaded, weights, data, SensitivitySettings("output", seed=1), checkpoint=kept)
    assert len(seen) == 3 + 4  # other settings start anew


def test_samples_are_a_ceiling(tmp_path: Path) -> None:
    loaded, data = opened(narrow(), tmp_path, ids=np.random.default_rng(0).integers(0, 6, (9, 3)))
    for wanted in (1, 3, 4, 9):
        assert 1 <= measured(loaded, data, SensitivitySettings("output", samples=wanted)).samples <= wanted


def test_components_take_turns_across_measurements(tmp_path: Path) -> None:
    """Two samples with the first and the second component are a measurement of one each, if the second goes on."""
    ids = np.random.default_rng(0).integers(0, 5, (1, 4))
    loaded, data = opened(models.tied_embedding(False, rows=5, width=3), tmp_path, ids=np.tile(ids, (2, 1)))
    one = open_data([{"ids": ids}], data.inputs)
    both = SensitivitySettings.paper(components=2)
    (tied,) = find_weights(loaded.model).weights
    expected = measured(loaded, data, both).weights[tied.name].groups
    turns = [measured(loaded, one, replace(both, first=turn)).weights[tied.name].groups for turn in range(3)]
    np.testing.assert_allclose((turns[0] + turns[1]) / 2, expected, rtol=1e-4)
    np.testing.assert_allclose(turns[2], turns[0], rtol=1e-6)
    assert not np.allclose(turns[0], turns[1], rtol=0.1)


def test_refusals(tmp_path: Path) -> None:
    loaded, data = opened(narrow(), tmp_path, ids=np.array([[0, 1, 2]]))
    with pytest.raises(ModelError, match="Log-likelihoods need the output 'logits'; there is y"):
        measured(loaded, data, SensitivitySettings("fisher"))
    with pytest.raises(ModelError, match="no output"):
        measured(loaded, data, SensitivitySettings(outputs=("nothing",)))
    with pytest.raises(ValueError, match="passes is 0"):
        SensitivitySettings(passes=0)


def test_losses_by_hand() -> None:
    """Two rows in group 0, one in group 1: elements x sensitivity x mean squared error."""
    item = Weight("w", (), 1, 3, 2, (3, 2), None, (), 0, (), None)  # type: ignore[arg-type]
    assert runs_of_rows(item, 2).tolist() == [0, 0, 1]
    assert equal_parts(item, 2).tolist() == [0, 0, 1]
    from onnxq.sensitivity import WeightSensitivity

    found = WeightSensitivity(np.float32([[1, 2], [10, 20]]), np.float32([1, 2, 15]), runs_of_rows(item, 2), 1)
    error = np.float32([[1, 0], [0, 2], [3, 1]])
    by_hand = 2 * (1 * 0.5 + 2 * 2) + 1 * (10 * 9 + 20 * 1)
    assert found.loss(np.arange(3), error) == pytest.approx(by_hand)
    # The group of row 2 has no sampled row: it takes the mean of the others.
    assert found.loss(np.array([0]), error[:1]) == pytest.approx(2 * 1 * 1 + 1 * 10 * 1)
