from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped]
import pytest

from onnxq.errors import ModelError, OnnxqError, OutputExistsError
from onnxq.graph import StreamingWriter, load, read_array
from onnxq.graph import save as save_module
from onnxq.graph.load import all_tensors
from onnxq.graph.save import ALIGNMENT, INLINE_BYTES
from onnxq.graph.tensors import COPY_CHUNK
from tests.graph import models
from tests.graph.models import constant, floats, node, weight

ROUND_TRIP_FEED = {"x": weight(3, 32, seed=11)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return models.save(models.mlp(32, 64), tmp_path / "in" / "model.onnx", external=True)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "small.onnx"


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _external(path: Path) -> dict[str, dict[str, str]]:
    proto = onnx.load(path, load_external_data=False)
    return {t.name: {e.key: e.value for e in t.external_data} for t in proto.graph.initializer if t.external_data}


@pytest.mark.parametrize("external", [True, False])
def test_round_trip(tmp_path: Path, out: Path, external: bool) -> None:
    source = models.save(models.mlp(32, 64), tmp_path / "model.onnx", external=external)
    loaded = load(source)
    with StreamingWriter(out, source=loaded) as writer:
        saved = writer.finish(loaded.model)
    data = out.with_name("small.onnx.data")
    assert (saved.path, saved.data_path) == (out, data)
    assert saved.bytes == out.stat().st_size + data.stat().st_size
    assert sorted(_files(out.parent)) == ["small.onnx", "small.onnx.data"]
    entries = _external(out)
    # fc1 is 8 KB and fc2 exactly 1 KB; the biases are smaller.
    assert set(entries) == {"onnx::MatMul_7"}
    assert entries["onnx::MatMul_7"] == {"location": "small.onnx.data", "offset": "0", "length": "8192"}
    for given, returned in zip(models.run(source, ROUND_TRIP_FEED), models.run(out, ROUND_TRIP_FEED), strict=True):
        np.testing.assert_array_equal(given, returned)
    again = load(out)
    for before, after in zip(all_tensors(loaded.model), all_tensors(again.model), strict=True):
        np.testing.assert_array_equal(read_array(before), read_array(after))


def test_the_model_keeps_its_tensors(source: Path, out: Path) -> None:
    loaded = load(source)
    before = [(id(t), t.name) for t in all_tensors(loaded.model)]
    with StreamingWriter(out) as writer:
        writer.finish(loaded.model)
    assert [(id(t), t.name) for t in all_tensors(loaded.model)] == before
    assert str(next(all_tensors(loaded.model)).path) == str(source) + ".data"  # type: ignore[attr-defined]


def test_appended_tensors(source: Path, out: Path) -> None:
    loaded = load(source)
    value = loaded.model.graph.initializers["onnx::MatMul_7"]
    new = weight(32, 64, seed=20)
    with StreamingWriter(out, source=loaded) as writer:
        small = writer.append("small", np.arange(4, dtype=np.uint8))
        odd = writer.append("odd", np.ones(INLINE_BYTES + 1, np.uint8))
        reference = writer.append("w", new)
        np.testing.assert_array_equal(read_array(reference), new)  # readable before the model is finished
        assert writer.bytes_written == ALIGNMENT * 17 + new.nbytes
        value.const_value = reference
        writer.finish(loaded.model)
    assert isinstance(small, ir.Tensor)
    assert isinstance(odd, ir.ExternalTensor)
    assert isinstance(reference, ir.ExternalTensor)
    assert (odd.offset, odd.length) == (0, 1025)
    assert reference.offset == ALIGNMENT * 17
    np.testing.assert_array_equal(read_array(reference), new)  # and after
    x = ROUND_TRIP_FEED["x"]
    graph = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    np.testing.assert_array_equal(graph["onnx::MatMul_7"], new)
    hidden = np.maximum(x @ new + graph["layers.0.fc1.bias"], 0)
    expected = hidden @ graph["layers.0.fc2.weight"].T + graph["layers.0.fc2.bias"]
    np.testing.assert_allclose(models.run(out, {"x": x})[0], expected, atol=1e-4)


def test_appended_buffers_may_be_reused(out: Path) -> None:
    buffer = np.zeros(8, np.float32)
    with StreamingWriter(out) as writer:
        first = writer.append("a", buffer)
        buffer[:] = 1
        second = writer.append("b", buffer)
    assert (first.numpy().sum(), second.numpy().sum()) == (0, 8)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int64, ml_dtypes.float8_e4m3fn, ml_dtypes.int4])
