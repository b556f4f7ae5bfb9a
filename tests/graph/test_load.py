from __future__ import annotations

import os
import resource
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from onnxq.errors import ModelError
from onnxq.graph import check_finite, find_weights, load, read_array
from onnxq.graph.load import all_tensors
from tests.graph import models

PEAK_OF_LOAD = 64 << 20  # bytes that loading a model with a 3 GB data file may add


@pytest.fixture
def external(tmp_path: Path) -> Path:
    return models.save(models.mlp(), tmp_path / "model.onnx", external=True)


def _edit_external(path: Path, **entries: str) -> None:
    """Rewrite the external-data entries of the first initializer."""
    proto = onnx.load(path, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key in entries:
            entry.value = entries[entry.key]
    path.write_bytes(proto.SerializeToString())


def test_inline_model(tmp_path: Path) -> None:
    path = models.save(models.mlp(), tmp_path / "model.onnx")
    loaded = load(path)
    assert loaded.path == path
    assert loaded.opset == models.OPSET
    assert loaded.bytes_on_disk == path.stat().st_size
    assert loaded.external_files == ()
    assert len(loaded.model.graph) == 4


def test_external_model(external: Path) -> None:
    loaded = load(external)
    data = external.with_name("model.onnx.data")
    assert loaded.external_files == (data,)
    assert loaded.bytes_on_disk == external.stat().st_size + data.stat().st_size
    tensor = loaded.model.graph.initializers["onnx::MatMul_7"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    np.testing.assert_array_equal(read_array(tensor), models.weight(8, 16, seed=1))
    assert tensor.raw is None  # no map of the whole file stays open


def test_relative_path(external: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(external.parent)
    tensor = next(all_tensors(load("model.onnx").model))
    monkeypatch.chdir("/")
    assert read_array(tensor).shape == (8, 16)


def test_long_name_of_the_standard_domain(tmp_path: Path) -> None:
    proto = models.mlp()
    proto.opset_import[0].domain = "ai.onnx"
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    assert load(path).opset == models.OPSET


def test_folder_with_one_model(external: Path) -> None:
    assert load(external.parent).path == external


def test_missing_file_names_what_is_there(external: Path) -> None:
    with pytest.raises(ModelError, match=r"no file .*modle\.onnx.*model\.onnx"):
        load(external.parent / "modle.onnx")


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no \.onnx file"):
        load(tmp_path)


def test_folder_with_two_models(external: Path) -> None:
    models.save(models.mlp(), external.parent / "other.onnx")
    with pytest.raises(ModelError, match=r"2 \.onnx files \(model\.onnx, other\.onnx\)"):
        load(external.parent)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"import torch\n" * 40, "not an ONNX file"),
        (b"<!DOCTYPE html><html>", "not an ONNX file"),
        (bytes(range(256)), "not an ONNX file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (b"\x08\x0a", "holds no graph"),
    ],
)
def test_what_is_not_a_model(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=says):
        load(path)


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.99])
def test_truncated_protobuf(tmp_path: Path, kept: float) -> None:
    whole = models.mlp().SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ModelError, match=r"cut short: its field 'graph' needs \d+ bytes and \d+ are there"):
        load(path)


def test_damage_inside(tmp_path: Path) -> None:
    whole = bytearray(models.mlp().SerializeToString())
    at = whole.index(b"/layers.0/fc1/MatMul") - 1  # the length of the node's name
    whole[at] = 0xFF
    path = tmp_path / "m.onnx"
    path.write_bytes(whole)
    with pytest.raises(ModelError, match=r"can't be read|not a valid"):
        load(path)


def test_no_nodes(tmp_path: Path) -> None:
    path = models.save(models.model([], [models.floats("x", [1])], [models.floats("x", [1])]), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="without nodes"):
        load(path)


def test_dangling_input(tmp_path: Path) -> None:
    proto = models.model(
        [models.node("Add", "x nowhere", "y", "add")], [models.floats("x", [1])], [models.floats("y", [1])]
    )
    with pytest.raises(ModelError, match=r"'add' .*reads 'nowhere', which nothing produces"):
        load(models.save(proto, tmp_path / "m.onnx"))


def test_old_opset(tmp_path: Path) -> None:
    proto = models.mlp()
    proto.opset_import[0].version = 12
    with pytest.raises(ModelError, match=r"operator set 12.*--opset 21.*version_converter"):
        load(models.save(proto, tmp_path / "m.onnx"))


def test_already_quantised(tmp_path: Path) -> None:
    nodes = [models.node("LowBitMatMul", "x w", "y", "fc", "onnxq")]
    proto = models.model(
        nodes,
        [models.floats("x", [1, 2])],
        [models.floats("y", [1, 2])],
        {"w": models.weight(2, 2)},
        domains=["onnxq"],
    )
    with pytest.raises(ModelError, match=r"already quantised by onnxq.*'fc'"):
        load(models.save(proto, tmp_path / "m.onnx"))


def test_sparse_initializer_is_not_dropped(tmp_path: Path) -> None:
    proto = models.mlp()
    values = helper.make_tensor("sparse_w", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))
    with pytest.raises(ModelError, match="'sparse_w' as a sparse initializer"):
        load(models.save(proto, tmp_path / "m.onnx"))


