"""Running models in onnxruntime-web under Node, from Python."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np

from onnxq.errors import OnnxqError

_HERE = Path(__file__).parent
_LIMIT_SECONDS = 600


@dataclasses.dataclass(frozen=True)
class WebRun:
    """What one model gave.

    Attributes:
        outputs: by name, float32.
        load_ms: creation of the session, the wasm module included.
        run_ms: median of the runs.
    """

    outputs: dict[str, np.ndarray]
    load_ms: float
    run_ms: float


def install(folder: Path) -> Path:
    """Puts the runner and onnxruntime-web into a folder.

    Raises:
        OnnxqError: node or npm is missing, or the package can't be had.
    """
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise OnnxqError("node and npm are not installed: they are needed to run models in onnxruntime-web.")
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("package.json", "run.mjs"):
        shutil.copy(_HERE / file, folder)
    command = ["npm", "install", "--no-audit", "--no-fund", "--silent"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False)
    if done.returncode:
        raise OnnxqError(f"onnxruntime-web can't be installed: {done.stderr.strip()[-300:]}")
    return folder


def run(folder: Path, model: Path, feeds: dict[str, np.ndarray], repeats: int = 1) -> WebRun:
    """Runs a model, weights beside it included, on one wasm thread.

    Args:
        folder: from `install`.
        model: the .onnx file.
        feeds: int64, int32 or float32 arrays.
        repeats: runs to take the median of.

    Raises:
        OnnxqError: the model does not run; with what Node said.
    """
    described = {
        name: {"type": array.dtype.name, "dims": list(array.shape), "data": array.ravel().tolist()}
        for name, array in feeds.items()
    }
    feeds_file = folder / "feeds.json"
    feeds_file.write_text(json.dumps(described))
    command = ["node", "run.mjs", str(model.resolve()), str(feeds_file), str(repeats)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False)
    if done.returncode:
        raise OnnxqError(f"{model.name} does not run in onnxruntime-web: {done.stderr.strip()[-2000:]}")
    found = json.loads(done.stdout)
    outputs = {
        name: np.array(output["data"], np.float32).reshape(output["dims"]) for name, output in found["outputs"].items()
    }
    return WebRun(outputs, found["load_ms"], found["run_ms"])
