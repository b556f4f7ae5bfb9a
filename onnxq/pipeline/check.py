"""Running the written model beside its source."""

from __future__ import annotations

import itertools
from pathlib import Path

from onnxq.calibration import CalibrationData
from onnxq.evaluation.outputs import compare_outputs
from onnxq.evaluation.sessions import as_session
from onnxq.report.records import OutputCheck
from onnxq.runtime.session import session

CHECK_BATCHES = 4
"""Feeds that are run: enough to tell a broken model from a rounded one."""


def check_outputs(source: Path, written: Path, data: CalibrationData, threads: int | None) -> OutputCheck:
    """Compares the outputs of both models on the first feeds of the calibration data.

    The written model runs with the kernel library where it is there, on its function bodies otherwise. Weights stay
    memory-mapped: ONNX Runtime is kept from packing a copy of the source's.

    Raises:
        ModelError: one of the two does not run.
    """
    reference = session(source, library=False, threads=threads, config={"session.disable_prepacking": "1"})
    candidate = as_session(written, threads=threads)
    compared = compare_outputs(reference, candidate, itertools.islice(data, CHECK_BATCHES))
    return OutputCheck(compared.samples, {output.name: output.relative for output in compared.outputs})
