"""Write a model tensor by tensor, so that it appears whole or not at all and never sits in memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, final

import numpy as np
import onnx_ir as ir

from onnxq.errors import ModelError, OnnxqError, OutputExistsError
from onnxq.graph.load import LoadedModel, all_graphs, all_nodes
from onnxq.graph.pool import DataPool, digest_of
from onnxq.graph.tensors import copy_bytes, data_identity

ALIGNMENT = 64
"""Every external tensor starts at a multiple of this many bytes: one cache line, one AVX-512 register."""

INLINE_BYTES = 1024
"""Tensors up to this size stay inside the .onnx file."""

_PROTOBUF_LIMIT = 2**31 - 1

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes to write."""


@dataclass(frozen=True)
class SavedModel:
    """What was written.

    Attributes:
        path: the .onnx file.
        data_path: its external data, or None when everything fits inside.
        bytes: both files together.
    """

    path: Path
    data_path: Path | None
    bytes: int


@final
class StreamingWriter:
    """Collects tensors in a temporary folder beside the output and publishes the model with two renames.

    Until `finish` returns, the output path is as it was; whatever ends the ``with`` block early, an interrupt
    included, removes the temporary folder. Peak memory: one chunk of one tensor
    (`onnxq.graph.tensors.COPY_CHUNK`) for external tensors, one tensor for those in memory.

    Example::

        with StreamingWriter(Path("small.onnx"), source=loaded) as writer:
            packed = writer.append("fc.packed", array)      # on disk from here on
            value.const_value = packed                      # wherever the rewrite puts it
            saved = writer.finish(loaded.model)

    Args:
        out_path: the .onnx file to write; its folder must exist. External data goes to ``<name>.onnx.data``
            beside it.
        force: replace an existing output.
        source: the model being quantised; writing over its files is refused even with ``force``.
        pool: of the output's folder: bytes that another model of it holds are referred to, not written again.

    Raises:
        OutputExistsError: the output exists and ``force`` is not set, or it is the source.
        OnnxqError: the output can't be a file there.
    """

    def __init__(
        self,
        out_path: str | os.PathLike[str],
        force: bool = False,
        source: LoadedModel | None = None,
        pool: DataPool | None = None,
    ) -> None:
        self.path = Path(os.path.abspath(out_path))
        self.data_path = self.path.with_name(self.path.name + ".data")
        sources = () if source is None else (source.path, *source.external_files)
        _check_output(self.path, self.data_path, force, sources)
        self._folder: Path | None = None
        self._file: BinaryIO | None = None
        self._ready: tuple[Path, Path | None] | None = None
        self._pool = pool
        self._written: list[tuple[str, int]] = []
        self._borrowed: list[ir.ExternalTensor] = []
        self._offsets: dict[tuple[object, ...], int] = {}
        self._kept: list[ir.TensorProtocol] = []  # keeps the id() in a key from being given to another tensor
        self._appended: list[ir.ExternalTensor] = []

    def __enter__(self) -> StreamingWriter:
        # The final names live in a folder of their own: references are right, and readable, before the
        # renames too.
        self._folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", suffix=".partial", dir=self.path.parent))
        self._file = open(self._folder / self.data_path.name, "wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    @property
    def bytes_written(self) -> int:
        """External data collected so far, padding included."""
        return self._open_file().tell()

    def append(self, name: str, data: np.ndarray | ir.TensorProtocol) -> ir.TensorProtocol:
        """Write one tensor now and return what stands for it in the graph.

        Args:
            name: name of the initializer it becomes.
            data: any shape and type that ONNX stores.

        Returns:
            An ``ir.ExternalTensor``, readable at once, or an in-memory tensor up to `INLINE_BYTES`.
        """
        file = self._open_file()
        tensor = ir.tensor(data, name=name) if isinstance(data, np.ndarray) else data
        if tensor.nbytes <= INLINE_BYTES:
            if isinstance(data, np.ndarray):
                return ir.tensor(data.copy(), name=name)  # the caller may reuse its buffer
            return _in_memory(tensor, name)
        reference = self._borrow(tensor, name)
        if reference is None:
            reference = self._reference(tensor, name, self._write(tensor))
            file.flush()
            self._appended.append(reference)
        return reference

    def finish(self, model: ir.Model, progress: Progress | None = None) -> SavedModel:
        """Write what is left of the model and put both files in place: `prepare`, then `publish`."""
        self.prepare(model, progress)
        return self.publish()

    def prepare(self, model: ir.Model, progress: Progress | None = None) -> int:
        """Write what is left of the model to the temporary folder.

        Initializers above `INLINE_BYTES` become external, smaller ones inline; those from `append` are only
        referred to; initializers that share their bytes are stored once. The model itself keeps its tensors.

        Returns:
            What both files come to, in bytes.

        Raises:
            ModelError: a source tensor can't be read, or what must stay inside the .onnx file exceeds 2 GB.
            OutputExistsError: a tensor of the model lives in a file that would be replaced.
        """
        file, folder = self._open_file(), self._folder
        assert folder is not None
        self._refuse_overwriting_sources(model)
        todo = [v.const_value for g in all_graphs(model) for v in g.initializers.values() if v.const_value is not None]
        total = sum(t.nbytes for t in todo if t.nbytes > INLINE_BYTES and not self._is_ours(t))
        done = 0

        def store(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
            nonlocal done
            if self._is_ours(tensor) or tensor.dtype == ir.DataType.STRING:
                return tensor
            if tensor.nbytes <= INLINE_BYTES:
                return _in_memory(tensor, name) if isinstance(tensor, ir.ExternalTensor) else tensor
            reference = self._borrow(tensor, name)
            if reference is None:
                reference = self._reference(tensor, name, self._write(tensor, share=True))
            done += tensor.nbytes
            if progress is not None:
                progress(min(done, total), total)
            return reference

        with _replaced_tensors(model, store):
            # onnx-ir renames a tensor to its value while writing; tensors that values share get their names
            # back.
            proto = ir.to_proto(model)
        size = proto.ByteSize()
        if size > _PROTOBUF_LIMIT:
            raise ModelError(
                f"{self.path.name} would hold {size} bytes outside external data and protobuf stops at 2 GB: "
                "large tensors "
                "in Constant nodes or functions must become initializers first."
            )
        new_model = folder / self.path.name
        new_model.write_bytes(proto.SerializeToString())
        external = file.tell() > 0
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._file = None
        new_data = folder / self.data_path.name if external else None
        self._ready = new_model, new_data
        return sum(path.stat().st_size for path in self._ready if path is not None)

    def publish(self) -> SavedModel:
        """Put both files in place. Comes after `prepare`."""
        if self._ready is None or self._folder is None:
            raise RuntimeError("StreamingWriter.publish() comes after prepare(), inside the `with` block")
        new_model, new_data = self._ready
        external = new_data is not None
        _publish(new_model, self.path, new_data, self.data_path, self._folder)
        for reference in self._appended:
            reference.base_dir = str(self.path.parent)
        if self._pool is not None:
            for content, offset in self._written:
                self._pool.add(content, self.data_path.name, offset)
        data_bytes = self.data_path.stat().st_size if external else 0
        return SavedModel(self.path, self.data_path if external else None, self.path.stat().st_size + data_bytes)

    def _open_file(self) -> BinaryIO:
        if self._file is None:
            raise RuntimeError("StreamingWriter is used outside its `with` block or after finish()")
        return self._file

    def _is_ours(self, tensor: ir.TensorProtocol) -> bool:
        if any(tensor is borrowed for borrowed in self._borrowed):
            return True
        return isinstance(tensor, ir.ExternalTensor) and Path(tensor.base_dir) == self._folder

    def _borrow(self, tensor: ir.TensorProtocol, name: str) -> ir.ExternalTensor | None:
        """A reference to another file of the folder that holds these bytes."""
        found = None if self._pool is None else self._pool.find(digest_of(tensor))
        if found is None:
            return None
        file, offset = found
        reference = self._reference(tensor, name, offset, file=file, folder=self.path.parent)
        self._borrowed.append(reference)
        return reference

    def _write(self, tensor: ir.TensorProtocol, share: bool = False) -> int:
        """The offset of a tensor's bytes, written unless an equal region is there already."""
        file, key = self._open_file(), data_identity(tensor)
        if share and key in self._offsets:
            return self._offsets[key]
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
        offset = file.tell()
        written = copy_bytes(tensor, file)
        if written != tensor.nbytes:
            raise ModelError(f"The tensor '{tensor.name}' holds {written} bytes where its shape needs {tensor.nbytes}.")
        if share:
            self._offsets[key] = offset
            self._kept.append(tensor)
        if self._pool is not None:
            self._written.append((digest_of(tensor), offset))
        return offset

    def _reference(
        self, tensor: ir.TensorProtocol, name: str, offset: int, *, file: str = "", folder: Path | None = None
    ) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            file or self.data_path.name,
            offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            doc_string=tensor.doc_string,
            base_dir=str(folder or self._folder),
        )

    def _refuse_overwriting_sources(self, model: ir.Model) -> None:
        taken = [path for path in (self.path, self.data_path) if path.exists()]
        files = {
            value.const_value.path
            for graph in all_graphs(model)
            for value in graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor) and not self._is_ours(value.const_value)
        }
        for path in taken:
            for file in files:
                if os.path.exists(file) and os.path.samefile(path, file):
                    raise OutputExistsError(_SAME_FILE.format(path=path))


