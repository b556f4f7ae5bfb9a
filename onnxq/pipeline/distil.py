"""Distillation inside a run: after all weights are solved and before any is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from onnxq.calibration import CalibrationData
from onnxq.formats.binary import BinaryEncoding
from onnxq.formats.codebook import CodebookEncoding
from onnxq.formats.files import AnyEncoding
from onnxq.formats.float8 import Float8Encoding
from onnxq.formats.framed import FramedEncoding
from onnxq.formats.mixed import MixedEncoding
from onnxq.formats.uniform import UniformEncoding, round_scales
from onnxq.frames import Frame
from onnxq.graph import LoadedModel
from onnxq.pipeline.plan import Planned
from onnxq.pipeline.solve import Solved
from onnxq.progress import Progress
from onnxq.recipe import DistillationSpec
from onnxq.solvers.loss import relative_error

if TYPE_CHECKING:
    from onnxq.distillation import Distillation, Part


def check_distillable(loaded: LoadedModel, data: CalibrationData) -> None:
    """What a distillation will need, checked before anything is solved.

    Raises:
        ModelError: torch is missing, or the model holds operators without a gradient.
        CalibrationError: fewer than two batches of data.
    """
    from onnxq.backprop import TorchGraph  # noqa: F401 - says what to install where torch is missing
    from onnxq.distillation import require_distillable

    require_distillable(loaded, data)


def distil_solved(
    loaded: LoadedModel,
    solved: Sequence[tuple[Planned, Solved]],
    data: CalibrationData,
    spec: DistillationSpec,
    seed: int,
    progress: Progress,
) -> tuple[list[Solved], tuple[str, ...]]:
    """Trains scales, biases and norms so that the model's outputs come back towards the float model's.

    Biases and norms are replaced in the model; codes stay. Memory: what `onnxq.distillation.distil` says, and a byte
    for each weight.

    Returns:
        What became of each weight, and sentences for the report.

    Raises:
        ModelError, CalibrationError: see `check_distillable`.
    """
    from onnxq.distillation import DecodedWeight, DistillationSettings, distil

    weights = [
        DecodedWeight(
            item.weight, tuple(_part(encoding) for encoding in found.encodings), "linear" in item.weight.kinds
        )
        for item, found in solved
    ]
    settings = DistillationSettings(steps=spec.steps, scale_rate=spec.rate, vector_rate=spec.rate, seed=seed)
    result = distil(loaded, weights, data, settings, progress=progress)
    for name, array in result.initializers.items():
        loaded.model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    changed = [_with_scales(item, found, result.scales.get(item.weight.name)) for item, found in solved]
    return changed, (_told(result), *result.notes)


def _told(result: Distillation) -> str:
    scales, vectors = result.trained
    outcome = f"held-out loss {result.before:.4g} to {result.after:.4g}" if result.kept else "not kept"
    return (
        f"distilled {scales:,} scales and {vectors:,} values of biases and norms in {len(result.training)} steps on "
        f"{result.samples[0]} batches ({outcome} on {result.samples[1]})"
    )


def _part(encoding: AnyEncoding) -> Part:
    from onnxq.distillation import Part, uniform_part

    if isinstance(encoding, MixedEncoding):
        return _mixed_part(encoding)
    assert not isinstance(encoding, (Float8Encoding, BinaryEncoding)), "recipes distil no such codes"
    inner = uniform_part(_as_uniform(encoding))
    if not isinstance(encoding, FramedEncoding):
        return inner
    inputs = _synthesis(encoding.input_frame)
    outputs = None if encoding.output_frame is None else _synthesis(encoding.output_frame)

    def decode(scales: Any) -> Any:
        matrix = inner.decode(scales)
        if outputs is not None:
            matrix = outputs(matrix.T).T
        return inputs(matrix)

    return Part(inner.scales, decode, inner.round)


def _mixed_part(encoding: MixedEncoding) -> Part:
    """The scales of its outputs; those of its inputs stay."""
    import torch

    from onnxq.distillation import Part

    scales = encoding.scales.astype(np.float32)[:, None] * np.float32(encoding.gain)
    plain = dataclasses.replace(encoding, scales=np.ones_like(encoding.scales), gain=1.0)
    matrix = torch.from_numpy(plain.dequantize())

    def stored(values: np.ndarray) -> np.ndarray:
        kept: np.ndarray = _mixed_scales(encoding, values).astype(np.float32)[:, None] * np.float32(encoding.gain)
        return kept

    return Part(scales, lambda values: matrix * values, stored)


def _mixed_scales(encoding: MixedEncoding, values: np.ndarray) -> np.ndarray:
    """Effective scales float32 [N, 1] as they are stored."""
    stored: np.ndarray = round_scales(values[:, 0], encoding.gain)
    return stored


def _as_uniform(encoding: UniformEncoding | CodebookEncoding | FramedEncoding) -> UniformEncoding:
    if isinstance(encoding, FramedEncoding):
        return _as_uniform(encoding.inner)
    return encoding.as_uniform() if isinstance(encoding, CodebookEncoding) else encoding


def _synthesis(frame: Frame) -> Callable[[Any], Any]:
    """`Frame.synthesis` on torch tensors [rows, d'], differentiable."""
    import torch

    matrices = frame.matrices()
    signs, left, right = (torch.from_numpy(matrices[name]) for name in ("signs", "left", "right"))
    shape = frame.shape

    def synthesis(coefficients: Any) -> Any:
        halves = coefficients.reshape(coefficients.shape[0], shape.left, -1)
        mixed = (left @ (halves @ right.T)).reshape(coefficients.shape[0], shape.padded)
        return (mixed * signs)[:, : shape.size]

    return synthesis


def _with_scales(item: Planned, found: Solved, scales: tuple[np.ndarray, ...] | None) -> Solved:
    if scales is None:
        return found
    from onnxq.distillation import with_scales

    def replaced(encoding: AnyEncoding, values: np.ndarray) -> AnyEncoding:
        if isinstance(encoding, MixedEncoding):
            return dataclasses.replace(encoding, scales=_mixed_scales(encoding, values))
        if isinstance(encoding, FramedEncoding):
            inner = replaced(encoding.inner, values)
            assert isinstance(inner, (UniformEncoding, CodebookEncoding))
            return dataclasses.replace(encoding, inner=inner)
        assert not isinstance(encoding, (Float8Encoding, BinaryEncoding)), "recipes distil no such codes"
        return dataclasses.replace(encoding, scales=with_scales(_as_uniform(encoding), values).scales)

    encodings = tuple(replaced(encoding, own) for encoding, own in zip(found.encodings, scales, strict=True))
    decoded = np.concatenate([encoding.dequantize() for encoding in encodings])
    note = "; ".join(text for text in (found.note, "scales distilled, proxy loss from before") if text)
    error = relative_error(item.weight.matrix(), decoded)
    return dataclasses.replace(found, encodings=encodings, relative_error=error, note=note)
