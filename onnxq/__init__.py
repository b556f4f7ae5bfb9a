"""onnxq: transformers in ONNX at 1 to 8 bits, in one portable file.

import onnxq

report = onnxq.quantize("model.onnx", "small.onnx", calibration="text.txt", tokenizer="folder")
session = onnxq.session("small.onnx")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxq.errors import OnnxqError
    from onnxq.pipeline import quantize, quantize_folder
    from onnxq.recipe import Recipe, uniform_recipe
    from onnxq.report.records import QuantizeReport
    from onnxq.runtime.library import library_path
    from onnxq.runtime.session import session, session_options
    from onnxq.version import __version__

# Imported when first asked for: whoever only opens a session need not wait for the graph tools.
_HOMES = {
    "OnnxqError": "onnxq.errors",
    "QuantizeReport": "onnxq.report.records",
    "Recipe": "onnxq.recipe",
    "__version__": "onnxq.version",
    "library_path": "onnxq.runtime.library",
    "quantize": "onnxq.pipeline",
    "quantize_folder": "onnxq.pipeline",
    "session": "onnxq.runtime.session",
    "session_options": "onnxq.runtime.session",
    "uniform_recipe": "onnxq.recipe",
}

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onnxq' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
