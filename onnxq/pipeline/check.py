"""Running the written model beside its source."""

from __future__ import annotations

import itertools
from pathlib import Path

from onnxq.calibration import CalibrationData
from onnxq.evaluation.outputs import compare_outputs
from onnxq.report.records import OutputCheck
from onnxq.runtime.session import session

CHECK_BATCHES = 4
"""Feeds that are run: enough to tell a broken model from a rounded one."""


def check_outputs(source: Path, written: Path, data: CalibrationData, threads: int | None) -> OutputCheck:
    """Compares the outputs of both models on the first feeds of the calibration data.

    The written model runs on its function bodies, so the check needs no kernel library.

    Raises:
        ModelError: one of the two does not run.
    """
    reference = session(source, library=False, threads=threads)
    candidate = session(written, library=False, threads=threads)
    compared = compare_outputs(reference, candidate, itertools.islice(data, CHECK_BATCHES))
    return OutputCheck(compared.samples, {output.name: output.relative for output in compared.outputs})
