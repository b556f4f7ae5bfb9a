from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxq.calibration import InputStatistics, TableStatistics, load_statistics, save_statistics
from onnxq.calibration.statistics import BLOCK_ROWS, InputAccumulator, TableAccumulator
from onnxq.errors import CalibrationError
from tests.calibration.models import assert_moments

ROWS = np.random.default_rng(0).standard_normal((BLOCK_ROWS + 77, 9)).astype(np.float32) + 1


def gathered(rows: np.ndarray, level: str = "full") -> InputStatistics:
    total = InputAccumulator(rows.shape[1], level)  # type: ignore[arg-type]
    total.add(rows)
    return total.finish()


@pytest.mark.parametrize("level", ["full", "diagonal"])
def test_accumulation_over_blocks_equals_numpy(level: str) -> None:
    found = gathered(ROWS, level)
    assert_moments(found, ROWS)
    assert (found.second_moment is None) is (level == "diagonal")
    assert {a.dtype for a in (found.diagonal, found.mean, found.absmax)} == {np.dtype(np.float32)}


def test_many_small_additions_do_not_drift() -> None:
    total = InputAccumulator(2, "full")
    block = np.full((1000, 2), 0.1, np.float32)
    for _ in range(2000):  # a float32 total would be off by about 1e-4 here
        total.add(block)
    found = total.finish()
    assert found.count == 2_000_000
    assert found.second_moment is not None
    np.testing.assert_allclose(found.second_moment, float(np.float32(0.1)) ** 2, rtol=1e-6)


def test_merge_equals_gathering_together() -> None:
    merged = gathered(ROWS[:100]).merge(gathered(ROWS[100:]))
    assert_moments(merged, ROWS)
    assert gathered(ROWS).merge(gathered(ROWS, "diagonal")).second_moment is None
    with pytest.raises(CalibrationError, match="width 9 and 4"):
        gathered(ROWS).merge(gathered(ROWS[:, :4]))
    tables = TableStatistics(np.array([1, 2])).merge(TableStatistics(np.array([3, 4])))
    assert tables.counts.tolist() == [4, 6]


def test_a_table_of_unknown_size_grows() -> None:
    total = TableAccumulator(None)
    total.add(np.array([[1, 1], [0, 1]]))
    total.add(np.array([4]))
    assert total.finish().counts.tolist() == [1, 3, 0, 0, 1]
    with pytest.raises(CalibrationError, match="out of range"):
        total.add(np.array([-1]))


def test_save_and_load(tmp_path: Path) -> None:
    stored: dict[str, InputStatistics | TableStatistics] = {
        "/layer.0/x": gathered(ROWS),
        "if.then_branch/y": gathered(ROWS[:9], "diagonal"),
        "ids": TableStatistics(np.arange(4)),
    }
    save_statistics(tmp_path / "s", stored)
    loaded = load_statistics(tmp_path / "s")
    assert list(loaded) == list(stored)
    x = loaded["/layer.0/x"]
    assert isinstance(x, InputStatistics)
    assert isinstance(x.second_moment, np.memmap)
    assert x.count == len(ROWS)
    for name in ("second_moment", "diagonal", "mean", "absmax"):
        np.testing.assert_array_equal(getattr(x, name), getattr(stored["/layer.0/x"], name))
    assert loaded["if.then_branch/y"].second_moment is None  # type: ignore[union-attr]
    np.testing.assert_array_equal(loaded["ids"].counts, np.arange(4))  # type: ignore[union-attr]


def test_a_cut_off_folder_is_refused(tmp_path: Path) -> None:
    save_statistics(tmp_path, {"x": gathered(ROWS)})
    next(tmp_path.glob("*second_moment.npy")).write_bytes(b"")
    with pytest.raises(CalibrationError, match="cut off"):
        load_statistics(tmp_path)
    with pytest.raises(CalibrationError, match="cut off"):
        load_statistics(tmp_path / "nowhere")
