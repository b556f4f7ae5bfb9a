"""Open an ONNX model for quantisation: the graph in memory, external weights left on disk."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]

from onnxq.errors import ModelError

OLDEST_OPSET = 13
"""From opset 13 on, the axes of Squeeze and Unsqueeze are inputs and initializers are not graph inputs."""

OWN_DOMAIN = "onnxq"

_PROTOBUF_LIMIT = 2**31 - 1
_LFS_POINTER = b"version https://git-lfs"

# ModelProto fields: number -> wire type (0 varint, 2 length-delimited) and name, from onnx.proto.
_MODEL_FIELDS = {
    1: (0, "ir_version"),
    2: (2, "producer_name"),
    3: (2, "producer_version"),
    4: (2, "domain"),
    5: (0, "model_version"),
    6: (2, "doc_string"),
    7: (2, "graph"),
    8: (2, "opset_import"),
    14: (2, "metadata_props"),
    20: (2, "training_info"),
    25: (2, "functions"),
    26: (2, "configuration"),
}


@dataclass(frozen=True)
class LoadedModel:
    """A model as it was opened.

    Attributes:
        model: the graph; external tensors carry the model's folder as ``base_dir`` and are not read.
        path: the absolute path of the .onnx file.
        opset: the version of the standard operator set.
        bytes_on_disk: the .onnx file and every data file it names, whole.
        external_files: absolute paths of the data files, in the order of first use.
    """

    model: ir.Model
    path: Path
    opset: int
    bytes_on_disk: int
    external_files: tuple[Path, ...]


def load(path: str | os.PathLike[str]) -> LoadedModel:
    """Open a model and check all that would otherwise fail half-way through a run.

    No external data is read: their files are only measured. Weights stored inside the .onnx file (2 GB at
    most) are held in memory once.

    Args:
        path: an .onnx file, or a folder that holds exactly one.

    Raises:
        ModelError: no such file, not an ONNX file, cut short, no nodes, an operator set before 13, already
            quantised by onnxq, or external data that is missing, too short or outside the model's folder.
    """
    file = find_model_file(Path(path))
    proto = _parse(file)
    if not proto.graph.node:
        raise ModelError(f"{file} holds a graph without nodes: there is nothing to quantise.")
    _refuse_sparse(proto, file)
    try:
        model = ir.from_proto(proto)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as error:
        raise ModelError(f"{file} is not a valid ONNX model: {_root_cause(error)}") from error
    del proto
    opset = _check_opset(model, file)
    _check_nodes(model, file)
    external = _check_external(model, file)
    size = file.stat().st_size + sum(data.stat().st_size for data in external)
    return LoadedModel(model, file, opset, size, external)


def find_model_file(path: Path) -> Path:
    """The .onnx file that a path means: itself, or the only one in a folder."""
    if path.is_dir():
        found = sorted(path.glob("*.onnx"))
        if len(found) == 1:
            return Path(os.path.abspath(found[0]))
        if not found:
            raise ModelError(
                f"The folder {path} holds no .onnx file. Export a model into it: `onnxq export SOURCE {path}`."
            )
        names = ", ".join(p.name for p in found)
        raise ModelError(f"The folder {path} holds {len(found)} .onnx files ({names}): name one of them.")
    if not path.exists():
        beside = sorted(p.name for p in path.parent.glob("*.onnx")) if path.parent.is_dir() else []
        hint = f" Its folder has: {', '.join(beside[:8])}." if beside else ""
        raise ModelError(f"There is no file {path}.{hint}")
    return Path(os.path.abspath(path))


def _parse(file: Path) -> onnx.ModelProto:
    size = file.stat().st_size
    if size == 0:
        raise ModelError(f"{file} is empty: the export or the download did not finish.")
    proto = onnx.ModelProto()
    # Parsing from the map spares the copy of the whole file that onnx.load makes.
    with open(file, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        try:
            with memoryview(mapped) as view:
                proto.ParseFromString(view)
        except DecodeError as error:
            raise ModelError(f"{file} can't be read: {_diagnose(mapped)}") from error
        if not proto.HasField("graph"):
            raise ModelError(f"{file} can't be read: {_diagnose(mapped)}")
    return proto


def _diagnose(data: mmap.mmap) -> str:
    """Why a file does not parse, from its outermost fields."""
    size, position, seen = len(data), 0, False
    if data[: len(_LFS_POINTER)] == _LFS_POINTER:
        return "it is a Git LFS pointer, not the model. Run `git lfs pull`."
    if size > _PROTOBUF_LIMIT:
        return f"it has {size} bytes and protobuf stops at 2 GB. Save its weights as external data."
    foreign = f"it is not an ONNX file (it starts with {bytes(data[:16])!r})."
    while position < size:
        tag, position = _varint(data, position)
        wire, name = _MODEL_FIELDS.get(tag >> 3, (-1, ""))
        if wire != tag & 7:
            return "its protobuf is damaged." if seen else foreign
        length, position = _varint(data, position)
        if wire == 2:
            if position + length > size:
                there = f"its field '{name}' needs {length} bytes and {size - position} are there"
                return f"it is cut short: {there}. Copy or export it again." if seen or tag >> 3 == 7 else foreign
            position += length
        seen = True
    return "it holds no graph: it is cut short, or not an ONNX model."


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    """The protobuf variable-length integer at a position, and the position after it."""
    value = shift = 0
    while position < len(data) and shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    return value, position


def _refuse_sparse(proto: onnx.ModelProto, file: Path) -> None:
    """onnx-ir drops sparse initializers without a word; say it instead."""
    graphs = [proto.graph]
    while graphs:
        graph = graphs.pop()
        if graph.sparse_initializer:
            name = graph.sparse_initializer[0].values.name
            raise ModelError(
                f"{file} stores '{name}' as a sparse initializer, which onnxq does not read: export the weights dense."
            )
        for node in graph.node:
            for attribute in node.attribute:
                graphs.extend(attribute.graphs)
                if attribute.HasField("g"):
                    graphs.append(attribute.g)


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


def _check_opset(model: ir.Model, file: Path) -> int:
    imports = model.graph.opset_imports
    if "ai.onnx" in imports:  # the long name of the same domain
        imports[""] = imports.pop("ai.onnx")
    opset = imports.get("")
    if opset is None:
        raise ModelError(f"{file} does not say which operator set it uses. Export it again: `onnxq export --opset 21`.")
    if opset < OLDEST_OPSET:
        raise ModelError(
            f"{file} uses operator set {opset}; onnxq needs {OLDEST_OPSET} or later. Export it again with "
            "`onnxq export --opset 21`, or convert it with onnx.version_converter.convert_version(model, 21)."
        )
    return opset


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node: the main graph and its subgraphs, then the model-local functions and theirs."""
    yield from ir.traversal.RecursiveGraphIterator(model.graph)
    for function in model.functions.values():
        yield from ir.traversal.RecursiveGraphIterator(function)


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Every graph that can hold initializers: the main graph, its subgraphs, and those inside functions."""
    yield from model.graphs()
    for function in model.functions.values():
        yield from function.subgraphs()


def all_tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Every stored tensor: initializers, then tensor attributes."""
    for graph in all_graphs(model):
        yield from (v.const_value for v in graph.initializers.values() if v.const_value is not None)
    for node in all_nodes(model):
        for attribute in node.attributes.values():
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.TENSOR:
                yield attribute.as_tensor()
            elif attribute.type == ir.AttributeType.TENSORS:
                yield from attribute.as_tensors()