def test_element_types(out: Path, dtype: type) -> None:
    array: np.ndarray = (np.arange(6000).reshape(60, 100) % 7).astype(dtype).T
    model = ir.from_proto(models.mlp())
    value = model.graph.initializers["onnx::MatMul_7"]
    with StreamingWriter(out) as writer:
        value.const_value = writer.append("w", array)
        writer.finish(model)
    tensor = load(out).model.graph.initializers["onnx::MatMul_7"].const_value
    assert tensor is not None
    assert tensor.dtype == ir.DataType.from_numpy(np.dtype(dtype))
    np.testing.assert_array_equal(read_array(tensor).astype(np.float32), array.astype(np.float32))


def test_shared_bytes_are_written_once(tmp_path: Path, out: Path) -> None:
    proto = models.mlp(32, 64)
    source = models.save(proto, tmp_path / "model.onnx", external=True)
    proto = onnx.load(source, load_external_data=False)
    alias = proto.graph.initializer.add()
    alias.CopyFrom(proto.graph.initializer[0])
    alias.name = "alias"
    proto.graph.node.append(node("MatMul", "x alias", "z", "second"))
    proto.graph.output.append(floats("z", ["b", 64]))
    source.write_bytes(proto.SerializeToString())
    model = load(source).model
    shared = ir.tensor(weight(40, 40), name="mine")
    for name in ("m1", "m2"):
        model.graph.register_initializer(ir.Value(name=name, const_value=shared))
    with StreamingWriter(out) as writer:
        saved = writer.finish(model)
    entries = _external(out)
    assert entries["alias"] == entries["onnx::MatMul_7"]
    assert entries["m1"] == entries["m2"]
    assert saved.data_path is not None
    assert saved.data_path.stat().st_size == 32 * 64 * 4 + 40 * 40 * 4
    assert shared.name == "mine"


def test_every_external_tensor_is_aligned(tmp_path: Path, out: Path) -> None:
    sizes = [1025, 1500, 2049, 4097]
    arrays = {f"w{i}": np.full(size, i, np.uint8) for i, size in enumerate(sizes)}
    model = ir.from_proto(models.model([node("Relu", "x", "y")], [floats("x", [1])], [floats("y", [1])], arrays))
    with StreamingWriter(out) as writer:
        writer.finish(model)
    entries = _external(out)
    assert all(int(entry["offset"]) % ALIGNMENT == 0 for entry in entries.values())
    assert {name: int(entry["length"]) for name, entry in entries.items()} == dict(zip(arrays, sizes, strict=True))
    data = out.with_name("small.onnx.data").read_bytes()
    for i, entry in enumerate(entries.values()):
        offset, length = int(entry["offset"]), int(entry["length"])
        assert data[offset : offset + length] == bytes([i]) * length


def test_subgraphs(tmp_path: Path, out: Path) -> None:
    proto = models.loop(32)
    source = models.save(proto, tmp_path / "m.onnx")
    with StreamingWriter(out) as writer:
        writer.finish(load(source).model)
    feed = {"x": weight(2, 32, seed=3)}
    np.testing.assert_array_equal(models.run(out, feed)[0], models.run(proto, feed)[0])
    body = onnx.load(out, load_external_data=False).graph.node[0].attribute[0].g
    assert body.initializer[0].data_location == onnx.TensorProto.EXTERNAL


