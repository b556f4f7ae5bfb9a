"""The errors that onnxq raises on purpose.

Every message says what is wrong, where (file, node, tensor, shape), why it matters and the way out.
"""

from __future__ import annotations


class OnnxqError(Exception):
    """Base of every error that a user can cause and mend."""


class ModelError(OnnxqError):
    """The model file, or a weight in it, can't be read or is outside what onnxq works on."""


class CalibrationError(OnnxqError):
    """The calibration data does not fit the model."""


class RecipeError(OnnxqError):
    """A recipe names something that does not exist or is out of range."""


class BudgetError(OnnxqError):
    """A size or bit budget lies below what the model can be brought to."""


class OutputExistsError(OnnxqError):
    """The output path is taken and nothing said to replace it."""


class LibraryError(OnnxqError):
    """The kernel library is missing or does not load."""


class ExportError(OnnxqError):
    """A source model could not be brought to ONNX."""


class TrainingError(OnnxqError):
    """Retraining can't start or go on with what it was given."""
