from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxq.formats.uniform import UniformFormat, ZeroPoint
from onnxq.solvers.nearest import nearest
from onnxq.solvers.refine import Rows, refine
from tests.solvers.cases import heavy_tailed, moment


def rows_of(weight: np.ndarray, format: UniformFormat) -> Rows:
    """A nearest rounding, as refine takes it."""
    encoding = nearest(weight, format)
    zeros = np.broadcast_to(format.zero_of(encoding.zero_points), encoding.scales.shape)
    return Rows(
        weight=np.ascontiguousarray(weight.T / np.float32(encoding.gain)),
        codes=np.ascontiguousarray(encoding.codes.T.astype(np.float32)),
        scales=np.ascontiguousarray(encoding.scales.T.astype(np.float32)),
        zeros=zeros.T.copy(),
    )


def losses(rows: Rows, format: UniformFormat, second_moment: np.ndarray) -> np.ndarray:
    errors = rows.errors(format).astype(np.float64)
    return np.einsum("kr,kl,lr->r", errors, second_moment.astype(np.float64), errors)


@pytest.mark.parametrize("move_codes", [False, True])
@pytest.mark.parametrize("zero_point", ZeroPoint)
@pytest.mark.parametrize("group_size", [32, 64, None])
def test_no_row_gets_worse_and_most_get_better(zero_point: ZeroPoint, group_size: int | None, move_codes: bool) -> None:
    format, second_moment = UniformFormat(3, group_size, zero_point), moment(150)
    rows = rows_of(heavy_tailed(20, 150), format)
    history = [losses(rows, format, second_moment)]
    for _ in range(3):
        refine(rows, format, second_moment, move_codes=move_codes)
        history.append(losses(rows, format, second_moment))
    for before, after in itertools.pairwise(history):
        assert np.all(after <= before * 1.0001)
    assert np.median(history[-1] / history[0]) < (0.7 if move_codes else 0.999)


@pytest.mark.parametrize("zero_point", ZeroPoint)
def test_what_is_refined_can_be_stored(zero_point: ZeroPoint) -> None:
    format, second_moment = UniformFormat(3, 32, zero_point), moment(96)
    rows = rows_of(heavy_tailed(8, 96), format)
    refine(rows, format, second_moment, move_codes=True)
    np.testing.assert_array_equal(rows.scales.astype(np.float16).astype(np.float32), rows.scales)
    np.testing.assert_array_equal(format.zero_of(format.quantize_zero(rows.zeros)), rows.zeros)
    np.testing.assert_array_equal(rows.codes.astype(np.uint8).astype(np.float32), rows.codes)
    assert rows.codes.min() >= 0
    assert rows.codes.max() <= 7


def test_a_scale_by_hand() -> None:
    """Levels -0.5 and 0.5 for the weights -3 and 3 on a scale of 4: 6 is the best one."""
    format = UniformFormat(1, 32, ZeroPoint.MIDRISE)
    column = np.where(np.arange(32) % 2, 3, -3).astype(np.float32)[:, None]
    codes = (column > 0).astype(np.float32)
    rows = Rows(column, codes, np.full((1, 1), 4, np.float32), np.full((1, 1), 0.5, np.float32))
    refine(rows, format, np.eye(32, dtype=np.float32), move_codes=False)
    assert rows.scales.item() == 6


def test_a_zero_point_by_hand() -> None:
    """All weights half a step above their levels: the zero point moves by it, and no error is left."""
    format = UniformFormat(2, 32, ZeroPoint.PER_GROUP)
    codes = np.tile(np.arange(4, dtype=np.float32), 8)[:, None]
    rows = Rows(codes - 1.0, codes.copy(), np.ones((1, 1), np.float32), np.full((1, 1), 1.5, np.float32))
    refine(rows, format, np.eye(32, dtype=np.float32), move_codes=False)
    assert rows.zeros.item() == 1
    assert rows.scales.item() == 1
    assert not rows.errors(format).any()
