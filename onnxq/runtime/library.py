"""Where the kernel library is, and what it says of itself."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

from onnxq.errors import LibraryError

LIBRARY_VARIABLE = "ONNXQ_LIBRARY"
"""Environment variable that names another library file than the one inside the package."""

_FILE_NAMES = {"win32": "onnxq_ops.dll", "darwin": "libonnxq_ops.dylib"}


def library_path() -> Path:
    """The kernel library's file, for `SessionOptions.register_custom_ops_library` of any language.

    Raises:
        LibraryError: there is none, or ``ONNXQ_LIBRARY`` names a file that does not exist.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise LibraryError(f"{LIBRARY_VARIABLE} names {named}, which is no file. Mend or unset the variable.")
        return Path(named).resolve()
    import onnxq  # a package in editable form has two folders: the sources and what was built

    name = _FILE_NAMES.get(sys.platform, "libonnxq_ops.so")
    places = [Path(folder) / "lib" / name for folder in onnxq.__path__]
    for path in places:
        if path.is_file():
            return path
    raise LibraryError(
        f"The kernel library is not at {places[0]}: this copy of onnxq was not built. Install it with "
        "`pip install .` (it compiles custom_ops/), or name a library file in the environment variable "
        f"{LIBRARY_VARIABLE}. Models run without it too, on stock ONNX Runtime: "
        "`onnxq.session(path, library=False)`."
    )


def describe_library() -> dict[str, Any]:
    """What the library says: its version, the instruction set it chose and why, the ones it could choose.

    Raises:
        LibraryError: the library is missing or does not load.
    """
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
        describe = library.OnnxqDescribe
    except (OSError, AttributeError) as error:
        raise LibraryError(
            f"{path} does not load as the onnxq kernel library: {error}. Reinstall onnxq on this machine."
        ) from error
    describe.restype = ctypes.c_char_p
    described: dict[str, Any] = json.loads(describe().decode())
    return {"path": str(path), **described}
