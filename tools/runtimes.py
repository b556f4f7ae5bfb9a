"""Shows that one library file and one model file work with several versions of ONNX Runtime.

    python -m tools.runtimes 1.17.3 1.32.0

For each version: a new virtual environment with that onnxruntime and nothing of onnxq, in which a small quantised model
of opset 17 runs with the kernel library and without it. Prints a table of largest relative differences to numpy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

import onnxq
from onnxq.recipe import GridSpec, LinearPlan, Recipe, TablePlan

ROWS, WIDTH, OUTPUTS = 96, 64, 80

PROBE = """
import json, sys
import numpy as np
import onnxruntime as ort

model, library, data = sys.argv[1:]
arrays = np.load(data)
found = {"version": ort.__version__}
for name in ("library", "stock"):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if name == "library":
        options.register_custom_ops_library(library)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    y = session.run(None, {"ids": arrays["ids"]})[0]
    found[name] = float(np.abs(y - arrays["expected"]).max() / np.abs(arrays["expected"]).max())
print(json.dumps(found))
"""


def write_model(folder: Path) -> tuple[Path, Path]:
    """A quantised look-up and product of opset 17, and inputs with what numpy makes of them."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    weight = rng.standard_normal((WIDTH, OUTPUTS)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["x"]), helper.make_node("MatMul", ["x", "fc.weight"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", OUTPUTS])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(weight, "fc.weight")],
    )
    source = folder / "float.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), source)
    # At 8 bits both lives agree with float numpy to about a hundredth, which tells a right answer from a wrong one.
    recipe = Recipe("probe", linear=LinearPlan(GridSpec(8, 32)), tables=TablePlan(GridSpec(8, 32)), min_elements=1)
    out = folder / "small.onnx"
    onnxq.quantize(source, out, recipe=recipe)
    ids = rng.integers(0, ROWS, 16)
    np.savez(folder / "data.npz", ids=ids, expected=table[ids] @ weight)
    return out, folder / "data.npz"


def probe(version: str, model: Path, data: Path, folder: Path) -> dict[str, float | str]:
    """What one version of ONNX Runtime makes of the model."""
    environment = folder / f"venv-{version}"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    # Wheels of 1.17 and 1.18 were built against the first major version of numpy.
    numpy = "numpy<2" if tuple(map(int, version.split(".")[:2])) < (1, 19) else "numpy"
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        f"onnxruntime=={version}",
        numpy,
    ]
    subprocess.run(install, check=True)
    command = [python, "-c", PROBE, model, onnxq.library_path(), data]
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    if ran.returncode:
        return {"version": version, "error": ran.stderr.strip().splitlines()[-1]}
    found: dict[str, float | str] = json.loads(ran.stdout)
    return found


def main() -> int:
    """The command line; fails when a version fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("versions", nargs="+", help="versions of onnxruntime")
    table = Table(
        "onnxruntime", "with the library", "stock", title="largest relative difference to float numpy, 8 bits"
    )
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, data = write_model(folder)
        for version in parser.parse_args().versions:
            found = probe(version, model, data, folder)
            if "error" in found:
                failed = True
                table.add_row(version, str(found["error"]), "")
            else:
                table.add_row(str(found["version"]), f"{found['library']:.1e}", f"{found['stock']:.1e}")
    Console().print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
