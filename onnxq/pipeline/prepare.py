"""From a model and a recipe to a job: weights found, frames folded, each constant planned or kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.calibration import CalibrationData, model_inputs, open_data
from onnxq.graph import LoadedModel, SiteReport, Weight, find_weights
from onnxq.graph.shared import contents_of
from onnxq.passes.fold import FoldFramesPass
from onnxq.passes.functions import inline_functions_with_sites
from onnxq.pipeline.bank import EncodingBank
from onnxq.pipeline.distil import check_distillable
from onnxq.pipeline.job import Job
from onnxq.pipeline.plan import frame_of, is_planned, make_plan
from onnxq.progress import Progress
from onnxq.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Given:
    """What a run was given beside a model and its data.

    Attributes:
        recipe: what to do.
        threads: of calibration runs; None leaves it to ONNX Runtime.
        progress: follows the run.
        trained: encodings that weights were trained to, or None.
        counts: int64 [V], how often each row of a table is looked up in the user's text, or None.
    """

    recipe: Recipe
    threads: int | None
    progress: Progress
    trained: EncodingBank | None = None
    counts: np.ndarray | None = None


def inline(loaded: LoadedModel) -> tuple[str, ...]:
    """Inlines functions that hold weights; what a report should say of it."""
    inlined = inline_functions_with_sites(loaded.model)
    if not inlined:
        return ()
    return (f"inlined the functions {', '.join(inlined)}: weights inside them can't be replaced",)


def find(loaded: LoadedModel, elsewhere: Mapping[str, tuple[str, ...]] | None = None) -> SiteReport:
    """The weights of a model with the kinds of sites that other graphs have of them, by name."""
    found = find_weights(loaded.model, loaded.path.stem)
    if not elsewhere:
        return found
    weights = [dataclasses.replace(weight, elsewhere=elsewhere.get(weight.name, ())) for weight in found.weights]
    return dataclasses.replace(found, weights=weights)


def make_job(
    loaded: LoadedModel,
    data: CalibrationData | None,
    given: Given,
    *,
    notes: tuple[str, ...] = (),
    elsewhere: Mapping[str, tuple[str, ...]] | None = None,
    calibrated: bool | None = None,
) -> Job:
    """Plans every constant of a model. Nothing is computed from its data yet.

    Args:
        loaded: the model; functions with weights are inlined (`inline`). Frames may be folded into it.
        data: its calibration data, or None.
        given: the recipe and what goes with it.
        notes: to begin the report with.
        elsewhere: see `find`.
        calibrated: whether weights have statistics, from this graph's data or from another's; None asks `data`.

    Raises:
        OnnxqError: the recipe does not fit the model or its data.
    """
    recipe = given.recipe
    if recipe.distillation is not None and data is not None:
        check_distillable(loaded, data)
    found = find(loaded, elsewhere)
    fold = FoldFramesPass(
        found.weights, lambda weight: frame_of(weight, recipe), lambda weight: is_planned(weight, recipe)
    )
    if fold(loaded.model).modified:
        found = find(loaded, elsewhere)
    plan = make_plan(
        found,
        recipe,
        calibrated=data is not None if calibrated is None else calibrated,
        origins=fold.origins,
        in_frame=fold.in_frame,
        trained=_trained_formats(given.trained),
        counts=_counts_of(given.counts),
    )
    folded = [
        f"the frame between {item.before} and {', '.join(item.after)} is folded into both: no transform is left"
        for item in fold.folded
    ]
    plan = dataclasses.replace(plan, notes=(*plan.notes, *folded, *notes))
    return Job(loaded, recipe, plan, data, given.threads, given.progress, trained=given.trained, counts=given.counts)


def open_calibration(calibration: Any, loaded: LoadedModel, recipe: Recipe, tokenizer: Any) -> CalibrationData | None:
    """The calibration data of one model, as the recipe wants it read."""
    if calibration is None:
        return None
    spec = recipe.calibration
    return open_data(
        calibration,
        model_inputs(loaded.model),
        tokenizer=tokenizer,
        batch_size=spec.batch_size,
        max_samples=spec.max_samples,
        max_length=spec.max_length,
        seed=recipe.seed,
    )


def counted(source: np.ndarray | str | Path | None, tokenizer: str | Path | None) -> np.ndarray | None:
    """How often each row of a table is looked up, from an array, a file of it or a text; None for None."""
    if source is None:
        return None
    # Imported here: the tokenizers library is only needed for text.
    from onnxq.calibration.tokens import open_counts

    return open_counts(source, tokenizer)


def _trained_formats(bank: EncodingBank | None) -> Callable[[Weight], tuple[Any, ...] | None] | None:
    if bank is None:
        return None

    def formats_of(weight: Weight) -> tuple[Any, ...] | None:
        found = bank.find_all(contents_of(weight))
        return None if found is None else tuple(dict.fromkeys(encoding.format for encoding in found))

    return formats_of


def _counts_of(counts: np.ndarray | None) -> Callable[[Weight], np.ndarray | None] | None:
    if counts is None:
        return None
    return lambda weight: counts if "table" in weight.kinds and weight.n == len(counts) else None
