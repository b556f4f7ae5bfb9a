from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxq.errors import ModelError
from onnxq.evaluation import measure_latency, measure_load
from onnxq.evaluation.sessions import as_session
from tests.evaluation.models import feeds, write_encoder


class Clock:
    """Time that passes only while a model runs, by the seconds of `pattern`, one after the other."""

    def __init__(self, pattern: list[float]) -> None:
        self.now, self.calls, self.pattern = 0.0, 0, pattern

    def __call__(self) -> float:
        if self.calls % 2:
            self.now += self.pattern[(self.calls // 2) % len(self.pattern)]
        self.calls += 1
        return self.now


def test_rounds_are_paired_and_rotate(tmp_path: Path) -> None:
    model = write_encoder(tmp_path / "m.onnx")
    # Two rounds are one period: a then b, then b then a. In the second, both are four times slower.
    clock = Clock([1.0, 2.0, 8.0, 4.0])
    report = measure_latency({"a": model, "b": model}, feeds(1)[0], rounds=10, warmup=2, clock=clock)
    a, b = report.timings
    assert (a.ratio, a.ratio_p10, a.ratio_p90) == (1, 1, 1)
    assert (b.ratio, b.ratio_p10, b.ratio_p90) == (2, 2, 2)
    assert a.median == pytest.approx(2.5)
    assert b.median == pytest.approx(5)
    assert clock.calls == 2 * 2 * 12
    assert report.rounds == 10
    assert report.shapes == {"input_ids": (4, 6), "attention_mask": (4, 6)}


def test_threads_are_stated(tmp_path: Path) -> None:
    model = write_encoder(tmp_path / "m.onnx")
    report = measure_latency({"path": model, "session": as_session(model, threads=2)}, feeds(1)[0], rounds=3, threads=1)
    assert [t.threads for t in report.timings] == [1, 2]
    for timing in report.timings:
        assert 0 < timing.p10 <= timing.median <= timing.p90 <= timing.p99


def test_too_little_to_measure(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="three rounds"):
        measure_latency({"m": write_encoder(tmp_path / "m.onnx")}, feeds(1)[0], rounds=2)
    with pytest.raises(ModelError, match="at least one model"):
        measure_latency({}, feeds(1)[0])


def test_load_in_fresh_processes(tmp_path: Path) -> None:
    model = write_encoder(tmp_path / "m.onnx")
    report = measure_load(model, feeds(1)[0], threads=1, processes=1)
    assert report.processes == 1
    assert 0 < report.create_seconds < 30
    assert report.first_run_seconds is not None
    assert report.first_run_seconds > 0
    assert report.base_bytes > 10e6
    assert report.peak_bytes is None or report.peak_bytes >= report.loaded_bytes
    assert measure_load(model, processes=1).first_run_seconds is None


def test_load_of_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a file"):
        measure_load(tmp_path / "none.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(ModelError, match=r"broken\.onnx could not be loaded"):
        measure_load(broken, processes=1)
    wrong = {"input_ids": np.ones((1, 2), np.float32)}
    with pytest.raises(ModelError, match="could not be loaded"):
        measure_load(write_encoder(tmp_path / "m.onnx"), wrong, processes=1)
