from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxq.calibration import SequentialCalibration, TapRequest, group_blocks, model_inputs, open_data
from onnxq.calibration.sequential import layer_of
from tests.calibration.models import HEADER, K, Loaded, assert_moments, parse, tap, value, weight


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("/bert/encoder/layer.3/attention/self/query/MatMul", "/bert/encoder/layer.3"),
        ("/model/decoder/layers.11/fc1/MatMul", "/model/decoder/layers.11"),
        ("transformer.h.0.mlp", "transformer.h.0"),
        ("/vit/blocks.2/MatMul", "/vit/blocks.2"),
        ("h.1", "h.1"),
        ("/lm_head/MatMul", None),
        ("/model/graph.3/MatMul", None),
    ],
)
def test_layer_of(name: str, layer: str | None) -> None:
    assert layer_of(name) == layer


def chain() -> Loaded:
    return parse(
        HEADER
        + """m (float[B, 6] x) => (float[B, 6] y) {
            e = MatMul (x, w0)
            a = Relu (e)
            b = MatMul (a, w1)
            c = Relu (b)
            d = MatMul (c, w2)
            f = Relu (d)
            y = MatMul (f, w3)
        }""",
        **{f"w{i}": weight(f"w{i}", K, K) for i in range(4)},
    )


def test_blocks_follow_layers_and_topology() -> None:
    loaded = chain()
    names = {"x": "/embed/MatMul", "a": "/layer.0/q", "c": "/layer.1/q", "f": "/head/MatMul"}
    requests = [TapRequest(site, value(loaded, name)) for name, site in reversed(names.items())]
    requests.append(TapRequest("/layer.0/k", value(loaded, "a")))
    requests.append(TapRequest("/layer.0/skipped", value(loaded, "a"), "none"))
    blocks = group_blocks(loaded.model, requests)
    assert [b.name for b in blocks] == ["/embed/MatMul", "/layer.0", "/layer.1", "/head/MatMul"]
    assert [r.site_name for r in blocks[1].requests] == ["/layer.0/q", "/layer.0/k"]


def test_without_layer_names_each_distinct_input_is_a_block() -> None:
    loaded = chain()
    requests = [tap(loaded, "f"), tap(loaded, "a"), TapRequest("second", value(loaded, "a"))]
    assert [len(b.requests) for b in group_blocks(loaded.model, requests)] == [2, 1]


@pytest.mark.parametrize("spill_bytes", [0, 1 << 20])
def test_each_block_sees_the_replaced_weights_before_it(
    spill_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    loaded = chain()
    x = np.random.default_rng(0).standard_normal((40, K)).astype(np.float32)
    data = open_data([{"x": x}], model_inputs(loaded.model))
    requests = [tap(loaded, name) for name in ("x", "a", "c")]
    rounded = [np.round(weight(f"w{i}", K, K)) for i in range(3)]
    rows = [x, np.maximum(x @ rounded[0], 0)]
    rows.append(np.maximum(rows[1] @ rounded[1], 0))
    with SequentialCalibration(loaded, requests, data, spill_bytes=spill_bytes) as sequence:
        for number, (block, collected) in enumerate(sequence):
            assert_moments(collected.site(block.requests[0].site_name), rows[number])
            sequence.replace(f"w{number}", rounded[number])
        assert number == 2
        assert any(tmp_path.iterdir()) is (spill_bytes == 0)
    assert not any(tmp_path.iterdir())
