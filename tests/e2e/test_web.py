"""The function bodies in onnxruntime-web under Node: the second of a file's three lives."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from onnxq.formats.uniform import UniformFormat, ZeroPoint
from tests.encodings import random_encoding, relative_error
from tests.ops.test_lowbit_bodies import body_model

WASM_8_BIT_PRODUCT = 1e-5
"""The wasm build computes the fused product in float32, in another order of additions."""

RUNNER = Path(__file__).parents[2] / "tools" / "web"


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runner and onnxruntime-web installed."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("web")
    for file in ("package.json", "run.mjs"):
        shutil.copy(RUNNER / file, folder)
    command = ["npm", "install", "--no-audit", "--no-fund", "--silent"]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    if installed.returncode:
        pytest.skip(f"onnxruntime-web can't be installed: {installed.stderr.strip()[-300:]}")
    return folder


def run_in_web(web: Path, model: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    described = {
        name: {"type": array.dtype.name, "dims": list(array.shape), "data": array.ravel().tolist()}
        for name, array in feeds.items()
    }
    feeds_file = web / "feeds.json"
    feeds_file.write_text(json.dumps(described))
    command = ["node", "run.mjs", str(model), str(feeds_file)]
    ran = subprocess.run(command, cwd=web, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    outputs = json.loads(ran.stdout)["outputs"]
    return {name: np.array(output["data"], np.float32).reshape(output["dims"]) for name, output in outputs.items()}


@pytest.mark.parametrize(("bits", "opset"), [(3, 17), (2, 21), (8, 21)])
def test_products_and_lookups(web: Path, tmp_path: Path, bits: int, opset: int) -> None:
    encoding = random_encoding(UniformFormat(bits, 64, ZeroPoint.PER_GROUP), 45, 100)
    rng = np.random.default_rng(0)
    model = tmp_path / "product.onnx"
    model.write_bytes(body_model("LowBitMatMul", encoding, opset).SerializeToString())
    x = rng.standard_normal((1, 3, 100)).astype(np.float32)
    product = run_in_web(web, model, {"x": x})["y"]
    assert relative_error(product, x @ encoding.dequantize().T) <= WASM_8_BIT_PRODUCT
    model.write_bytes(body_model("LowBitGather", encoding, opset).SerializeToString())
    indices = rng.integers(-45, 45, (2, 4))
    np.testing.assert_array_equal(run_in_web(web, model, {"x": indices})["y"], encoding.dequantize()[indices])