def test_missing_external_data(external: Path) -> None:
    external.with_name("model.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"'onnx::MatMul_7' is missing: there is no file .*model\.onnx\.data"):
        load(external)


def test_short_external_data(external: Path) -> None:
    data = external.with_name("model.onnx.data")
    os.truncate(data, data.stat().st_size - 1)
    with pytest.raises(ModelError, match=r"needs 16 bytes at offset \d+ of .*, which has \d+ bytes"):
        load(external)


def test_external_data_is_a_git_lfs_pointer(external: Path) -> None:
    external.with_name("model.onnx.data").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        load(external)


def test_external_length_that_disagrees_with_the_shape(external: Path) -> None:
    _edit_external(external, length="100")
    with pytest.raises(ModelError, match=r"needs 512 bytes, but its entry gives it 100"):
        load(external)


@pytest.mark.parametrize(
    ("location", "says"),
    [
        ("/etc/hostname", "absolute path"),
        ("C:\\secret.bin", "absolute path"),
        ("../outside.data", "leaves the model's folder"),
        ("sub/../../outside.data", "leaves the model's folder"),
        ("link.data", "link out of the model's folder"),
        (".", "is missing"),
    ],
)
def test_external_data_outside_the_folder(tmp_path: Path, location: str, says: str) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside.data").write_bytes(bytes(4096))
    (tmp_path / "inside" / "link.data").symlink_to(tmp_path / "outside.data")
    path = models.save(models.mlp(), tmp_path / "inside" / "model.onnx", external=True)
    _edit_external(path, location=location)
    with pytest.raises(ModelError, match=says):
        load(path)


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    source = models.save(models.mlp(), tmp_path / "blobs" / "model.onnx", external=True)
    for name, blob in (("model.onnx", "aaaa"), ("model.onnx.data", "bbbb")):
        (tmp_path / "blobs" / name).rename(tmp_path / "blobs" / blob)
        (tmp_path / "snapshots" / name).symlink_to(tmp_path / "blobs" / blob)
    loaded = load(tmp_path / "snapshots" / source.name)
    np.testing.assert_array_equal(find_weights(loaded.model).weights[0].matrix(), models.weight(8, 16, seed=1).T)


def test_hard_linked_data_is_read(external: Path, tmp_path: Path) -> None:
    os.link(external.with_name("model.onnx.data"), tmp_path / "second_name")
    assert find_weights(load(external).model).weights[0].matrix().shape == (16, 8)


def test_external_constant_in_a_function(tmp_path: Path) -> None:
    path = models.save(models.function_body(), tmp_path / "m.onnx")
    proto = onnx.load(path)
    tensor = proto.functions[0].node[0].attribute[0].t
    (tmp_path / "w.data").write_bytes(tensor.raw_data)
    onnx.external_data_helper.set_external_data(tensor, "w.data", 0, len(tensor.raw_data))
    tensor.ClearField("raw_data")
    path.write_bytes(proto.SerializeToString())
    loaded = load(path)
    assert loaded.external_files == (tmp_path / "w.data",)
    np.testing.assert_array_equal(find_weights(loaded.model).weights[0].matrix(), models.weight(8, 8, seed=9).T)


def test_three_gigabytes_are_not_read(tmp_path: Path) -> None:
    rows, width = 300_000, 2560
    proto = models.model(
        [models.node("Gather", "table ids", "y", "embed")],
        [models.integers("ids", ["n"])],
        [models.floats("y", ["n", width])],
    )
    table = proto.graph.initializer.add(name="table", data_type=TensorProto.FLOAT, dims=[rows, width])
    table.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "big.data", "offset": "4096", "length": str(rows * width * 4)}.items():
        table.external_data.add(key=key, value=value)
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    with open(tmp_path / "big.data", "wb") as file:
        file.truncate(4096 + rows * width * 4)
        file.seek(4096 + (rows - 1) * width * 4)
        file.write(np.arange(width, dtype=np.float32).tobytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    loaded = load(path)
    (weight,) = find_weights(loaded.model).weights
    last = weight.rows(rows - 1, rows)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert loaded.bytes_on_disk > 3 * 10**9
    assert (weight.n, weight.k, weight.bytes) == (rows, width, rows * width * 4)
    np.testing.assert_array_equal(last, np.arange(width, dtype=np.float32)[None])
    assert after - before < PEAK_OF_LOAD


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_check_finite(bad: float, dtype: type) -> None:
    array: np.ndarray = models.weight(4, 6).astype(dtype)
    check_finite(array, "fine")
    array[2, 3] = bad
    with pytest.raises(ModelError, match=r"'fc' \[4, 6\] holds 1 elements .* first at \[2, 3\]"):
        check_finite(array, "fc")


def test_a_weight_with_nan_is_refused_when_read() -> None:
    proto = models.mlp()
    broken = models.weight(8, 16)
    broken[0, 5] = np.nan
    proto.graph.initializer[0].raw_data = broken.tobytes()
    weight = find_weights(models.as_ir(proto)).weights[0]
    with pytest.raises(ModelError, match=r"'layers\.0\.fc1' \[16, 8\] .* first at \[5, 0\]"):
        weight.matrix()
