"""The package asks for its extra by name, and nothing else asks for torch."""

from __future__ import annotations

import subprocess
import sys


def test_without_torch_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import onnxq, onnxq.pipeline\n"
        "from onnxq.errors import TrainingError\n"
        "try:\n    import onnxq.train\n"
        "except TrainingError as error:\n    print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "Retraining needs torch, which is not installed: pip install 'onnxq[export]'."
