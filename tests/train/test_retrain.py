"""What changes when, what a stopped run goes on from, and that training beats rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from torch import Tensor, nn

from onnxq.errors import TrainingError
from onnxq.train import Phase, Target, TrainSettings, distillation_loss, growing_phases, project, retrain
from onnxq.train.retrain import Retrained

WORDS, WIDTH = 24, 32
QUICK = TrainSettings(checkpoint_every=2)


class Tiny(nn.Module):
    """The next word from two words: an embedding that is the output layer too, and two layers."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.first = nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.drop = nn.Dropout(0.1)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)
        self.head.weight = self.embed.weight
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 2:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
                elif parameter is not self.norm.weight:
                    parameter.zero_()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids).flatten(1)).relu()
        logits: Tensor = self.head(self.norm(self.drop(self.second(x)) + x))
        return logits


def _batch(step: int, size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(0, WORDS, (size, 2), generator=generator)
    return ids, (3 * ids[:, 0] + ids[:, 1]) % WORDS


def _cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def _held_out(module: nn.Module) -> float:
    return _cross_entropy(module, _batch(-1, 512)).item()


def _values(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in module.named_parameters()}


def _changed(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    return {name for name in before if (before[name] != after[name]).any()}


def _check_exact(module: nn.Module, result: Retrained) -> None:
    held = _values(module)
    for name, encoding in result.encodings.items():
        np.testing.assert_array_equal(held[name], encoding.dequantize())


@pytest.fixture(scope="module")
def trained() -> Tiny:
    model = Tiny()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of dropout
        for step in range(1500):
            optimizer.zero_grad()
            torch.autograd.backward(_cross_entropy(model, _batch(step)))
            optimizer.step()
    assert _held_out(model.eval()) < 0.1
    return model


def test_phases_add_blocks() -> None:
    blocks = [[Target("embed.weight", 2)], [Target("first.weight", 1)], [Target("second.weight", 3)]]
    phases = growing_phases(blocks, Phase([], 10, name="paper"))
    assert [[target.pattern for target in phase.targets] for phase in phases] == [
        ["embed.weight"],
        ["embed.weight", "first.weight"],
        ["embed.weight", "first.weight", "second.weight"],
    ]
    assert [phase.name for phase in phases] == ["paper 1", "paper 2", "paper 3"]


class Watch:
    """A loss that notes, step by step, the module's values as the step sees them."""

    def __init__(self) -> None:
        self.seen: list[dict[str, np.ndarray]] = []

    def __call__(self, module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.seen.append(_values(module))
        return _cross_entropy(module, batch)

    def levels(self, name: str) -> list[int]:
        """The most different magnitudes that a row had, in each step."""
        return [max(len(np.unique(np.abs(row))) for row in values[name]) for values in self.seen]


def test_targets_are_projected_every_period() -> None:
    """Two phases of 7 steps, period 3: planes after 3 and 6 steps and at the end; floats between, and before."""
    model, watch = Tiny(), Watch()
    blocks = [[Target("embed.weight", 1)], [Target("first.weight", 1)]]
    phases = growing_phases(blocks, Phase([], 7, period=3, rate=1e-3, warm_up=0.0))
    result = retrain(model, phases, _batch, watch)
    embed, first = watch.levels("embed.weight"), watch.levels("first.weight")
    # Steps that start from a projection; nothing is projected before the first period of the first phase.
    assert [step for step, count in enumerate(embed) if count == 1] == [3, 6, 7, 10, 13]
    assert [step for step, count in enumerate(first) if count == 1] == [10, 13]
    assert list(result.encodings) == ["embed.weight", "first.weight"]
    assert model.head.weight is model.embed.weight
    _check_exact(model, result)
    assert _changed(watch.seen[0], watch.seen[1]) == set(watch.seen[0])  # all parameters are trained
    assert result.loss is None
    assert result.history == ()


def test_validation_sees_planes_and_puts_floats_back() -> None:
    model, watch, seen = Tiny(), Watch(), []

    def validate(module: nn.Module) -> float:
        assert not module.training
        assert not torch.is_grad_enabled()
        seen.append(max(len(np.unique(np.abs(row))) for row in _values(module)["first.weight"]))
        return float(len(seen))  # the first is the best

    start = _values(model)
    phase = Phase([Target("first.weight", 1)], 5, validate_every=2, period=100, rate=1e-2)
    result = retrain(model, [phase], _batch, watch, validate=validate)
    assert seen == [1, 1, 1, 1]
    assert [(each.step, each.loss) for each in result.history] == [(0, 1.0), (2, 2.0), (4, 3.0), (5, 4.0)]
    assert min(watch.levels("first.weight")) > 1
    # The best is that of step 0: the start, projected.
    assert result.loss == 1.0
    assert _changed(start, _values(model)) == {"first.weight"}
    _check_exact(model, result)


def test_scales_mode_moves_scales_and_vectors_only(trained: Tiny) -> None:
    model = copy.deepcopy(trained)
    targets = [Target("embed.weight", np.arange(WORDS) % 3 + 1), Target("first.weight", 2)]
    known = project(model, targets)
    before = _values(model)
    result = retrain(model, [Phase(targets, 20, "scales", rate=1e-3)], _batch, _cross_entropy, known=known)
    for name, encoding in result.encodings.items():
        np.testing.assert_array_equal(encoding.codes, known[name].codes)
        assert (encoding.scales != known[name].scales).any()
        np.testing.assert_array_equal(encoding.scales == 0, known[name].scales == 0)
    assert _changed(before, _values(model)) == set(before) - {"second.weight"}
    _check_exact(model, result)


@pytest.mark.parametrize("mode", ["scales", "straight-through"])
def test_a_rate_of_zero_changes_nothing(trained: Tiny, mode: str) -> None:
    model = copy.deepcopy(trained)
    targets = [Target("*", 2)]
    known = project(model, targets)
    before = _values(model)
    phase = Phase(targets, 3, mode, rate=0.0, scale_rate=0.0)  # type: ignore[arg-type]
    result = retrain(model, [phase], _batch, _cross_entropy, known=known)
    assert _changed(before, _values(model)) == set()
    _check_exact(model, result)


def _schedule(mode: str) -> list[Phase]:
    targets = [Target("embed.weight", np.arange(WORDS) % 2 + 1), Target("first.weight", 1)]
    first = Phase(targets[:1], 5, "project", period=2, rate=1e-3)
    return [first, Phase(targets, 7, mode, period=3, rate=1e-3, validate_every=3)]  # type: ignore[arg-type]


class StopError(Exception):
    pass


@pytest.mark.parametrize("mode", ["project", "scales", "straight-through"])
@pytest.mark.parametrize("stop", [0, 3, 5, 10])
def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path: Path, mode: str, stop: int) -> None:
    def stopping(step: int) -> tuple[Tensor, Tensor]:
        if step == stop:
            raise StopError
        return _batch(step)

    def run(model: nn.Module, batches: Callable[[int], tuple[Tensor, Tensor]], path: Path | None) -> Retrained:
        return retrain(
            model, _schedule(mode), batches, _cross_entropy, validate=_held_out, settings=QUICK, checkpoint=path
        )

    whole, parts, path = Tiny(), Tiny(), tmp_path / "run.npz"
    expected = run(whole, _batch, None)
    with pytest.raises(StopError):
        run(parts, stopping, path)
    torch.rand(7)  # what else draws from torch's generator must not matter
    resumed = Tiny(seed=9)  # nor what the module holds
    if stop == 0:
        resumed = Tiny()  # there is no checkpoint before the first steps
    found = run(resumed, _batch, path)
    assert _changed(_values(whole), _values(resumed)) == set()
    np.testing.assert_equal(
        [(v.phase, v.step, v.loss, v.training) for v in found.history],
        [(v.phase, v.step, v.loss, v.training) for v in expected.history],
    )
    # A third call has nothing left to do.
    again = run(Tiny(seed=9), stopping, path)
    assert again.loss == expected.loss
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.npz"]


def test_a_checkpoint_of_other_phases_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    retrain(Tiny(), [Phase([Target("*", 1)], 2)], _batch, _cross_entropy, checkpoint=path)
    with pytest.raises(TrainingError, match="other phases or settings"):
        retrain(Tiny(), [Phase([Target("*", 2)], 2)], _batch, _cross_entropy, checkpoint=path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(TrainingError, match="can't be read as a checkpoint"):
        retrain(Tiny(), [Phase([Target("*", 2)], 2)], _batch, _cross_entropy, checkpoint=path)


def test_a_loss_that_is_not_finite_stops() -> None:
    with pytest.raises(TrainingError, match="The loss of step 0 of phase 'project' is nan"):
        retrain(Tiny(), [Phase([Target("*", 1)], 2)], _batch, lambda module, batch: module(batch[0]).sum() * np.nan)
    with pytest.raises(TrainingError, match="no phases"):
        retrain(Tiny(), [], _batch, _cross_entropy)


def test_options_out_of_range() -> None:
    with pytest.raises(ValueError, match="project, scales or straight-through"):
        Phase([], 1, "other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="period and validate_every 1 or more"):
        Phase([], 1, period=0)
    with pytest.raises(ValueError, match="warm_up"):
        Phase([], 1, warm_up=1.0)
    with pytest.raises(ValueError, match="clip"):
        TrainSettings(clip=0)


def test_rates_rise_and_fall() -> None:
    phase = Phase([], 100, warm_up=0.1)
    shares = [phase.share_of_rate(step) for step in range(100)]
    assert shares[0] == pytest.approx(1 / 11)
    assert max(shares) == shares[10] == 1
    assert shares[55] == pytest.approx(0.5)
    assert sorted(shares[10:], reverse=True) == shares[10:]


RULES = [Target("embed.weight", 2), Target("first.weight", 1), Target("second.weight", 1)]


def _phases(mode: str) -> Sequence[Phase]:
    if mode == "project":
        blocks = [[rule] for rule in RULES]
        return growing_phases(blocks, Phase([], 400, period=100, rate=2e-3))
    return [Phase(RULES, 400, mode, rate=2e-3, scale_rate=5e-3, validate_every=100)]  # type: ignore[arg-type]


@pytest.mark.parametrize(("mode", "at_most"), [("project", 0.7), ("scales", 0.9), ("straight-through", 0.25)])
def test_training_beats_rounding(trained: Tiny, mode: str, at_most: float) -> None:
    """At 1 and 2 planes, by distillation from the float model; as a share of what rounding alone loses."""
    rounded, model = copy.deepcopy(trained), copy.deepcopy(trained)
    project(rounded, RULES)
    loss_of_rounding = _held_out(rounded.eval())

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            teacher = trained(batch[0])
        return distillation_loss(module(batch[0]), teacher, batch[1])

    result = retrain(model, _phases(mode), _batch, loss, validate=_held_out)
    assert loss_of_rounding > 1
    assert _held_out(model.eval()) == pytest.approx(result.loss)
    assert _held_out(model) < at_most * loss_of_rounding
    _check_exact(model, result)
