"""Whether this machine can run our models fast: the library, ONNX Runtime, and a test of both together."""

from __future__ import annotations

import dataclasses
import os
import platform
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from onnxq import ops
from onnxq.errors import LibraryError
from onnxq.formats.uniform import UniformEncoding, UniformFormat, choose_gain, round_scales
from onnxq.passes.forms import KernelForm, StoredWeight
from onnxq.passes.forms.kernel import FLOAT_ACTIVATIONS
from onnxq.runtime.library import describe_library
from onnxq.runtime.session import session_options

TOLERANCE = 1e-5
"""Largest difference between kernel and numpy, relative to the largest output, with float32 activations."""

_N, _K, _BITS = 64, 96, 3


@dataclasses.dataclass(frozen=True)
class Environment:
    """What runs here.

    Attributes:
        library: what the kernel library says of itself (path, version, isa, reason, ...); None without one.
        problem: why there is no library, or why it can't be used, with the way out; empty when all is well.
        test_error: largest relative difference of the kernel test to numpy; None when it did not run.
        onnxruntime: its version.
        providers: execution providers of this build of ONNX Runtime.
        machine: processor and operating system.
        cores: logical ones; None where unknown.
    """

    library: dict[str, Any] | None
    problem: str
    test_error: float | None
    onnxruntime: str
    providers: tuple[str, ...]
    machine: str
    cores: int | None

    @property
    def works(self) -> bool:
        """Whether kernels load and compute rightly."""
        return self.test_error is not None and self.test_error <= TOLERANCE


def check_environment() -> Environment:
    """Looks for the library, loads it into ONNX Runtime and runs a small 3-bit product on it."""
    library, problem, error = None, "", None
    try:
        library = describe_library()
        error = _test_kernel()
        if error > TOLERANCE:
            problem = (
                f"The kernel for {library.get('isa')} computes wrong results here (difference {error:.1e}). "
                "Set ONNXQ_ISA=scalar to go on, and report it with the output of `onnxq doctor --json`."
            )
    except LibraryError as failure:
        problem = str(failure)
    except Exception as failure:  # noqa: BLE001 - ONNX Runtime's exceptions share no public base class
        problem = f"The kernel library loads, but its test failed in ONNX Runtime {ort.__version__}: {failure}"
    return Environment(
        library=library,
        problem=problem,
        test_error=error,
        onnxruntime=ort.__version__,
        providers=tuple(ort.get_available_providers()),
        machine=f"{platform.machine()}, {platform.system()}",
        cores=os.cpu_count(),
    )


def _test_kernel() -> float:
    """Largest difference between LowBitMatMul and numpy, relative to the largest output."""
    rng = np.random.default_rng(0)
    grid = UniformFormat(_BITS, 32)
    scales = rng.uniform(0.01, 0.02, (_N, grid.groups(_K)))
    gain = choose_gain(scales)
    zero = grid.quantize_zero(np.full((1, 1), grid.shared_zero()))
    codes = rng.integers(0, grid.levels, (_N, _K)).astype(np.uint8)
    encoding = UniformEncoding(grid, codes, round_scales(scales, gain), zero, gain)
    x = rng.standard_normal((3, _K)).astype(np.float32)
    model = kernel_model(encoding, accuracy_level=FLOAT_ACTIVATIONS)
    options = session_options(threads=1)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    got = session.run(None, {"x": x})[0]
    expected = x @ encoding.dequantize().T
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def kernel_model(encoding: UniformEncoding, *, accuracy_level: int, opset: int = 21) -> bytes:
    """A serialised model of one LowBitMatMul: x [rows, K] to y [rows, N]."""
    n, k = encoding.shape
    form = KernelForm(accuracy_level)
    tensors = {
        role: ir.Value(name=f"w.{role}", const_value=ir.tensor(array, name=f"w.{role}"))
        for role, array in form.arrays(encoding).items()
    }
    tape = ir.tape.Tape()
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(["rows", k]))
    y = form.linear(tape, x, StoredWeight("w", form, (n, k), form.attributes(encoding), tensors), None)
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape(["rows", n])
    imports = {"": opset, ops.DOMAIN: ops.OPSET_VERSION}
    graph = ir.Graph(
        [x], [y], nodes=tape.nodes, initializers=list(tensors.values()), opset_imports=imports, name="test"
    )
    functions = ops.functions_for("LowBitMatMul", opset)
    model = ir.Model(graph, ir_version=10, functions=functions)
    serialised: bytes = ir.to_proto(model).SerializeToString()
    return serialised
