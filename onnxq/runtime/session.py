"""ONNX Runtime sessions with the kernel library registered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnxruntime as ort

from onnxq.errors import LibraryError, ModelError
from onnxq.runtime.library import library_path


def session_options(
    *,
    library: bool = True,
    threads: int | None = None,
    config: Mapping[str, str] | None = None,
) -> ort.SessionOptions:
    """Session options for code that opens the session itself, such as optimum's ``ORTModel...``.

    Args:
        library: register the kernel library; False leaves the models to their function bodies.
        threads: threads inside one operator; None leaves the choice to ONNX Runtime.
        config: session config entries, such as ``{"session.qdq_matmulnbits_accuracy_level": "1"}``.

    Raises:
        LibraryError: the library is missing, or this ONNX Runtime refuses it.
    """
    options = ort.SessionOptions()
    # Folding a function body prints a warning per weight; errors still come through as exceptions.
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    if library:
        path = library_path()
        try:
            options.register_custom_ops_library(str(path))
        except Exception as error:  # ONNX Runtime raises bare RuntimeErrors of its own types here
            raise LibraryError(
                f"ONNX Runtime {ort.__version__} does not load {path}: {error}. onnxq needs ONNX Runtime 1.17 or "
                "newer; `onnxq doctor` says more."
            ) from error
    return options


def session(
    path: str | Path,
    *,
    library: bool = True,
    threads: int | None = None,
    config: Mapping[str, str] | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> ort.InferenceSession:
    """Opens a model, with our kernels where it has nodes for them.

    Args:
        path: the ``.onnx`` file; weights beside it stay memory-mapped.
        library, threads, config: see `session_options`.
        providers: ONNX Runtime execution providers, best first.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        LibraryError: see `session_options`.
        ModelError: the file is missing, or ONNX Runtime refuses the model.
    """
    if not Path(path).is_file():
        raise ModelError(f"{path} is no file. Name the .onnx file of a model.")
    options = session_options(library=library, threads=threads, config=config)
    try:
        return ort.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        raise ModelError(f"ONNX Runtime {ort.__version__} does not open {path}: {error}") from error
