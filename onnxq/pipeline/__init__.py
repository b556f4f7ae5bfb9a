"""The way data goes: load, find sites, calibrate, allocate, solve, rewrite, check, report."""

from __future__ import annotations

from onnxq.pipeline.folder import quantize_folder
from onnxq.pipeline.run import quantize

__all__ = ["quantize", "quantize_folder"]