def test_external_constants_in_nodes_move_too(tmp_path: Path, out: Path) -> None:
    proto = models.model(
        [
            constant("w", weight(32, 32)),
            constant("b", weight(32)),
            node("MatMul", "x w", "h"),
            node("Add", "h b", "y"),
        ],
        [floats("x", [2, 32])],
        [floats("y", [2, 32])],
    )
    expected = models.run(proto, {"x": weight(2, 32, seed=1)})[0]
    data, offset = b"", 0
    for made in proto.graph.node[:2]:
        tensor = made.attribute[0].t
        data += tensor.raw_data
        onnx.external_data_helper.set_external_data(tensor, "consts.data", offset, len(tensor.raw_data))
        tensor.ClearField("raw_data")
        offset = len(data)
    source = tmp_path / "m.onnx"
    source.write_bytes(proto.SerializeToString())
    (tmp_path / "consts.data").write_bytes(data)
    model = load(source).model
    with StreamingWriter(out) as writer:
        writer.finish(model)
    (tmp_path / "consts.data").unlink()
    tensors = list(all_tensors(load(out).model))
    np.testing.assert_array_equal(read_array(tensors[0]), weight(32, 32))
    np.testing.assert_array_equal(read_array(tensors[1]), weight(32))
    assert [isinstance(t, ir.ExternalTensor) for t in tensors] == [True, False]
    np.testing.assert_allclose(models.run(out, {"x": weight(2, 32, seed=1)})[0], expected, rtol=1e-6)


def test_all_small_makes_one_file_and_removes_the_old_data(out: Path) -> None:
    out.write_bytes(b"old")
    out.with_name("small.onnx.data").write_bytes(b"old data")
    with StreamingWriter(out, force=True) as writer:
        saved = writer.finish(ir.from_proto(models.mlp()))
    assert saved.data_path is None
    assert saved.bytes == out.stat().st_size
    assert sorted(_files(out.parent)) == ["small.onnx"]
    assert models.run(out, {"x": weight(2, 8)})[0].shape == (2, 4)


@pytest.mark.parametrize("taken", ["small.onnx", "small.onnx.data"])
def test_an_existing_output_is_refused_up_front(out: Path, taken: str) -> None:
    out.with_name(taken).write_bytes(b"old")
    with pytest.raises(OutputExistsError, match=rf"{taken} exists already.*--force"):
        StreamingWriter(out)
    assert _files(out.parent) == {taken: b"old"}


def test_force_replaces(source: Path, out: Path) -> None:
    out.write_bytes(b"old")
    out.with_name("small.onnx.data").write_bytes(b"old data")
    with StreamingWriter(out, force=True) as writer:
        writer.finish(load(source).model)
    np.testing.assert_array_equal(models.run(out, ROUND_TRIP_FEED)[0], models.run(source, ROUND_TRIP_FEED)[0])
    assert sorted(_files(out.parent)) == ["small.onnx", "small.onnx.data"]


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OnnxqError, match="does not exist"):
        StreamingWriter(tmp_path / "nowhere" / "m.onnx")


def test_a_folder_as_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OnnxqError, match="is a folder"):
        StreamingWriter(tmp_path)


def test_the_source_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    before = _files(source.parent)
    loaded = load(source)
    with pytest.raises(OutputExistsError, match="belongs to the model being read"):
        StreamingWriter(source, force=True, source=loaded)
    (tmp_path / "link.onnx").symlink_to(source)
    with pytest.raises(OutputExistsError, match="belongs to the model being read"):
        StreamingWriter(tmp_path / "link.onnx", force=True, source=loaded)
    with pytest.raises(OutputExistsError, match="belongs to"), StreamingWriter(source, force=True) as writer:
        writer.finish(loaded.model)  # found by its tensors where no source was named
    assert _files(source.parent) == before


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError, ModelError])
@pytest.mark.parametrize("old", [False, True])
def test_nothing_is_left_of_a_run_that_stops(source: Path, out: Path, stop: type[BaseException], old: bool) -> None:
    if old:
        with StreamingWriter(out) as writer:
            writer.finish(ir.from_proto(models.mlp(32, 32)))
    before = _files(out.parent)

    def stopped_run() -> None:
        with StreamingWriter(out, force=True) as writer:
            writer.append("w", weight(64, 64))
            raise stop

    with pytest.raises(stop):
        stopped_run()
    assert _files(out.parent) == before


