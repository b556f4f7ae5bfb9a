"""Replace parameters by the nearest values that binary codes hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from onnxq.formats.binary import BinaryEncoding, BinaryFormat
from onnxq.graph.shared import content_of
from onnxq.pipeline.bank import EncodingBank
from onnxq.solvers.binary import ROUNDS, BinaryFit, binary_codes
from onnxq.train.recover import recover_planes
from onnxq.train.targets import Target, choose


def project(
    module: nn.Module,
    targets: Sequence[Target],
    *,
    solver: BinaryFit = BinaryFit.ALTERNATING,
    rounds: int = ROUNDS,
    known: Mapping[str, BinaryEncoding] | None = None,
) -> dict[str, BinaryEncoding]:
    """Replaces parameters in place by what their encodings decode to, scales in float16 as the file holds them.

    Rows that are already sums of planes keep them, so a second projection changes nothing. Time: some 10 s for a table
    [32000, 256] of 1 to 4 planes on a core, and a tenth of that with the greedy solver.

    Args:
        module: any, with float32 parameters. Biases, norms and parameters that no rule takes stay.
        targets: rules, see `Target`.
        solver: how signs and scales are found.
        rounds: of the alternating solver.
        known: encodings of an earlier projection by name, whose rows are kept where they still are exact.

    Returns:
        The encodings by the first name of each parameter.

    Raises:
        TrainingError: a rule takes nothing, or does not suit a parameter.
        ValueError: a value is not finite.
    """
    encodings = {}
    for chosen in choose(module, targets):
        before = None if known is None else known.get(chosen.name)
        encoding = encode(chosen.matrix(), chosen.format, chosen.order, before, solver=solver, rounds=rounds)
        chosen.put(encoding.dequantize())
        encodings[chosen.name] = encoding
    return encodings


def encode(
    matrix: np.ndarray,
    format: BinaryFormat,
    order: np.ndarray | None = None,
    known: BinaryEncoding | None = None,
    *,
    solver: BinaryFit = BinaryFit.ALTERNATING,
    rounds: int = ROUNDS,
) -> BinaryEncoding:
    """The encoding of a matrix float32 [N, K], with the planes of rows that have some exactly (see `project`)."""
    if known is not None and not same_layout(known, format, order):
        known = None
    if known is not None and np.array_equal(known.dequantize(), matrix):
        return known
    found = recover_planes(matrix, format, order)
    if found is not None and np.array_equal(found.dequantize(), matrix):
        return found
    solved = binary_codes(matrix, format, rows=order, fit=solver, rounds=rounds)
    for candidate in (found, known):
        if candidate is not None:
            solved = _with_exact_rows(solved, candidate, matrix)
    return solved


def same_layout(encoding: BinaryEncoding, format: BinaryFormat, order: np.ndarray | None) -> bool:
    """Whether an encoding has this format and order of rows."""
    if encoding.format != format or (encoding.order is None) != (order is None):
        return False
    return order is None or np.array_equal(encoding.order, order)  # type: ignore[arg-type]


def _with_exact_rows(solved: BinaryEncoding, kept: BinaryEncoding, matrix: np.ndarray) -> BinaryEncoding:
    """An encoding that takes the rows of another, of the same layout, which decode to the matrix exactly."""
    ratio = kept.gain / solved.gain
    scales = (kept.scales.astype(np.float64) * ratio).astype(np.float16)
    offsets = None if kept.offsets is None else (kept.offsets.astype(np.float64) * ratio).astype(np.float16)
    # The largest of all weights set the gain, so nothing overflows; what is lost at the small end shows in the values.
    moved = dataclasses.replace(kept, scales=scales, offsets=offsets, gain=solved.gain)
    exact = (moved.dequantize() == matrix).all(axis=1)
    exact = exact if kept.order is None else exact[kept.order]
    merged = solved.offsets
    if merged is not None and moved.offsets is not None:
        merged = np.where(exact[:, None], moved.offsets, merged)
    return dataclasses.replace(
        solved,
        codes=np.where(exact[:, None], moved.codes, solved.codes),
        scales=np.where(exact[:, None], moved.scales, solved.scales),
        offsets=merged,
    )


def save_encodings(encodings: Mapping[str, BinaryEncoding], folder: str | Path) -> None:
    """Files encodings under what they decode to, for ``onnxq.quantize(..., encodings=folder)``.

    The exported float model holds exactly these values, so the run finds each weight's codes and rounds nothing. Files
    that are there already stay: one folder can serve several models.

    Args:
        encodings: as `project` and `retrain` return them.
        folder: made if it is not there.
    """
    bank = EncodingBank(Path(folder))
    for encoding in encodings.values():
        bank.keep(content_of(encoding.dequantize()), encoding)