def _check_nodes(model: ir.Model, file: Path) -> None:
    for node in all_nodes(model):
        if node.domain == OWN_DOMAIN:
            raise ModelError(
                f"{file} is already quantised by onnxq (node '{node.name}' is {OWN_DOMAIN}::{node.op_type}). "
                "Start from the float model it was made of."
            )
        for value in node.inputs:
            if value is not None and value.graph is None:
                raise ModelError(
                    f"{file}: node '{node.name}' ({node.op_type}) reads '{value.name}', "
                    "which nothing produces. "
                    "The export is broken: onnx.checker says more."
                )


def _check_external(model: ir.Model, file: Path) -> tuple[Path, ...]:
    """Give external tensors their folder and check that every byte they name is there."""
    sizes: dict[Path, int] = {}
    for tensor in all_tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = str(file.parent)
            data = _external_path(tensor, file)
            if data not in sizes:
                sizes[data] = data.stat().st_size
            _check_extent(tensor, data, sizes[data])
    return tuple(sizes)


def _external_path(tensor: ir.ExternalTensor, file: Path) -> Path:
    location = os.fspath(tensor.location)
    where = f"{file}: the external data of '{tensor.name}'"
    if PurePosixPath(location).is_absolute() or PureWindowsPath(location).drive:
        raise ModelError(f"{where} has the absolute path {location}; ONNX allows only paths inside the model's folder.")
    data = Path(os.path.normpath(file.parent / location))
    if not data.is_relative_to(file.parent):
        raise ModelError(f"{where} leaves the model's folder ({location}): refused, it could read any file.")
    if not data.is_file():
        raise ModelError(f"{where} is missing: there is no file {data}. Put it beside the model, as it was exported.")
    # A hub cache links the model and its data alike into one folder of blobs: following the data to where the
    # model's own link leads is no escape.
    homes = {file.parent.resolve(), file.resolve().parent}
    if not any(data.resolve().is_relative_to(home) for home in homes):
        raise ModelError(f"{where} is a link out of the model's folder ({location} -> {data.resolve()}): refused.")
    return data


def _check_extent(tensor: ir.ExternalTensor, data: Path, size: int) -> None:
    offset, needed = tensor.offset or 0, tensor.nbytes
    what = f"The tensor '{tensor.name}' ({tensor.dtype.name} {list(tensor.shape.numpy())}) needs {needed} bytes"
    if tensor.length is not None and tensor.length != needed:
        raise ModelError(f"{what}, but its entry gives it {tensor.length} bytes of {data}. Export the model again.")
    if offset < 0 or offset + needed > size:
        with open(data, "rb") as handle:
            pointer = handle.read(len(_LFS_POINTER)) == _LFS_POINTER
        cure = (
            "It is a Git LFS pointer: run `git lfs pull`." if pointer else "It is cut short: copy or export it again."
        )
        raise ModelError(f"{what} at offset {offset} of {data}, which has {size} bytes. {cure}")