def test_a_source_that_vanishes_while_saving(source: Path, out: Path) -> None:
    model = load(source).model
    source.with_name("model.onnx.data").unlink()
    with pytest.raises(ModelError, match="is gone"), StreamingWriter(out) as writer:
        writer.finish(model)
    assert _files(out.parent) == {}


def test_a_source_that_shrinks_while_saving(source: Path, out: Path) -> None:
    model = load(source).model
    os.truncate(source.with_name("model.onnx.data"), 100)
    says = "ends 8092 bytes before the tensor 'onnx::MatMul_7' does"
    with pytest.raises(ModelError, match=says), StreamingWriter(out) as writer:
        writer.finish(model)
    assert _files(out.parent) == {}


@pytest.mark.parametrize(("failing", "old"), [(0, False), (1, False), (0, True), (1, True), (2, True)])
def test_a_rename_that_fails_leaves_the_old_pair(
    source: Path, out: Path, failing: int, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old:
        with StreamingWriter(out) as writer:
            writer.finish(ir.from_proto(models.mlp(32, 32)))
    before = _files(out.parent)
    calls = 0
    replace = os.replace

    def breaking(a: Path, b: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == failing + 1:
            raise OSError("disk full")
        replace(a, b)

    monkeypatch.setattr(save_module.os, "replace", breaking)
    with pytest.raises(OSError, match="disk full"), StreamingWriter(out, force=True) as writer:
        writer.finish(load(source).model)
    assert _files(out.parent) == before


def test_a_writer_ends_with_its_block(out: Path) -> None:
    with StreamingWriter(out) as writer:
        writer.finish(ir.from_proto(models.mlp()))
        with pytest.raises(RuntimeError, match="after finish"):
            writer.append("w", weight(2, 2))
    with StreamingWriter(out.with_name("never.onnx")):
        pass
    assert sorted(_files(out.parent)) == ["small.onnx"]


def test_progress_counts_to_the_total(source: Path, out: Path) -> None:
    seen: list[tuple[int, int]] = []
    with StreamingWriter(out) as writer:
        writer.finish(load(source).model, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(8192, 8192)]


def test_saving_needs_one_chunk_of_memory(tmp_path: Path, out: Path) -> None:
    array = weight(1500, 8192)  # 49 MB
    proto = models.model([node("MatMul", "x w", "y")], [floats("x", [1, 1500])], [floats("y", [1, 8192])], {"w": array})
    model = load(models.save(proto, tmp_path / "m.onnx", external=True)).model
    del proto
    tracemalloc.start()
    with StreamingWriter(out) as writer:
        writer.finish(model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * COPY_CHUNK
    x = weight(1, 1500, seed=2)
    np.testing.assert_allclose(models.run(out, {"x": x})[0], x @ array, atol=1e-3)


def test_onnxruntime_maps_the_data(out: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("reads the list of maps from /proc")
    table = weight(2000, 256)
    proto = models.model(
        [node("Gather", "t ids", "y")], [models.integers("ids", [2])], [floats("y", [2, 256])], {"t": table}
    )
    with StreamingWriter(out) as writer:
        writer.finish(ir.from_proto(proto))
    session = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert str(out) + ".data" in maps.read_text()
    np.testing.assert_array_equal(session.run(None, {"ids": np.array([3, 1999])})[0], table[[3, 1999]])


def test_reading_more_weights_than_there_are_file_descriptors(tmp_path: Path, out: Path) -> None:
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("counts open files through /proc")
    arrays = {f"w{i}": np.full(300, i, np.float32) for i in range(200)}
    nodes = [node("Relu", "x", "y")]
    proto = models.model(nodes, [floats("x", [1])], [floats("y", [1])], arrays)
    model = load(models.save(proto, tmp_path / "m.onnx", external=True)).model
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, limits[1]))
    try:
        total = sum(float(read_array(tensor).sum()) for tensor in all_tensors(model))
        with StreamingWriter(out) as writer:
            writer.finish(model)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert total == sum(range(200)) * 300
