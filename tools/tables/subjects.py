"""The real models of the tables, their calibration data, and the number that says how good they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from onnxq.calibration import CalibrationData, model_inputs, open_data, text_windows, window_feeds
from onnxq.evaluation.accuracy import top1
from onnxq.evaluation.perplexity import measure_perplexity
from onnxq.evaluation.similarity import compare_embeddings, embed
from onnxq.export import export
from onnxq.graph import load
from tools.models import cache_folder, fetch

SENTENCES = 500
CALIBRATION_WINDOWS, WINDOWS, CONTEXT = 32, 8, 512
CALIBRATION_PICTURES = 512


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model under test.

    Attributes:
        model: its float ONNX file.
        calibration: opens the data for statistics.
        metric: what `measure` gives, for people.
        measure: the number, from a session of a candidate.
    """

    model: Path
    calibration: Callable[[], CalibrationData]
    metric: str
    measure: Callable[[ort.InferenceSession], float]


def _minilm() -> Subject:
    folder = cache_folder() / "demo" / "minilm-fp32"
    if not (folder / "model.onnx").exists():
        export(fetch("minilm"), folder, task="feature-extraction")
    model, text = folder / "model.onnx", fetch("reviews")
    heldout = open_data(
        text / "heldout.txt", model_inputs(load(model).model), tokenizer=folder, max_samples=SENTENCES, max_length=256
    )
    reference = embed(ort.InferenceSession(model, providers=["CPUExecutionProvider"]), heldout)

    def measure(session: ort.InferenceSession) -> float:
        return compare_embeddings(reference, embed(session, heldout)).cosine_mean

    def calibration() -> CalibrationData:
        inputs = model_inputs(load(model).model)
        return open_data(text / "calibration.txt", inputs, tokenizer=folder, max_samples=256, max_length=256)

    return Subject(model, calibration, f"cosine to float, {SENTENCES} held-out sentences", measure)


def _smollm2() -> Subject:
    from tools.smollm2 import prepare

    folder, text = prepare(), fetch("brown-documents")
    model = folder / "model.onnx"
    windows = text_windows(text / "heldout.txt", folder, context=CONTEXT, windows=WINDOWS)

    def calibration() -> CalibrationData:
        drawn = text_windows(text / "calibration.txt", folder, context=CONTEXT, windows=CALIBRATION_WINDOWS)
        inputs = model_inputs(load(model).model)
        return open_data(window_feeds(drawn, inputs), inputs)

    def measure(session: ort.InferenceSession) -> float:
        return measure_perplexity(session, windows).perplexity

    return Subject(model, calibration, f"perplexity, {WINDOWS} held-out windows of {CONTEXT} tokens", measure)


def _vit() -> Subject:
    from tools.vit import prepare

    folder = prepare()
    model = folder / "model.onnx"

    def calibration() -> CalibrationData:
        return open_data(folder / "calibration.npz", model_inputs(load(model).model), max_samples=CALIBRATION_PICTURES)

    def measure(session: ort.InferenceSession) -> float:
        return 100 * top1(session, folder / "heldout.npz").top1

    return Subject(model, calibration, "top-1 accuracy in %, 10,000 held-out pictures", measure)


SUBJECTS: dict[str, Callable[[], Subject]] = {"minilm": _minilm, "smollm2": _smollm2, "vit": _vit}


def measure_with(subject: Subject, weights: Mapping[str, np.ndarray]) -> float:
    """The metric of a subject in which some initializers are replaced, in float32."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # ONNX Runtime reads them where they are: they have to outlive the session.
    values = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for name, array in weights.items()}
    for name, value in values.items():
        options.add_initializer(name, value)
    return subject.measure(ort.InferenceSession(subject.model, options, providers=["CPUExecutionProvider"]))
