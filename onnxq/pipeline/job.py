"""What one run of `quantize` works on."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np

from onnxq.calibration import CalibrationData
from onnxq.graph import LoadedModel
from onnxq.pipeline.bank import EncodingBank
from onnxq.pipeline.plan import Plan
from onnxq.pipeline.resume import file_identity
from onnxq.pipeline.stages import Stages
from onnxq.progress import Progress
from onnxq.recipe import Recipe
from onnxq.report.records import BudgetRecord
from onnxq.version import __version__


@dataclasses.dataclass(frozen=True)
class Job:
    """A model, a recipe, and what follows from both: all of it checked before anything is computed."""

    loaded: LoadedModel
    recipe: Recipe
    plan: Plan
    data: CalibrationData | None
    threads: int | None
    progress: Progress
    budget: tuple[BudgetRecord, ...] = ()
    trained: EncodingBank | None = None
    counts: np.ndarray | None = None

    @property
    def stages(self) -> Stages:
        """The model's calibration."""
        return Stages(self.loaded, self.data, self.threads, self.progress)

    def identity(self) -> dict[str, Any]:
        """What tells a model, recipe and data from others."""
        data = self.data
        return {
            "source": [file_identity(path) for path in (self.loaded.path, *sorted(self.loaded.external_files))],
            "recipe": self.recipe.digest(),
            "data": None if data is None else [data.name, data.samples, _fingerprint(data)],
            "trained": None if self.trained is None else [str(self.trained.folder), len(self.trained)],
            "counts": None if self.counts is None else hashlib.sha256(self.counts.tobytes()).hexdigest(),
            "version": __version__,
        }


def _fingerprint(data: CalibrationData) -> str:
    """Tells data apart by all feeds: curves are kept for long, and a file may change under its name."""
    digest = hashlib.sha256()
    for feed in data:
        for name, array in sorted(feed.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
