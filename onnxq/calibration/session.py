"""Give a cut model to ONNX Runtime without copying its weights.

The graph goes over as bytes; the weights by one of three ways, the first that fits:
 1. External data beside the model stays where it is: ONNX Runtime maps the file (it needs the folder, and refuses
    files that a symbolic link leads out of it).
 2. Small tensors, and types that can't be fed, are put into the bytes.
 3. Everything else (linked or embedded large tensors, overrides) becomes an input and is fed at each run: the array
    is used in place, also a memory-mapped one. `add_external_initializers` would copy it to the heap.

Measured on a 2.7 GB float32 model (onnxruntime 1.32): prepacking costs 2.6 GB of heap and 4 to 12 s; without it,
36 MB of heap, 0.01 s, and 1.4 times the time per run; the weights are then clean file pages that the system may drop.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from onnxq.calibration.extraction import Extraction, feed_constant
from onnxq.calibration.inputs import Feed
from onnxq.calibration.taps import all_graphs
from onnxq.errors import CalibrationError

SessionHook = Callable[[onnxruntime.SessionOptions], None]
"""Called with the session options before use: register a custom-op library, set a thread pool."""

EMBED_BYTES = 64 << 20
"""Embedded tensors up to this total go into the bytes; parsing them costs about three times that for a moment."""
SMALL_TENSOR = 4096
FRUGAL_BYTES = 256 << 20
"""Above this weight total, no prepacking and no graph optimisation: both keep a second copy of weights."""


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """How sessions are made.

    Attributes:
        threads: Threads inside an operator; None leaves it to ONNX Runtime.
        hook: See `SessionHook`.
        providers: Execution providers, in order.
    """

    threads: int | None = None
    hook: SessionHook | None = None
    providers: Sequence[str] = ("CPUExecutionProvider",)


class TapSession:
    """An ONNX Runtime session of an extraction; `run` gives the taps' arrays in order."""

    def __init__(self, extraction: Extraction, settings: RunSettings) -> None:
        weights: dict[str, Any] = {n: _feedable(a) for n, a in extraction.weights.items()}
        folder, total = _place_weights(extraction.model, weights)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # patterns are kept per input shape, and lengths vary
        if settings.threads is not None:
            options.intra_op_num_threads = settings.threads
        if folder is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        level = onnxruntime.GraphOptimizationLevel
        if total > FRUGAL_BYTES:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
            options.graph_optimization_level = level.ORT_DISABLE_ALL
        else:
            options.graph_optimization_level = level.ORT_ENABLE_EXTENDED
        if settings.hook is not None:
            settings.hook(options)
        try:
            proto = ir.to_proto(extraction.model).SerializeToString()
            self._session = onnxruntime.InferenceSession(proto, options, providers=list(settings.providers))
        # ONNX Runtime's exceptions share no base below Exception.
        except Exception as error:
            raise CalibrationError(
                f"ONNX Runtime can't load the model for calibration: {error}. If it uses custom ops, register their "
                "library through the session_options hook."
            ) from error
        self._weights = weights
        self._outputs = list(extraction.outputs)
        self._names = {i.name for i in self._session.get_inputs()} | {
            i.name for i in self._session.get_overridable_initializers()
        }

    def run(self, feed: Feed, where: str) -> list[np.ndarray]:
        """The taps on one feed; inputs that the cut model no longer has are left out."""
        used = {n: _feedable(a) for n, a in feed.items() if n in self._names}
        try:
            return list(self._session.run(self._outputs, {**used, **self._weights}))
        except Exception as error:
            shapes = ", ".join(f"{n} {list(a.shape)}" for n, a in feed.items())
            raise CalibrationError(
                f"{where}: the model failed to run on this feed ({shapes}): {error}. Check that the original model "
                "runs on it; a tensor in a Loop body that changes its shape between iterations can't be tapped."
            ) from error


def _feedable(array: np.ndarray) -> Any:
    """ONNX Runtime takes NumPy's own dtypes as they are; bfloat16 and float8 need their ONNX type said."""
    if array.dtype.kind != "V" and array.dtype.isbuiltin == 1:
        return array
    plain = np.ascontiguousarray(array).view(np.dtype(f"u{array.dtype.itemsize}"))
    element = ir.DataType.from_numpy(array.dtype).value
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(plain, element)


def _place_weights(model: ir.Model, fed: dict[str, Any]) -> tuple[str | None, int]:
    """Choose the way of every initializer (see the module); gives the folder of external data, and all bytes."""
    folder: str | None = None
    total = sum(_nbytes(v) for v in fed.values())
    embedded = 0
    for graph in all_graphs(model.graph):
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or not value.uses():
                continue
            total += tensor.nbytes
            if isinstance(tensor, ir.ExternalTensor):
                base = _plain_folder(tensor)
                if base is not None and folder in (None, base):
                    folder = base
                    continue
            if tensor.nbytes <= SMALL_TENSOR or not _can_feed(tensor) or _embeds(tensor, embedded):
                embedded += tensor.nbytes
                if isinstance(tensor, ir.ExternalTensor):
                    value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
                continue
            array = _array(tensor)
            fed[feed_constant(model, value)] = _feedable(array)
    return folder, total


def _embeds(tensor: ir.TensorProtocol, embedded: int) -> bool:
    return not isinstance(tensor, ir.ExternalTensor) and embedded + tensor.nbytes <= EMBED_BYTES


def _can_feed(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype != ir.DataType.STRING and tensor.dtype.bitwidth >= 8


def _plain_folder(tensor: ir.ExternalTensor) -> str | None:
    """The real folder that ONNX Runtime may read the tensor from; None when a link leads out of it."""
    base = os.path.realpath(tensor.base_dir or ".")
    file = os.path.realpath(os.path.join(base, tensor.location))
    return base if Path(file).is_relative_to(base) else None


def _array(tensor: ir.TensorProtocol) -> np.ndarray:
    """The tensor's array without a copy: external ones mapped afresh, so that the pages go with the session."""
    if not isinstance(tensor, ir.ExternalTensor):
        return np.ascontiguousarray(tensor.numpy())
    path = os.path.join(tensor.base_dir or ".", tensor.location)
    dtype = np.dtype(tensor.dtype.numpy())
    shape = tuple(tensor.shape.numpy())
    return np.memmap(path, np.uint8, "r", tensor.offset or 0, tensor.nbytes).view(dtype).reshape(shape)


def _nbytes(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    return int(np.prod(value.shape())) * 2  # bfloat16; float8 is overstated, which only makes the session frugal
