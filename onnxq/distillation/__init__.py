"""A short distillation after rounding: scales, biases and norms learn to bring the outputs back.

Solvers see one weight at a time. What is left when all are rounded, errors that add up from layer to layer, is
taught away here: codes stay as they are, and the few continuous numbers around them are trained until the outputs
of the whole model come close to the float model's (as in PV-Tuning's and QuIP#'s last step, without moving codes).
Pure: reads a float model and the encodings that shall replace its weights, gives new scales and vectors, writes
nothing. Needs torch, from the extra ``onnxq[export]``.
"""

from __future__ import annotations

from onnxq.distillation.result import Distillation
from onnxq.distillation.settings import DistillationSettings
from onnxq.distillation.train import distil, require_distillable
from onnxq.distillation.weights import DecodedWeight, Part, uniform_part, uniform_weight, with_scales

__all__ = [
    "DecodedWeight",
    "Distillation",
    "DistillationSettings",
    "Part",
    "distil",
    "require_distillable",
    "uniform_part",
    "uniform_weight",
    "with_scales",
]
