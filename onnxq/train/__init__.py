"""Retraining a torch model to the values that binary codes can hold, before it is exported.

Below three planes most weights need more than rounding. This package puts the paper's schedule on any torch module:
`Target` says which parameters get how many planes, `project` replaces them by what the file will hold, `retrain` trains
between projections, block after block, and `save_encodings` files the codes so that
`onnxq.quantize(..., encodings=FOLDER)` takes them for the exported model without a second rounding.

Needs torch, from the extra ``onnxq[export]``; nothing else in onnxq imports this package.

Source: Chung et al., Extremely low bit Transformer quantization for on-device neural machine translation (arXiv
2009.07453), section 4; modes "scales" and "straight-through" are additions.
"""

from __future__ import annotations

from onnxq.errors import TrainingError

try:
    import torch  # noqa: F401
except ImportError as error:
    raise TrainingError("Retraining needs torch, which is not installed: pip install 'onnxq[export]'.") from error

from onnxq.train.loss import distillation_loss
from onnxq.train.phases import Phase, TrainSettings, growing_phases
from onnxq.train.projection import project, save_encodings
from onnxq.train.retrain import Retrained, Validation, retrain
from onnxq.train.targets import Target

__all__ = [
    "Phase",
    "Retrained",
    "Target",
    "TrainSettings",
    "Validation",
    "distillation_loss",
    "growing_phases",
    "project",
    "retrain",
    "save_encodings",
]
