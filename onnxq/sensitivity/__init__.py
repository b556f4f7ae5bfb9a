"""Sensitivities: what a change of each weight does to the final outputs, from the ONNX file and some data.

Rounding errors of different weights are nearly independent and of mean zero, so to second order the expected change
of the outputs is a sum over all elements of (sensitivity x squared error). With the outputs' rows z_t (a token of a
sequence, or a whole sample), the sensitivity of an element w is

    "output"   S(w) = sum over outputs of  mean_t sum_c (d (u_c . z_t) / d w)^2  /  mean_t |z_t|^2
    "fisher"   S(w) = mean_t  E_{y ~ p_t} (d log p_t(y) / d w)^2

with u_c a basis of the outputs: all coordinates, or the leading principal components. It is estimated by backward
passes from sub-sampled rows (`onnxq.sensitivity.probes` says from which, in which directions): the gradient of each
weight, X^T Gamma summed over the tokens of a run, is squared element by element and summed into groups in float32.

"output" with principal components is the gradient variance G^2 of CVXQ (Young, "Foundations of Large Language Model
Compression", arXiv 2409.02026, section 3; "Radio", arXiv 2505.03031), up to a factor that all weights share: there,
each of 17 tokens is sent backwards alone, one component a sequence. Departures: eigenvectors are sorted, accumulators
are float32 (float16 ones lose squares below 6e-8), "random" leaves no component out, and tokens or samples that share
a backward pass carry random signs, so that their cross terms vanish on average. Gradients are taken at the float
weights. "fisher" is the diagonal of the Fisher matrix: half of S times the squared error is the expected
Kullback-Leibler divergence.

Needs torch, from the extra ``onnxq[export]``, only when `measure` is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.calibration import CalibrationData
from onnxq.errors import ModelError
from onnxq.graph import LoadedModel, Weight
from onnxq.progress import NullProgress, Progress
from onnxq.sensitivity.checkpoint import Checkpoint
from onnxq.sensitivity.result import Sensitivities, WeightSensitivity, equal_parts, runs_of_rows
from onnxq.sensitivity.settings import SensitivitySettings

__all__ = [
    "Sensitivities",
    "SensitivitySettings",
    "WeightSensitivity",
    "equal_parts",
    "measure",
    "runs_of_rows",
]


def measure(
    loaded: LoadedModel,
    weights: Sequence[Weight],
    data: CalibrationData,
    settings: SensitivitySettings | None = None,
    *,
    row_groups: Callable[[Weight], np.ndarray] | None = None,
    checkpoint: Path | None = None,
    key: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Sensitivities:
    """The sensitivities of weights, all sites of each together (tables, products, tied ones, in branches taken).

    Memory: what autograd keeps of one run (every activation between the first weight and the outputs), one weight's
    gradient at a time, and the sums, one number per row and one per group and column. Weights share the model's
    memory map; of a half-precision model they are widened, 4 bytes an element. A run holds no more token ids than
    the settings say.

    Args:
        loaded: the float model; it is not changed.
        weights: of that model.
        data: what to run.
        settings: see `SensitivitySettings`.
        row_groups: the group of each row of a weight's stacked matrix, int [batch * n], numbered from 0; sensitivities
            are means over a group for each input column. Such as ``partial(runs_of_rows, size=128)``, or any
            permutation of it; None makes one group of all rows.
        checkpoint: a file that sums are saved to now and then; a call with equal arguments goes on from it. It is
            left behind.
        key: what else tells this measurement from others, such as the model's and the data's identity.
        progress: follows the samples.

    Raises:
        ModelError: torch is missing, an operator has no gradient, or the outputs don't suit the settings.
        CalibrationError: the data has no row that counts.
    """
    from onnxq.backprop import TorchGraph  # noqa: F401 - says what to install where torch is missing
    from onnxq.sensitivity.gradients import measure_gradients

    settings, groups = settings or SensitivitySettings(), row_groups or _one_group
    if len({weight.name for weight in weights}) != len(weights):
        raise ModelError("Two of the weights have one name: measure them in calls of their own.")
    digest = sha256()
    for weight in weights:
        digest.update(f"{weight.name} {weight.batch} {weight.n} {weight.k}".encode())
        digest.update(groups(weight).astype(np.int64).tobytes())
    identity = {
        "settings": asdict(settings),
        "weights": digest.hexdigest(),
        "data": [data.name, data.samples, data.batches],
        "caller": dict(key or {}),
    }
    kept = Checkpoint(checkpoint, identity)
    return measure_gradients(loaded, weights, data, settings, groups, kept, progress or NullProgress())


def _one_group(weight: Weight) -> np.ndarray:
    return np.zeros(weight.batch * weight.n, np.int64)
