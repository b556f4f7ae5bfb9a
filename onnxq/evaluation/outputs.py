"""Errors of a candidate's outputs against a reference's, over a stream of inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from onnxq.errors import ModelError
from onnxq.evaluation.sessions import Feeds, Model, as_session, run

MASK = "attention_mask"
"""Input [batch, tokens] that tells tokens (1) from padding (0)."""


@dataclass(frozen=True)
class OutputError:
    """Error of one tensor; sums run over all its values, padding left out.

    Attributes:
        values: Number of values compared.
        relative: ||candidate - reference|| / ||reference||.
        cosine: Of the two, taken as one long vector each.
        snr_db: Signal-to-noise ratio, -20 log10(relative); infinite where they are equal.
        max_abs: Largest absolute difference.
        agreement: Share of rows (last axis) whose largest value is at the same place; None for rows of one
            value.
    """

    name: str
    values: int
    relative: float
    cosine: float
    snr_db: float
    max_abs: float
    agreement: float | None


@dataclass(frozen=True)
class OutputComparison:
    """Errors of all outputs.

    Attributes:
        batches: Number of feeds run.
        samples: Number of samples in them (axis 0).
    """

    outputs: tuple[OutputError, ...]
    batches: int
    samples: int


@dataclass
class ErrorSums:
    """Running sums from which an `OutputError` follows; holds a few numbers, whatever the tensor's size."""

    values: int = 0
    rows: int = 0
    rows_agreeing: int = 0
    reference_power: float = 0.0
    candidate_power: float = 0.0
    product: float = 0.0
    noise_power: float = 0.0
    max_abs: float = 0.0
    wide: bool = field(default=False)

    def add(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        """Add two arrays [..., width] of the same shape."""
        r, c = reference.astype(np.float64, copy=False), candidate.astype(np.float64, copy=False)
        if r.size == 0:
            return
        noise = c - r
        self.values += r.size
        self.reference_power += float(np.vdot(r, r))
        self.candidate_power += float(np.vdot(c, c))
        self.product += float(np.vdot(r, c))
        self.noise_power += float(np.vdot(noise, noise))
        self.max_abs = max(self.max_abs, float(np.abs(noise).max()))
        if r.ndim > 1 and r.shape[-1] > 1:
            same = r.argmax(-1) == c.argmax(-1)
            self.wide = True
            self.rows += same.size
            self.rows_agreeing += int(same.sum())

    def error(self, name: str) -> OutputError:
        """What the sums amount to."""
        if self.noise_power == 0:
            relative, snr = 0.0, math.inf
        elif self.reference_power == 0:
            relative, snr = math.inf, -math.inf
        else:
            relative = math.sqrt(self.noise_power / self.reference_power)
            snr = -20 * math.log10(relative)
        norms = math.sqrt(self.reference_power * self.candidate_power)
        cosine = self.product / norms if norms else float(self.noise_power == 0)
        agreement = self.rows_agreeing / self.rows if self.wide else None
        return OutputError(name, self.values, relative, min(cosine, 1.0), snr, self.max_abs, agreement)


def compare_outputs(
    reference: Model, candidate: Model, data: Iterable[Feeds], *, mask: str | None = MASK
) -> OutputComparison:
    """Run both models over `data` and compare every output that both have.

    Args:
        data: Feeds; taken one at a time.
        mask: Input [batch, tokens] whose zeros are padding: rows of outputs [batch, tokens, ...] there are
            left out. Where the feeds lack it, everything counts.

    Raises:
        ModelError: No common output, different shapes, or no data.
    """
    left, right = as_session(reference), as_session(candidate)
    sums: dict[str, ErrorSums] = {}
    batches = samples = 0
    for feeds in data:
        expected, got = run(left, feeds), run(right, feeds)
        add_errors(sums, expected, got, feeds.get(mask) if mask else None)
        batches += 1
        samples += next(iter(feeds.values())).shape[0]
    if not batches:
        raise ModelError("there is no data to compare the models on: give at least one batch")
    if not sums:
        raise ModelError("the two models have no output of the same name: compare models exported from the same source")
    return OutputComparison(tuple(s.error(name) for name, s in sums.items()), batches, samples)


def add_errors(sums: dict[str, ErrorSums], reference: Feeds, candidate: Feeds, mask: np.ndarray | None) -> None:
    """Add the floating-point arrays that both sides have to `sums`.

    Rows that `mask` [batch, tokens] marks as padding are left out.

    Raises:
        ModelError: An array has different shapes on the two sides.
    """
    for name, expected in reference.items():
        if name not in candidate or not np.issubdtype(expected.dtype, np.floating):
            continue
        got = candidate[name]
        if got.shape != expected.shape:
            raise ModelError(f"{name} has shape {expected.shape} in the reference but {got.shape} in the candidate")
        pair = expected, got
        if mask is not None and expected.ndim >= 3 and expected.shape[:2] == mask.shape:
            pair = expected[mask != 0], got[mask != 0]
        sums.setdefault(name, ErrorSums()).add(*pair)
