"""Every operator against onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

pytest.importorskip("torch")

from onnxq.backprop import TorchGraph
from onnxq.backprop.definitions import DEFINED
from onnxq.backprop.registry import OPS
from tests.backprop.cases import CASES, Case

RELATIVE, ABSOLUTE = 2e-5, 2e-6  # float32 in another order of summation, and other approximations of functions


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator(case: Case) -> None:
    proto = case.model()
    if case.reference:
        expected = ReferenceEvaluator(proto).run(None, case.feeds())
    else:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        expected = session.run(None, case.feeds())
    found = TorchGraph(ir.from_proto(proto)).run(case.feeds())
    assert len(expected) == case.outputs
    for index, array in enumerate(expected):
        got = found[f"y{index}"].numpy()
        assert got.dtype == array.dtype
        assert got.shape == array.shape
        np.testing.assert_allclose(got, array, RELATIVE, ABSOLUTE)


def test_every_operator_has_a_case() -> None:
    assert {case.op for case in CASES} == {*OPS, *DEFINED}
