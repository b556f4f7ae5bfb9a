"""Scales below zero, which turn the long side of an integer grid round: kernel, body and numpy agree."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from onnxq.formats.uniform import UniformFormat, ZeroPoint
from tests.encodings import random_encoding, relative_error
from tests.ops.test_lowbit_bodies import body_model, run_stock

FLOAT32_SUMMATION = 2e-6
INT8_ACTIVATIONS = 0.02


@pytest.mark.parametrize("zero_point", [ZeroPoint.INTEGER, ZeroPoint.PER_GROUP])
@pytest.mark.parametrize("bits", range(1, 9))
def test_both_signs_of_scales(bits: int, zero_point: ZeroPoint, library: Path) -> None:
    encoding = random_encoding(UniformFormat(bits, 32, zero_point), 45, 100)
    signs = np.random.default_rng(2).choice([-1, 1], encoding.scales.shape).astype(np.float16)
    encoding = dataclasses.replace(encoding, scales=encoding.scales * signs)
    model = body_model("LowBitMatMul", encoding, 21)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    for rows in (1, 40):
        x = np.random.default_rng(1).standard_normal((1, rows, 100)).astype(np.float32)
        expected = x @ encoding.dequantize().T
        assert relative_error(run_stock(model, x), expected) <= FLOAT32_SUMMATION
        (kernel,) = ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})
        assert relative_error(kernel, expected) <= INT8_ACTIVATIONS
    table = body_model("LowBitGather", encoding, 21)
    ids = np.array([[0, 44, -1]])
    (looked_up,) = ort.InferenceSession(table.SerializeToString(), options).run(None, {"x": ids})
    np.testing.assert_array_equal(looked_up, encoding.dequantize()[ids])
