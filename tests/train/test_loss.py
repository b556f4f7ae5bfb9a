"""The loss by hand, masked, and its gradient."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch")
import torch

from onnxq.train import distillation_loss

EVEN = torch.zeros(1, 2)
SURE = torch.tensor([[math.log(3.0), 0.0]])  # 3/4 and 1/4
FIRST = torch.tensor([0])


def test_by_hand() -> None:
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert distillation_loss(EVEN, SURE, FIRST, share=1).item() == pytest.approx(divergence)
    assert distillation_loss(EVEN, SURE, FIRST, share=0).item() == pytest.approx(math.log(2))
    mixed = distillation_loss(EVEN, SURE, FIRST, share=0.5).item()
    assert mixed == pytest.approx((divergence + math.log(2)) / 2)


def test_temperature_by_hand() -> None:
    high = math.sqrt(3) / (1 + math.sqrt(3))
    expected = 4 * (high * math.log(2 * high) + (1 - high) * math.log(2 * (1 - high)))
    assert distillation_loss(EVEN, SURE, FIRST, share=1, temperature=2).item() == pytest.approx(expected, rel=1e-5)


def test_padding_does_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    labels, mask = torch.randint(0, 5, (2, 3), generator=generator), torch.tensor([[1, 1, 0], [1, 0, 0]])
    whole = distillation_loss(ours, theirs, labels, mask=mask)
    picked = mask.bool()
    assert whole.item() == pytest.approx(distillation_loss(ours[picked], theirs[picked], labels[picked]).item())
    changed = ours.clone()
    changed[~picked] = 1e4
    assert distillation_loss(changed, theirs, labels, mask=mask).item() == pytest.approx(whole.item())


def test_nothing_that_counts_is_nothing() -> None:
    found = distillation_loss(EVEN.clone().requires_grad_(), SURE, FIRST, mask=torch.zeros(1))
    assert found.item() == 0


def test_the_teacher_gets_no_gradient() -> None:
    ours, theirs = EVEN.clone().requires_grad_(), SURE.clone().requires_grad_()
    torch.autograd.backward(distillation_loss(ours, theirs, FIRST, share=1))
    assert theirs.grad is None
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, torch.tensor([[0.5 - 0.75, 0.5 - 0.25]]))
