"""What the allocation weighs errors with: end-to-end sensitivities, or, where they can't be had, each layer's own."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from onnxq.calibration import CalibrationData
from onnxq.errors import OnnxqError
from onnxq.graph import LoadedModel
from onnxq.pipeline.plan import Plan
from onnxq.progress import Progress
from onnxq.recipe import AllocationSpec
from onnxq.sensitivity import Sensitivities, SensitivitySettings, equal_parts, measure

_ROW_GROUPS = 32
"""Groups of rows of a weight: enough to tell heads apart, and each still holds several of a curve's rows."""


@dataclasses.dataclass(frozen=True)
class Weighing:
    """How the errors of different weights compare.

    Attributes:
        sensitivities: None: by each weight's relative error.
        notes: which it is and why, in sentences.
    """

    sensitivities: Sensitivities | None
    notes: tuple[str, ...]


def weigh(
    loaded: LoadedModel,
    plan: Plan,
    data: CalibrationData | None,
    spec: AllocationSpec,
    seed: int,
    progress: Progress,
    *,
    checkpoint: Path | None = None,
    threads: int | None = None,
) -> Weighing:
    """Measures sensitivities for a budget, if the recipe wants them and the model, the data and torch allow it.

    Args:
        checkpoint: see `onnxq.sensitivity.measure`.
        threads: of torch.
    """
    if spec.sensitivity == "layer":
        return Weighing(None, ())
    instead = "the budget was spent by the relative errors of single layers, not by what they do to the outputs"
    if data is None:
        return Weighing(None, (f"no calibration data: {instead}",))
    settings = SensitivitySettings(samples=spec.samples, seed=seed, threads=threads)
    try:
        found = measure(
            loaded,
            [item.weight for item in plan.planned],
            data,
            settings,
            row_groups=partial(equal_parts, count=_ROW_GROUPS),
            checkpoint=checkpoint,
            progress=progress,
        )
    except OnnxqError as error:
        return Weighing(None, (f"{instead}: {error}",))
    what = "log-likelihood" if found.kind == "fisher" else "squared error"
    note = (
        f"the budget was spent by the {what} of {', '.join(found.outputs)}: gradients of {found.rows} rows of "
        f"{found.samples} samples in {found.seconds:.0f} s"
    )
    return Weighing(found, (note, *found.notes))
