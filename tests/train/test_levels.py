"""Weights as functions of their scales: the same values as the encoding, gradients by hand, nearest levels."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from onnxq.formats.binary import BinaryEncoding, BinaryFormat
from onnxq.solvers.binary import binary_codes
from onnxq.train.levels import Levels
from tests.graph import models


def _by_row(*, offset: bool = False) -> BinaryEncoding:
    format, order = BinaryFormat.by_row(np.arange(20) % 3 + 1, 32, offset=offset)
    return binary_codes(models.weight(20, 80), format, rows=order)


@pytest.mark.parametrize("offset", [False, True])
def test_untouched_levels_are_the_encoding(offset: bool) -> None:
    encoding = _by_row(offset=offset)
    levels = Levels(encoding)
    torch.testing.assert_close(levels.decode().detach(), torch.from_numpy(encoding.dequantize()), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(levels.encode().dequantize(), encoding.dequantize())


def test_gradients_by_hand() -> None:
    """w = 2 s1 + 1 s2 with signs ++, +-: the slope of log s1 is 2 * (1 + 1), that of log s2 1 * (1 - 1)."""
    encoding = BinaryEncoding(
        BinaryFormat.of(1, 2), np.array([[3, 1]], np.uint8), np.array([[[2.0]], [[1.0]]], np.float16)
    )
    levels = Levels(encoding)
    found = levels.decode()
    torch.testing.assert_close(found.detach(), torch.tensor([[3.0, 1.0]]))
    torch.autograd.backward(found.sum())
    torch.testing.assert_close(levels.factors.grad, torch.tensor([[[4.0]], [[0.0]]]))


def test_the_nearest_level_is_taken() -> None:
    encoding = BinaryEncoding(
        BinaryFormat.of(1, 2), np.zeros((1, 5), np.uint8), np.array([[[2.0]], [[1.0]]], np.float16)
    )
    latent = torch.tensor([[-9.0, -1.9, -0.1, 1.1, 2.2]])
    levels = Levels(encoding)
    expected = torch.tensor([[-3.0, -1.0, -1.0, 1.0, 3.0]])
    torch.testing.assert_close(levels.decode(latent).detach(), expected)
    np.testing.assert_array_equal(levels.encode(latent).dequantize(), expected.numpy())


@pytest.mark.parametrize("offset", [False, True])
def test_moved_levels_are_stored_in_float16(offset: bool) -> None:
    encoding = _by_row(offset=offset)
    levels = Levels(encoding)
    with torch.no_grad():
        for leaf in levels.leaves():
            leaf.add_(0.1 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1)))
    latent = torch.from_numpy(models.weight(20, 80, seed=4))
    for target in (None, latent):
        found = levels.encode(target)
        assert (found.scales != encoding.scales).any()
        np.testing.assert_array_equal(found.scales == 0, encoding.scales == 0)
        torch.testing.assert_close(
            torch.from_numpy(found.dequantize()), levels.decode(target).detach(), rtol=2e-3, atol=2e-3
        )
    np.testing.assert_array_equal(levels.encode().codes, encoding.codes)
