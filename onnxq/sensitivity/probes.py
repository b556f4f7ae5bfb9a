"""What is sent backwards from the outputs: which rows, in which directions.

1. Rows of a sample that count (`OutputRows`) are picked on an even grid; the j-th of them belongs to pass j modulo the
   number of passes. The first axis of an output counts the samples, unless it has only one axis.
2. "random": independent signs over all coordinates of a row, so that the mean of the squared projection is the sum
   of squares over all coordinates.
3. "pca": one eigenvector of the outputs' covariance, for sample s the s-th modulo their number C, times sqrt(C) and a
   random sign: the mean of the squared projection is the sum over the C leading components.
4. "fisher": for a row of logits with probabilities p a class y is drawn from p, and onehot(y) - p is the gradient of
   its log-likelihood. Its mean is 0, so rows need no signs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onnxq.calibration.inputs import Feed
from onnxq.calibration.output_rows import OutputRows
from onnxq.errors import ModelError
from onnxq.sensitivity.settings import SensitivitySettings

_WIDEST_COVARIANCE = 8192


@dataclass(frozen=True)
class Picked:
    """Rows of one output.

    Attributes:
        rows: int [R], among all rows of the output.
        samples: int [R], the sample of each in its feed.
        positions: int [R], the number of each among the picked rows of its sample.
    """

    rows: np.ndarray
    samples: np.ndarray
    positions: np.ndarray


def pick(shape: Sequence[int], keep: np.ndarray | None, tokens: int | None) -> Picked:
    """The rows of an output to probe (rule 1)."""
    samples = shape[0] if len(shape) > 1 else 1
    width = shape[-1] if len(shape) else 1
    count = int(np.prod(shape, dtype=np.int64)) // max(width, 1)
    counted = np.ones(count, bool) if keep is None else keep
    rows, owners, positions = [], [], []
    for sample, own in enumerate(np.split(np.arange(count), samples) if samples else []):
        kept = own[counted[own]]
        number = len(kept) if tokens is None else min(tokens, len(kept))
        if number:
            grid = np.linspace(0, len(kept) - 1, number).astype(np.int64)
            rows.append(kept[grid])
            owners.append(np.full(number, sample))
            positions.append(np.arange(number))
    if not rows:
        nothing = np.zeros(0, np.int64)
        return Picked(nothing, nothing, nothing)
    return Picked(np.concatenate(rows), np.concatenate(owners), np.concatenate(positions))


def as_rows(output: Tensor) -> Tensor:
    """An output as rows of its last axis; one without axes is a row of one."""
    return output.reshape(-1, output.shape[-1]) if output.dim() > 1 else output.reshape(1, -1)


class Survey:
    """What "output" has to know of the outputs beforehand, from all rows that count.

    Attributes:
        energy: mean squared norm of a row, by output.
        rows: how many rows will be probed.
        basis: with "pca", the leading eigenvectors of the covariance, [C, E] by falling eigenvalue.
    """

    def __init__(self, rules: OutputRows, settings: SensitivitySettings) -> None:
        self.energy: dict[str, float] = {}
        self.rows: dict[str, int] = {}
        self.basis: dict[str, np.ndarray] = {}
        self._rules, self._settings = rules, settings
        self._counts: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}
        self._moments: dict[str, Tensor] = {}

    def add(self, found: Mapping[str, Tensor], feed: Feed) -> None:
        """Takes in the outputs of one run."""
        for name, output in found.items():
            keep = self._rules.keep(name, output.shape, feed)
            self.rows[name] = self.rows.get(name, 0) + len(pick(output.shape, keep, self._settings.tokens).rows)
            rows = as_rows(output).double()
            if keep is not None:
                rows = rows[torch.from_numpy(np.flatnonzero(keep)).to(rows.device)]
            self._counts[name] = self._counts.get(name, 0) + len(rows)
            self.energy[name] = self.energy.get(name, 0.0) + float(rows.square().sum())
            if self._settings.directions == "pca":
                if rows.shape[1] > _WIDEST_COVARIANCE:
                    raise ModelError(
                        f"The output '{name}' has {rows.shape[1]} coordinates, too many for principal components: "
                        'take random directions, or "fisher" for logits.'
                    )
                self._sums[name] = self._sums.get(name, 0) + rows.sum(0)
                self._moments[name] = self._moments.get(name, 0) + rows.T @ rows

    def finish(self) -> None:
        """Works out means and eigenvectors."""
        for name, count in self._counts.items():
            self.energy[name] /= max(count, 1)
            if name in self._moments:
                mean = self._sums[name] / max(count, 1)
                covariance = self._moments[name] / max(count, 1) - torch.outer(mean, mean)
                vectors = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : self._settings.components]
                self.basis[name] = vectors.T.float().cpu().numpy()
        self._sums, self._moments = {}, {}

    def scale(self, name: str) -> float:
        """What an output's projections are multiplied with, so that each counts by its relative squared error."""
        first = next(iter(self.rows.values()))
        weight = self.energy[name] * self.rows[name] / max(first, 1)
        return weight**-0.5 if weight > 0 else 0.0

    def to_arrays(self) -> dict[str, np.ndarray]:
        """For a checkpoint."""
        arrays = {f"survey.{name}": np.array([self.energy[name], self.rows[name]]) for name in self.energy}
        return arrays | {f"basis.{name}": basis for name, basis in self.basis.items()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes back what `to_arrays` gave."""
        for key, array in arrays.items():
            kind, _, name = key.partition(".")
            if kind == "survey":
                self.energy[name], self.rows[name] = float(array[0]), int(array[1])
            elif kind == "basis":
                self.basis[name] = array


class Probes:
    """Cotangents of the outputs of one run.

    Args:
        kind: "output" or "fisher".
        rules: the outputs.
        survey: of "output".
        settings: the rest.
    """

    def __init__(self, kind: str, rules: OutputRows, survey: Survey | None, settings: SensitivitySettings) -> None:
        self._kind, self._rules, self._survey, self._settings = kind, rules, survey, settings

    def picked(self, found: Mapping[str, Tensor], feed: Feed) -> dict[str, Picked]:
        """The rows of every output."""
        return {
            name: pick(output.shape, self._rules.keep(name, output.shape, feed), self._settings.tokens)
            for name, output in found.items()
        }

    def cotangent(self, name: str, output: Tensor, picked: Picked, run: int, passing: int, first: int) -> Tensor | None:
        """What to send backwards into an output; None where the pass has no row of it.

        Args:
            name, output: the output.
            picked: its rows.
            run: number of the run, for the random numbers.
            passing: the pass.
            first: number of the run's first sample.
        """
        mine = picked.positions % self._settings.passes == passing
        if not mine.any():
            return None
        rows = torch.from_numpy(picked.rows[mine]).to(output.device)
        flat = as_rows(output.detach())
        index = self._rules.names.index(name)
        rng = np.random.default_rng([self._settings.seed, run, passing, index])
        if self._kind == "fisher":
            directions = _likelihood(flat[rows], int(rng.integers(2**62)))
        else:
            directions = self._directions(name, flat.shape[1], first + picked.samples[mine], rng).to(flat)
        sent = torch.zeros_like(flat)
        sent[rows] = directions
        return sent.reshape(output.shape)

    def _directions(self, name: str, width: int, samples: np.ndarray, rng: np.random.Generator) -> Tensor:
        assert self._survey is not None
        scale = self._survey.scale(name)
        if self._settings.directions == "random":
            return torch.from_numpy(rng.choice(np.array([-scale, scale], np.float32), (len(samples), width)))
        basis = self._survey.basis[name]
        signs = rng.choice([-1.0, 1.0], (len(samples), 1))
        return torch.from_numpy((signs * scale * len(basis) ** 0.5 * basis[samples % len(basis)]).astype(np.float32))


def _likelihood(logits: Tensor, seed: int) -> Tensor:
    """Gradients of the log-likelihood of drawn classes (rule 4), shaped as the logits."""
    probabilities = torch.softmax(logits, -1)
    # Drawn on the CPU, so that a seed means the same everywhere.
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(logits.device)
    gradients = -probabilities
    return gradients.scatter_add_(1, drawn, torch.ones_like(gradients[:, :1]))
