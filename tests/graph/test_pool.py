from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxq.graph.load import load
from onnxq.graph.pool import DataPool, digest_of
from onnxq.graph.save import StreamingWriter
from tests.graph import models

FEED = {"x": models.weight(3, 64)}


def test_digests_are_of_bytes_and_type() -> None:
    array = np.arange(8, dtype=np.uint8)
    assert digest_of(ir.tensor(array)) == digest_of(ir.tensor(array.reshape(2, 4)))
    assert digest_of(ir.tensor(array)) != digest_of(ir.tensor(array.view(np.int8)))
    assert digest_of(ir.tensor(array)) != digest_of(ir.tensor(array + 1))
    # Nibbles take half the bytes of what they are read as.
    nibbles = ir.Tensor(array, dtype=ir.DataType.UINT4)
    assert digest_of(ir.tensor(array)) != digest_of(nibbles)


def test_a_second_model_refers_to_the_first_ones_data(tmp_path: Path) -> None:
    source = models.save(models.mlp(64, 128), tmp_path / "source.onnx")
    expected = models.run(source, FEED)
    out, pool, sizes = tmp_path / "out", DataPool(), []
    out.mkdir()
    for name in ("a.onnx", "b.onnx"):
        loaded = load(source)
        with StreamingWriter(out / name, source=loaded, pool=pool) as writer:
            value = loaded.model.graph.initializers["layers.0.fc2.weight"]
            value.const_value = writer.append("layers.0.fc2.weight", value.const_value.numpy())  # type: ignore[union-attr]
            sizes.append(writer.finish(loaded.model).bytes)
        np.testing.assert_array_equal(models.run(out / name, FEED), expected)
    assert sizes[1] < sizes[0] / 5
    assert sorted(path.name for path in out.iterdir()) == ["a.onnx", "a.onnx.data", "b.onnx"]


def test_what_was_not_published_is_not_referred_to(tmp_path: Path) -> None:
    loaded, pool = load(models.save(models.mlp(64, 128), tmp_path / "source.onnx")), DataPool()
    with StreamingWriter(tmp_path / "a.onnx", pool=pool) as writer:
        writer.prepare(loaded.model)
    with StreamingWriter(tmp_path / "b.onnx", pool=pool) as writer:
        writer.finish(load(tmp_path / "source.onnx").model)
    assert (tmp_path / "b.onnx.data").stat().st_size > 64 * 128 * 4
    models.run(tmp_path / "b.onnx", FEED)
