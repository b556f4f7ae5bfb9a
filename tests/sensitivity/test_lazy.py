from __future__ import annotations

import subprocess
import sys

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from onnxq.errors import ModelError
from onnxq.sensitivity import measure
try:
    measure(None, [], None)
except ModelError as error:
    assert "pip install 'onnxq[export]'" in str(error), error
else:
    raise SystemExit("no error")
"""


def test_torch_is_asked_for_when_it_is_needed() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH], check=True)