_SAME_FILE = "{path} belongs to the model being read: writing there would destroy it. Choose another output path."


def _check_output(path: Path, data_path: Path, force: bool, sources: tuple[Path, ...]) -> None:
    if not path.parent.is_dir():
        raise OnnxqError(f"The folder {path.parent} of the output {path.name} does not exist. Make it first.")
    if path.is_dir() or data_path.is_dir():
        raise OnnxqError(f"The output {path} is a folder: name a file in it, such as {path / 'model.onnx'}.")
    for out in (path, data_path):
        if not out.exists():
            continue
        if any(source.exists() and os.path.samefile(out, source) for source in sources):
            raise OutputExistsError(_SAME_FILE.format(path=out))
        if not force:
            raise OutputExistsError(f"{out} exists already. Choose another output path, or replace it with --force.")


def _in_memory(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    array = np.array(tensor.numpy()) if not isinstance(tensor, ir.StringTensor) else tensor.numpy()
    return ir.Tensor(array, dtype=tensor.dtype, name=name, doc_string=tensor.doc_string)


@contextmanager
def _replaced_tensors(model: ir.Model, store: Callable[[ir.TensorProtocol, str], ir.TensorProtocol]) -> Iterator[None]:
    """Lend the model the stored tensors: every initializer, and external tensors in node attributes."""
    before: list[tuple[ir.Value, ir.TensorProtocol, str | None]] = []
    attributes: list[tuple[ir.Node, ir.Attr]] = []
    try:
        for graph in all_graphs(model):
            for value in graph.initializers.values():
                tensor = value.const_value
                if tensor is None:
                    continue
                before.append((value, tensor, tensor.name))
                value.const_value = store(tensor, value.name or "")
        for node in all_nodes(model):
            for attribute in list(node.attributes.values()):
                if attribute.is_ref() or attribute.type != ir.AttributeType.TENSOR:
                    continue
                held = attribute.as_tensor()
                if isinstance(held, ir.ExternalTensor):
                    attributes.append((node, attribute))
                    stored = store(held, held.name or "")
                    node.attributes[attribute.name] = ir.AttrTensor(attribute.name, stored)
        yield
    finally:
        for value, tensor, name in before:
            value.const_value = tensor
            tensor.name = name
        for node, attribute in attributes:
            node.attributes[attribute.name] = attribute


def _publish(new_model: Path, path: Path, new_data: Path | None, data_path: Path, folder: Path) -> None:
    """Move both files into place, data first; on any failure put the old ones back."""
    old_data = folder / "replaced.data"
    try:
        if data_path.exists():  # a forced replacement: also when the new model needs no data file
            os.replace(data_path, old_data)
        if new_data is not None:
            os.replace(new_data, data_path)
        os.replace(new_model, path)
    except BaseException:
        if old_data.exists():
            os.replace(old_data, data_path)
        elif new_data is not None and not new_data.exists():
            data_path.unlink(missing_ok=True)
        raise
