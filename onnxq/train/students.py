"""The three ways to train: what the optimizer sees, and how it becomes the module's weights and its encodings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from onnxq.formats.binary import BinaryEncoding
from onnxq.train.levels import Levels
from onnxq.train.phases import Phase, TrainSettings
from onnxq.train.projection import encode, same_layout
from onnxq.train.targets import Chosen, choose


class Student:
    """Mode "project": the module's own parameters are trained.

    Args:
        module: what is trained.
        phase: with this mode.
        settings: for the solver.
        known: encodings of former phases, by name.
        floats: parameters [..] that stood behind codes at the end of a former phase, by name.

    Attributes:
        phase: as given.
        chosen: parameters that its rules take.
        known: the last encodings, by name.
    """

    def __init__(
        self,
        module: nn.Module,
        phase: Phase,
        settings: TrainSettings,
        known: Mapping[str, BinaryEncoding],
        floats: Mapping[str, Tensor],
    ) -> None:
        self._module, self.phase, self._settings = module, phase, settings
        self.chosen = choose(module, phase.targets)
        self.known = {
            each.name: known[each.name]
            for each in self.chosen
            if each.name in known and same_layout(known[each.name], each.format, each.order)
        }
        self._begin(floats)

    def _begin(self, floats: Mapping[str, Tensor]) -> None:
        """What else a mode needs before its first step."""

    def leaves(self) -> dict[str, Tensor]:
        """What is trained, by name."""
        return {name: tensor for name, tensor in self._module.named_parameters() if tensor.requires_grad}

    def rates(self) -> dict[str, float]:
        """The highest learning rate of each leaf."""
        return dict.fromkeys(self.leaves(), self.phase.rate)

    def load(self) -> None:
        """Gives the module the weights of the coming step."""

    def collect(self) -> None:
        """Hands the gradients of the module's weights on to the leaves."""

    def project(self, *, settle: bool) -> dict[str, BinaryEncoding]:
        """Gives the module the weights that a file would hold, and returns their encodings.

        Args:
            settle: training goes on from there; else the caller puts the weights back.
        """
        encodings = {each.name: self._encode(each) for each in self.chosen}
        for each in self.chosen:
            each.put(encodings[each.name].dequantize())
        if settle:
            self.known = encodings
        return encodings

    def floats(self) -> dict[str, Tensor]:
        """Copies of what stands behind the codes, for a phase that follows."""
        return {}

    def _encode(self, chosen: Chosen) -> BinaryEncoding:
        known = self.known.get(chosen.name)
        settings = self._settings
        return encode(
            chosen.matrix(), chosen.format, chosen.order, known, solver=settings.solver, rounds=settings.rounds
        )


class ScalesStudent(Student):
    """Mode "scales": scales and the vectors that no rule takes."""

    def _begin(self, floats: Mapping[str, Tensor]) -> None:
        taken = {id(each.parameter) for each in self.chosen}
        self._vectors = {
            name: parameter
            for name, parameter in self._module.named_parameters()
            if parameter.requires_grad and id(parameter) not in taken and self._is_trained(parameter)
        }
        for each in self.chosen:
            each.parameter.requires_grad_(True)
            if each.name not in self.known:
                self.known[each.name] = self._encode(each)
        self._levels = {each.name: Levels(self.known[each.name]) for each in self.chosen}

    def _is_trained(self, parameter: nn.Parameter) -> bool:
        return parameter.dim() < 2

    def leaves(self) -> dict[str, Tensor]:
        """See `Student.leaves`; those of scales are named after their weights."""
        leaves: dict[str, Tensor] = dict(self._vectors)
        for name, levels in self._levels.items():
            leaves.update({f"{name}#{number}": leaf for number, leaf in enumerate(levels.leaves())})
        return leaves

    def rates(self) -> dict[str, float]:
        """See `Student.rates`."""
        return {name: self.phase.scale_rate if "#" in name else self.phase.rate for name in self.leaves()}

    def load(self) -> None:
        """See `Student.load`."""
        self._decoded = {each.name: self._levels[each.name].decode(self._latent(each)) for each in self.chosen}
        for each in self.chosen:
            each.put(self._decoded[each.name].detach())

    def collect(self) -> None:
        """See `Student.collect`."""
        reached = [each for each in self.chosen if each.parameter.grad is not None]
        slopes = [each.oriented(each.parameter.grad) for each in reached if each.parameter.grad is not None]
        torch.autograd.backward([self._decoded[each.name] for each in reached], slopes)

    def _latent(self, chosen: Chosen) -> Tensor | None:
        """The floats whose nearest levels are the weight, [N, K]; None where codes stay."""
        return None

    def _encode(self, chosen: Chosen) -> BinaryEncoding:
        if chosen.name not in self.known:
            return super()._encode(chosen)
        return self._levels[chosen.name].encode(self._latent(chosen))

    def project(self, *, settle: bool) -> dict[str, BinaryEncoding]:
        """See `Student.project`; scales are trained on unrounded, relative to the same start."""
        return super().project(settle=False)


class StraightThroughStudent(ScalesStudent):
    """Mode "straight-through": floats behind the targets, their scales, and all else."""

    def _begin(self, floats: Mapping[str, Tensor]) -> None:
        for each in self.chosen:
            if each.name in floats:
                with torch.no_grad():
                    each.parameter.copy_(floats[each.name])
        super()._begin(floats)
        self._latents = {each.name: each.parameter.detach().clone().requires_grad_() for each in self.chosen}

    def _is_trained(self, parameter: nn.Parameter) -> bool:
        return True

    def leaves(self) -> dict[str, Tensor]:
        """See `Student.leaves`."""
        return {**super().leaves(), **self._latents}

    def collect(self) -> None:
        """See `Student.collect`."""
        super().collect()
        for each in self.chosen:
            self._latents[each.name].grad = each.parameter.grad

    def floats(self) -> dict[str, Tensor]:
        """See `Student.floats`."""
        return {name: latent.detach().clone() for name, latent in self._latents.items()}

    def _latent(self, chosen: Chosen) -> Tensor | None:
        return chosen.oriented(self._latents[chosen.name].detach())


def student_of(
    module: nn.Module,
    phase: Phase,
    settings: TrainSettings,
    known: Mapping[str, BinaryEncoding],
    floats: Mapping[str, Tensor],
) -> Student:
    """The student of a phase's mode."""
    kinds = {"project": Student, "scales": ScalesStudent, "straight-through": StraightThroughStudent}
    return kinds[phase.mode](module, phase, settings, known, floats)


def groups_of(student: Student, settings: TrainSettings) -> list[dict[str, object]]:
    """Parameter groups for an optimizer, one a leaf; the highest rates are kept under "highest"."""
    rates = student.rates()
    return [
        {
            "params": [leaf],
            "lr": rates[name],
            "highest": rates[name],
            "weight_decay": 0.0 if "#" in name else settings.weight_decay,
        }
        for name, leaf in student.leaves().items()
    ]


def clip(leaves: Sequence[Tensor], most: float) -> None:
    """Scales gradients down to a norm."""
    torch.nn.utils.clip_grad_norm_(leaves, most)
