"""Sessions for evaluation: given, or opened from a path with our kernel library where it is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnxruntime as ort

from onnxq.errors import LibraryError, ModelError
from onnxq.runtime.library import library_path
from onnxq.runtime.session import session

Feeds: TypeAlias = Mapping[str, np.ndarray]
"""Input arrays by name, all with the same number of samples along axis 0."""

Model: TypeAlias = str | Path | ort.InferenceSession


def library_available() -> bool:
    """Whether the kernel library is there to be registered.

    Without it our operators run as the standard ones they stand for.
    """
    try:
        library_path()
    except LibraryError:
        return False
    return True


def as_session(model: Model, *, threads: int | None = None, library: bool | None = None) -> ort.InferenceSession:
    """A session on the CPU.

    Args:
        model: A session, which is returned as it is, or the path of an `.onnx` file.
        threads: Of one operator; None lets ONNX Runtime choose.
        library: Whether to register the kernel library; None does where it is there (`library_available`).

    Raises:
        ModelError: No such file, or ONNX Runtime refuses it.
    """
    if isinstance(model, ort.InferenceSession):
        return model
    path = Path(model)
    if not path.is_file():
        raise ModelError(f"{path} is not a file: give the path of an .onnx file")
    return session(path, library=library_available() if library is None else library, threads=threads)


def run(model: ort.InferenceSession, feeds: Feeds) -> dict[str, np.ndarray]:
    """All outputs by name. Feeds that the model has no input for are left out.

    Raises:
        ModelError: An input of the model is not fed.
    """
    inputs = [i.name for i in model.get_inputs()]
    missing = [name for name in inputs if name not in feeds]
    if missing:
        raise ModelError(f"the data lacks the model's inputs {', '.join(missing)}; it has {', '.join(feeds)}")
    names = [output.name for output in model.get_outputs()]
    return dict(zip(names, model.run(names, {name: feeds[name] for name in inputs}), strict=True))
