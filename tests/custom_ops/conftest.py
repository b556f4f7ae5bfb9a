from __future__ import annotations

from pathlib import Path

import pytest

from onnxq.runtime.library import library_path


@pytest.fixture(scope="session")
def library() -> Path:
    """The built kernel library; ONNXQ_LIBRARY names one outside the package."""
    return Path(library_path())
