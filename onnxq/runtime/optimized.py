"""The graph that ONNX Runtime really runs: written out by the session itself and read back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort

from onnxq.errors import ModelError
from onnxq.graph.load import find_model_file
from onnxq.runtime.session import session_options

_EXTERNAL_FILE = "session.optimized_model_external_initializers_file_name"
_EXTERNAL_MIN_SIZE = "session.optimized_model_external_initializers_min_size_in_bytes"
_INLINE_BYTES = 256


def read_graph(path: str | Path) -> ir.Model:
    """A model's graph; tensors outside the file are named, not read.

    Unlike `onnxq.graph.load.load` it takes any model: any opset, quantised or not.

    Raises:
        ModelError: no such file, or it does not parse.
    """
    file = find_model_file(Path(path))
    try:
        return ir.load(file)
    except Exception as error:  # protobuf, onnx and onnx-ir each have their own
        raise ModelError(f"{file} can't be read as an ONNX model: {error}. Export or copy it again.") from error


def optimized_graph(
    path: Path, *, library: bool, threads: int | None = None, config: Mapping[str, str] | None = None
) -> ir.Model:
    """What ONNX Runtime makes of a model when a session opens it.

    Weights go to a temporary file beside the written graph (so that models above 2 GB work), which is gone
    afterwards: initializers of the result have types and shapes but no readable data.

    Args:
        path: the .onnx file.
        library: register the kernel library.
        threads: of the session.
        config: further session config entries.

    Raises:
        ModelError: ONNX Runtime does not open the model.
        LibraryError: the library was asked for and is missing or refused.
    """
    with tempfile.TemporaryDirectory(prefix="onnxq-doctor-") as folder:
        written = Path(folder) / "optimized.onnx"
        extra = {_EXTERNAL_FILE: "optimized.data", _EXTERNAL_MIN_SIZE: str(_INLINE_BYTES), **(config or {})}
        options = session_options(library=library, threads=threads, config=extra)
        options.log_severity_level = 4  # what fails comes as an exception; the log would repeat it
        options.optimized_model_filepath = str(written)
        try:
            ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise ModelError(str(error)) from error
        proto = onnx.ModelProto()
        proto.ParseFromString(written.read_bytes())
        return ir.from_proto(proto)


def nodes_of(model: ir.Model) -> Iterator[ir.Node]:
    """Every node of the main graph and its subgraphs."""
    yield from ir.traversal.RecursiveGraphIterator(model.graph)


def initializer(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The stored tensor behind a value: an initializer, or what a Constant node holds; else None."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant" and "value" in producer.attributes:
        return producer.attributes["value"].as_tensor()
    return None


def stored_behind(value: ir.Value | None, depth: int = 32) -> list[ir.Value]:
    """The stored constants that alone determine a value; empty when anything else does, such as an input."""
    if value is None or depth == 0:
        return []
    if initializer(value) is not None:
        return [value]
    producer = value.producer()
    if producer is None or not producer.inputs:
        return []
    found: dict[ir.Value, None] = {}
    for source in producer.inputs:
        if source is None:
            continue
        behind = stored_behind(source, depth - 1)
        if not behind:
            return []
        found.update(dict.fromkeys(behind))
    return list(found)
