"""What stands in front of a stored product is a frame only where it is a frame's analysis."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from onnxq.passes.forms.framed import TRANSFORM_PROPERTY
from onnxq.report.stored_frames import around


@pytest.mark.parametrize(("mark", "remark"), [("analysis", " in a frame"), ("rounding", ""), ("cast", "")])
def test_roundings_and_casts_are_no_frames(mark: str, remark: str) -> None:
    before = ir.node("Mul", [ir.val("x"), ir.val("signs")], metadata_props={TRANSFORM_PROPERTY: mark})
    reader = ir.node("LowBitMatMul", [before.outputs[0], ir.val("packed")], domain="onnxq")
    assert around(reader, "linear", 3, 4, None)[:3] == (3, 4, remark)
