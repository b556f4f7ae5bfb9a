"""What users import, pinned."""

from __future__ import annotations

import subprocess
import sys

import pytest

import onnxq


def test_every_public_name_is_there() -> None:
    assert onnxq.__all__ == dir(onnxq)
    for name in onnxq.__all__:
        assert getattr(onnxq, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = onnxq.quantise


def test_opening_a_session_needs_no_graph_tools() -> None:
    code = (
        "import sys, onnxq; onnxq.session, onnxq.library_path; "
        "print([m for m in sys.modules if m in ('onnx_ir', 'torch', 'onnxscript')])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_names_resolve_to_their_own_modules() -> None:
    import onnxq.runtime.session

    # `onnxq.runtime.session` is a module and `onnxq.session` the function in it.
    assert callable(onnxq.session)
