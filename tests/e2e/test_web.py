"""The function bodies in onnxruntime-web under Node: the second of a file's three lives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxq.errors import OnnxqError
from onnxq.formats.uniform import UniformFormat, ZeroPoint
from tests.encodings import random_encoding, relative_error
from tests.ops.test_lowbit_bodies import body_model
from tools.web import install, run

WASM_8_BIT_PRODUCT = 1e-5
"""The wasm build computes the fused product in float32, in another order of additions."""


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runner and onnxruntime-web installed."""
    try:
        return install(tmp_path_factory.mktemp("web"))
    except OnnxqError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("bits", "opset"), [(3, 17), (2, 21), (8, 21)])
def test_products_and_lookups(web: Path, tmp_path: Path, bits: int, opset: int) -> None:
    encoding = random_encoding(UniformFormat(bits, 64, ZeroPoint.PER_GROUP), 45, 100)
    rng = np.random.default_rng(0)
    model = tmp_path / "product.onnx"
    model.write_bytes(body_model("LowBitMatMul", encoding, opset).SerializeToString())
    x = rng.standard_normal((1, 3, 100)).astype(np.float32)
    product = run(web, model, {"x": x}).outputs["y"]
    assert relative_error(product, x @ encoding.dequantize().T) <= WASM_8_BIT_PRODUCT
    model.write_bytes(body_model("LowBitGather", encoding, opset).SerializeToString())
    indices = rng.integers(-45, 45, (2, 4))
    np.testing.assert_array_equal(run(web, model, {"x": indices}).outputs["y"], encoding.dequantize()[indices])
