"""onnxq: transformers in ONNX at 1 to 8 bits, in one portable file.

    import onnxq

    report = onnxq.quantize("model.onnx", "small.onnx", calibration="text.txt", tokenizer="folder")
    session = onnxq.session("small.onnx")
"""

from __future__ import annotations

from onnxq.errors import OnnxqError
from onnxq.pipeline import quantize, quantize_folder
from onnxq.recipe import Recipe, uniform_recipe
from onnxq.report.records import QuantizeReport
from onnxq.runtime.library import library_path
from onnxq.runtime.session import session, session_options
from onnxq.version import __version__

__all__ = [
    "OnnxqError",
    "QuantizeReport",
    "Recipe",
    "__version__",
    "library_path",
    "quantize",
    "quantize_folder",
    "session",
    "session_options",
    "uniform_recipe",
]
