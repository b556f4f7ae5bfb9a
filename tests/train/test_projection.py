"""Rules take the parameters that they say; what they become is what the file holds, and stays so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
import torch
from torch import nn

from onnxq.errors import TrainingError
from onnxq.formats.binary import BinaryFormat
from onnxq.graph.shared import content_of
from onnxq.pipeline.bank import EncodingBank
from onnxq.solvers.binary import BinaryFit, binary_codes
from onnxq.train import Target, project, save_encodings
from onnxq.train.projection import encode
from onnxq.train.recover import recover_planes
from tests.graph import models

BY_HAND = np.array(
    [
        [1, -1, 3, -3, 1, -1, 3, -3],  # mean magnitude 2; 2 and 1 are its two planes
        [5, 5, 5, -5, 5, -5, -5, 5],  # one plane
        [0, 0, 0, 0, 0, 0, 0, 0],
        [6, -2, 2, -6, 6, -2, 2, -6],  # 4 and 2
    ],
    np.float32,
)


class Pair(nn.Module):
    """An embedding that is the output layer too, and a layer between."""

    def __init__(self, words: int = 12, width: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embed = nn.Embedding(words, width)
        self.inner = nn.Linear(width, width)
        self.head = nn.Linear(width, words)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.inner(self.embed(ids)).relu())
        return logits


def _linear(matrix: np.ndarray) -> nn.Linear:
    layer = nn.Linear(matrix.shape[1], matrix.shape[0])
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(matrix))
    return layer


def _copy(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in module.named_parameters()}


def test_one_plane_is_the_mean_magnitude() -> None:
    layer = _linear(BY_HAND)
    encodings = project(layer, [Target("weight", 1)])
    expected = np.array(
        [
            [2, -2, 2, -2, 2, -2, 2, -2],
            [5, 5, 5, -5, 5, -5, -5, 5],
            [0] * 8,
            [4, -4, 4, -4, 4, -4, 4, -4],
        ]
    )
    np.testing.assert_array_equal(layer.weight.detach().numpy(), expected)
    np.testing.assert_array_equal(encodings["weight"].dequantize(), expected)


def test_two_planes_hold_it_all() -> None:
    layer = _linear(BY_HAND)
    encoding = project(layer, [Target("weight", 2)])["weight"]
    np.testing.assert_array_equal(layer.weight.detach().numpy(), BY_HAND)
    scales = encoding.scales[:, :, 0].astype(np.float32) * encoding.gain
    np.testing.assert_array_equal(scales[:, 0], [2, 1])
    np.testing.assert_array_equal(scales[:, 3], [4, 2])


def test_planes_by_row_and_transposed() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.from_numpy(BY_HAND.T.copy()))
    encodings = project(module, [Target("weight", np.array([1, 1, 1, 2]), transposed=True)])
    found = module.weight.detach().numpy().T
    np.testing.assert_array_equal(found[0], [2, -2, 2, -2, 2, -2, 2, -2])
    np.testing.assert_array_equal(found[3], BY_HAND[3])
    assert encodings["weight"].format.planes == (4, 1)
    np.testing.assert_array_equal(encodings["weight"].dequantize(), found)


def test_scales_are_those_of_the_file() -> None:
    layer = _linear(np.full((1, 4), 0.1, np.float32))  # no float16 has this value
    project(layer, [Target("weight", 1)])
    found = layer.weight.detach().numpy()
    assert found[0, 0] != np.float32(0.1)
    np.testing.assert_allclose(found, 0.1, rtol=2**-11)


@pytest.mark.parametrize("solver", list(BinaryFit))
@pytest.mark.parametrize("offset", [False, True])
def test_a_second_projection_changes_nothing(solver: BinaryFit, offset: bool) -> None:
    planes = np.arange(64) % 4 + 1
    layer = _linear(models.weight(64, 96, seed=5))
    targets = [Target("weight", planes, group_size=32, offset=offset)]
    known = project(layer, targets, solver=solver)
    once = layer.weight.detach().numpy().copy()
    again = project(layer, targets, solver=solver, known=known)
    np.testing.assert_array_equal(layer.weight.detach().numpy(), once)
    assert again["weight"] is known["weight"]


@given(st.integers(0, 10_000), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_planes_are_read_off_values(seed: int, planes: int) -> None:
    """Without the old encoding too, where all levels occur: 512 weights a row."""
    rng = np.random.default_rng(seed)
    format = BinaryFormat.of(3, planes)
    matrix = binary_codes(rng.uniform(-1, 1, (3, 512)).astype(np.float32), format).dequantize()
    found = recover_planes(matrix, format)
    assert found is not None
    np.testing.assert_array_equal(found.dequantize(), matrix)
    np.testing.assert_array_equal(encode(matrix, format).dequantize(), matrix)


def test_rows_that_moved_are_solved_again_and_others_kept() -> None:
    layer = _linear(models.weight(16, 64, seed=1))
    targets = [Target("weight", 3)]
    known = project(layer, targets)
    once = layer.weight.detach().numpy().copy()
    with torch.no_grad():
        layer.weight[5] += torch.from_numpy(models.weight(64, seed=2))
    project(layer, targets, known=known)
    found = layer.weight.detach().numpy()
    kept = np.arange(16) != 5
    np.testing.assert_array_equal(found[kept], once[kept])
    assert (found[5] != once[5]).any()


def test_a_float_weight_has_no_planes() -> None:
    assert recover_planes(models.weight(4, 64), BinaryFormat.of(4, 3)) is None


def test_a_tied_parameter_is_projected_once() -> None:
    pair = Pair()
    for pattern in ("embed.weight", "head.*"):
        encodings = project(pair, [Target(pattern, 2)])
        assert list(encodings) == ["embed.weight"]
        assert pair.head.weight is pair.embed.weight
        np.testing.assert_array_equal(encodings["embed.weight"].dequantize(), pair.head.weight.detach().numpy())


def test_the_first_rule_holds_and_vectors_stay() -> None:
    pair = Pair()
    before = _copy(pair)
    encodings = project(pair, [Target("inner.*", None), Target("*", 1)])
    assert list(encodings) == ["embed.weight"]
    after = _copy(pair)
    assert (after["embed.weight"] != before["embed.weight"]).any()
    for name in ("inner.weight", "inner.bias", "head.bias"):
        np.testing.assert_array_equal(after[name], before[name])


def test_rules_that_do_not_suit() -> None:
    with pytest.raises(TrainingError, match=r"No two-dimensional parameter has a name like 'decoder\.\*'"):
        project(Pair(), [Target("*", 1), Target("decoder.*", 2)])
    with pytest.raises(TrainingError, match=r"planes are \[7\], and there are 12 rows"):
        project(Pair(), [Target("embed.weight", np.ones(7, int))])
    with pytest.raises(TrainingError, match="1 to 6 planes"):
        project(Pair(), [Target("*", 7)])
    with pytest.raises(TrainingError, match=r"Call module\.float\(\) first"):
        project(Pair().half(), [Target("*", 2)])


def test_encodings_are_filed_under_their_values(tmp_path: Path) -> None:
    pair = Pair()
    encodings = project(pair, [Target("*", 2)])
    save_encodings(encodings, tmp_path / "bank")
    bank = EncodingBank.existing(tmp_path / "bank")
    found = bank.find(content_of(pair.inner.weight.detach().numpy()))
    assert found is not None
    np.testing.assert_array_equal(found.dequantize(), pair.inner.weight.detach().numpy())
    assert len(bank) == 2
