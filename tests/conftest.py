"""What tests of several rooms ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxq.runtime.library import library_path


@pytest.fixture(scope="session")
def library() -> Path:
    """The kernel library. `make test` has built it, so a test without it fails."""
    return library_path()
