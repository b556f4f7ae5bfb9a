"""Calibration: what the inputs of each weight look like on the user's data."""

from __future__ import annotations

from onnxq.calibration.collect import Collected, Progress, collect
from onnxq.calibration.data import CalibrationData, open_data
from onnxq.calibration.inputs import ModelInput, model_inputs, session_inputs
from onnxq.calibration.ranges import RangeStatistics
from onnxq.calibration.requests import requests_for
from onnxq.calibration.sequential import Block, SequentialCalibration, group_blocks
from onnxq.calibration.statistics import (
    InputStatistics,
    TableStatistics,
    load_statistics,
    save_statistics,
)
from onnxq.calibration.taps import TapRequest, statistics_bytes
from onnxq.calibration.windows import text_windows, window_feeds

__all__ = [
    "Block",
    "CalibrationData",
    "Collected",
    "InputStatistics",
    "ModelInput",
    "Progress",
    "RangeStatistics",
    "SequentialCalibration",
    "TableStatistics",
    "TapRequest",
    "collect",
    "group_blocks",
    "load_statistics",
    "model_inputs",
    "open_data",
    "requests_for",
    "save_statistics",
    "session_inputs",
    "statistics_bytes",
    "text_windows",
    "window_feeds",
]
