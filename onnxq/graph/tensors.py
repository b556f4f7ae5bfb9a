"""Constant tensors without copies: where they live, how to map them, how to stream them to a file.

Everything reads through a fresh memory map of exactly the bytes of one tensor, which goes away with the
array. ``ir.ExternalTensor.numpy`` keeps a map of the whole data file and a file descriptor open for each
tensor it was called on: a model of a thousand weights then runs out of descriptors, and every page it touched
counts as resident.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from onnxq.errors import ModelError

WEIGHT_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
"""Element types of the weights that onnxq encodes."""

COPY_CHUNK = 8 << 20
"""Bytes copied at a time between files; the peak memory of a copy."""


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind a value that is known when the model is written, or None.

    That is an initializer which no caller can override, or the output of a ``Constant`` node.
    An initializer that is also a graph input is a default, not a constant.
    """
    if value is None:
        return None
    if value.is_initializer():
        return None if value.is_graph_input() else value.const_value
    producer = value.producer()
    if producer is None or producer.op_type != "Constant" or producer.domain != "":
        return None
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        attribute = producer.attributes.get(name)
        if attribute is None or attribute.is_ref():
            continue
        if name == "value":
            return attribute.as_tensor()
        dtype = np.float32 if "float" in name else np.int64
        return ir.tensor(np.array(attribute.value, dtype=dtype), name=value.name)
    return None


def is_bias(value: ir.Value | None, n: int) -> bool:
    """Whether a value is one constant float32 for each of N outputs."""
    tensor = constant_tensor(value)
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and list(tensor.shape) == [n]


def read_array(tensor: ir.TensorProtocol) -> np.ndarray:
    """The elements of a tensor as a read-only array in its own type.

    External tensors of whole-byte types come as a view of a fresh memory map: no byte is read before it is
    used, and dropping the array drops the map. The paths were checked by `onnxq.graph.load`.

    Raises:
        ModelError: the data can't be read.
    """
    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype.bitwidth < 8:
        try:
            array: np.ndarray = tensor.numpy()
            return array
        except (OSError, ValueError) as error:
            raise ModelError(f"The tensor '{tensor.name}' can't be read: {error}") from error
    shape = tensor.shape.numpy()
    if tensor.size == 0:
        return np.empty(shape, tensor.dtype.numpy())
    try:
        raw = np.memmap(tensor.path, np.uint8, "r", offset=tensor.offset or 0, shape=(tensor.nbytes,))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The tensor '{tensor.name}' can't be read from {tensor.path} "
            f"(offset {tensor.offset or 0}, {tensor.nbytes} bytes): {error}"
        ) from error
    view: np.ndarray = raw.view(np.ndarray).view(tensor.dtype.numpy().newbyteorder("<")).reshape(shape)
    return view


def copy_bytes(tensor: ir.TensorProtocol, file: BinaryIO) -> int:
    """Write a tensor's bytes, as ONNX stores them, at the file's position; returns how many.

    External tensors stream from their file in chunks of `COPY_CHUNK`; one in memory is written at once.

    Raises:
        ModelError: the source file is gone or shorter than the tensor.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return file.write(tensor.tobytes())
    left = tensor.nbytes
    buffer = memoryview(bytearray(min(COPY_CHUNK, left)))
    try:
        with open(tensor.path, "rb", buffering=0) as source:
            source.seek(tensor.offset or 0)
            while left and (count := source.readinto(buffer[:left])):
                left -= file.write(buffer[:count])
    except FileNotFoundError as error:
        raise ModelError(f"The data file {tensor.path} of tensor '{tensor.name}' is gone.") from error
    if left:
        raise ModelError(
            f"The data file {tensor.path} ends {left} bytes before the tensor '{tensor.name}' does: "
            "it changed while the model was open. Load the model again."
        )
    return tensor.nbytes


def data_identity(tensor: ir.TensorProtocol) -> tuple[object, ...]:
    """Equal for tensors that share their bytes (one region of one file, or one object in memory)."""
    if isinstance(tensor, ir.ExternalTensor):
        return (str(Path(tensor.path).resolve()), tensor.offset or 0, tensor.nbytes)
    return (id(tensor),)


def check_finite(array: np.ndarray, name: str) -> None:
    """Refuse a weight that holds NaN or infinity, which no format can store.

    Args:
        array: any shape, a float type.
        name: what to call the weight in the message.

    Raises:
        ModelError: with how many elements are wrong and where the first one is.
    """
    # NaN and infinity both survive min and max, and neither makes a temporary as large as the weight.
    with np.errstate(invalid="ignore"):
        if array.size == 0 or (np.isfinite(array.min()) and np.isfinite(array.max())):
            return
    wrong = ~np.isfinite(array)
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    raise ModelError(
        f"The weight '{name}' {list(array.shape)} holds {int(wrong.sum())} elements that are not finite, "
        f"the first at {list(first)} ({array[first]}). A half-precision export may have overflowed: "
        "export the model again in float32."
    )
