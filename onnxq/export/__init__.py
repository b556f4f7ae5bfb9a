"""From a Hugging Face folder or a torch module to ONNX graphs that are ready to quantize.

Importing this package needs neither torch nor optimum; `export` does (`pip install onnxq[export]`).
"""

from __future__ import annotations

from onnxq.export.exporter import export
from onnxq.export.result import ExportedGraph, ExportResult, OutputDifference
from onnxq.export.source import ModuleSource

__all__ = ["ExportResult", "ExportedGraph", "ModuleSource", "OutputDifference", "export"]
