"""What tests of several rooms ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxq.errors import LibraryError
from onnxq.runtime.library import library_path


@pytest.fixture(scope="session")
def library() -> Path:
    """The kernel library; tests that ask for it are skipped where it was not built."""
    try:
        return library_path()
    except LibraryError as error:
        pytest.skip(str(error))
