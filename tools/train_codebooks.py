"""Trains the tables of onnxq/formats/tables.py: levels of lone and trellis codes for a standard Gaussian.

    python -m tools.train_codebooks [--restarts 40] > onnxq/formats/tables.py
    python -m tools.train_codebooks --lone          # prints those of lone codes: a second

A window wider than a code is a trellis: Lloyd iterations (assign samples by the Viterbi algorithm, move each level to
the mean of its samples) from random starts, the best brought to the 7-bit grid. Seeded; about ten minutes on one core.
A window of the code alone needs no samples: the iterations of Lloyd and Max have integrals for the Gaussian.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from onnxq.solvers.viterbi import open_path

PAIRS = ((1, 4), (1, 6), (2, 2), (2, 4), (2, 6), (3, 3), (3, 4), (3, 6), (4, 4), (4, 6), (5, 5), (6, 6))
STEPS, SEQUENCES, TEST_SEQUENCES = 64, 256, 4096
SHORT_ROUNDS, LONG_ROUNDS, FINALISTS = 12, 60, 3
LLOYD_MAX_ROUNDS, LONE_STEPS = 20_000, 3401
MIDDLE, LARGEST = 63.5, 127


@dataclass(frozen=True)
class Trellis:
    """A bit-shift trellis: the state is the last window - bits bits."""

    bits: int
    window: int

    @property
    def states(self) -> int:
        return 1 << (self.window - self.bits)

    def indices(self, samples: np.ndarray, table: np.ndarray) -> np.ndarray:
        """Indices of the best path: samples [steps, sequences] -> int [steps, sequences]."""
        return open_path((samples[..., None] - table.astype(np.float32)) ** 2, self.bits, self.window)

    def error(self, samples: np.ndarray, table: np.ndarray) -> float:
        return float(np.mean((samples - table[self.indices(samples, table)]) ** 2))

    def lloyd(self, table: np.ndarray, rounds: int, generator: np.random.Generator) -> np.ndarray:
        for _ in range(rounds):
            samples = generator.standard_normal((STEPS, SEQUENCES)).astype(np.float32)
            index = self.indices(samples, table).ravel()
            uses = np.bincount(index, minlength=len(table))
            sums = np.bincount(index, samples.ravel(), len(table))
            table = np.where(uses > 0, sums / np.maximum(uses, 1), table).astype(np.float32)
        return table

    def random_start(self, generator: np.random.Generator) -> np.ndarray:
        """Gaussian quantiles; each state gets one of each stratum, in random order."""
        quantiles = norm.ppf((np.arange(1 << self.window) + 0.5) / (1 << self.window)).reshape(-1, self.states)
        columns = generator.permutation(self.states)
        table = np.stack([generator.permutation(quantiles[:, column]) for column in columns])
        return table.ravel().astype(np.float32)


def on_grid(table: np.ndarray, step: float) -> np.ndarray:
    return np.clip(np.rint(table / step + MIDDLE), 0, LARGEST).astype(int)


def train(trellis: Trellis, restarts: int) -> tuple[float, np.ndarray, float]:
    """Step, entries and mean squared error of the best table found."""
    generator = np.random.default_rng([trellis.bits, trellis.window])
    test = generator.standard_normal((STEPS, TEST_SEQUENCES)).astype(np.float32)
    short = [trellis.lloyd(trellis.random_start(generator), SHORT_ROUNDS, generator) for _ in range(restarts)]
    finalists = sorted(short, key=lambda table: trellis.error(test[:, :SEQUENCES], table))[:FINALISTS]
    best = min(
        (trellis.lloyd(table, LONG_ROUNDS, generator) for table in finalists),
        key=lambda table: trellis.error(test, table),
    )
    reach = float(np.abs(best).max())
    candidates = []
    for share in np.linspace(0.9, 1.0, 21):
        step = round(share * reach / MIDDLE, 6)
        entries = on_grid(best, step)
        candidates.append((trellis.error(test, ((entries - MIDDLE) * step).astype(np.float32)), step, entries))
    error, step, entries = min(candidates, key=lambda candidate: candidate[0])
    return step, entries, error


def lloyd_max(count: int) -> np.ndarray:
    """The levels of least mean squared error for a standard Gaussian, rising."""
    levels: np.ndarray = norm.ppf((np.arange(count) + 0.5) / count)
    for _ in range(LLOYD_MAX_ROUNDS):
        mass, mean, _ = cells(levels)
        levels = mean / mass
    return levels


def cells(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of what is nearest to each level: the integrals of 1, x and x^2 under a standard Gaussian."""
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    density = norm.pdf(edges)
    tails = np.where(np.isfinite(edges), edges, 0) * density
    mass = np.diff(norm.cdf(edges))
    return mass, density[:-1] - density[1:], mass + tails[:-1] - tails[1:]


def lone(bits: int) -> tuple[float, np.ndarray, float]:
    """Step, entries and mean squared error of the best table without a trellis."""
    levels = lloyd_max(1 << bits)
    candidates = []
    for share in np.linspace(0.85, 1.02, LONE_STEPS):
        step = round(float(share * levels[-1] / MIDDLE), 6)
        entries = on_grid(levels, step)
        if len(np.unique(entries)) == len(entries):
            chosen = (entries - MIDDLE) * step
            mass, mean, square = cells(chosen)
            candidates.append((float((square - 2 * chosen * mean + chosen**2 * mass).sum()), step, entries))
    error, step, entries = min(candidates, key=lambda candidate: candidate[:2])
    return step, entries, error


HEAD = '''"""Tables of the codebook format, trained on a standard Gaussian by ``tools/train_codebooks.py``.

Beside each: mean squared error on a standard Gaussian (of a trellis, at the end of 64 steps), in the table's own units.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Table:
    """Levels of a standard Gaussian: step * (entry - 63.5).

    Attributes:
        step: of the 7-bit grid.
        error: mean squared error.
        entries: 2**window numbers from 0 to 127, by index.
    """

    step: float
    error: float
    entries: tuple[int, ...]


# fmt: off
GAUSSIAN_TABLES: dict[tuple[int, int], Table] = {
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--restarts", type=int, default=40)
    parser.add_argument("--lone", action="store_true", help="only tables of codes without a trellis")
    arguments = parser.parse_args()
    parts = [HEAD]
    for bits, window in PAIRS:
        if arguments.lone and window > bits:
            continue
        step, entries, error = lone(bits) if window == bits else train(Trellis(bits, window), arguments.restarts)
        print(f"{bits} bits, window {window}: {error:.4f}", file=sys.stderr, flush=True)
        numbers = textwrap.fill(", ".join(map(str, entries)), 110, initial_indent=" " * 8, subsequent_indent=" " * 8)
        parts.append(f"    ({bits}, {window}): Table(\n        {step},\n        {error:.3g},\n        (\n")
        parts.append(textwrap.indent(numbers, " " * 4) + ",\n        ),\n    ),\n")
    parts.append("}\n")
    sys.stdout.write("".join(parts))


if __name__ == "__main__":
    main()
