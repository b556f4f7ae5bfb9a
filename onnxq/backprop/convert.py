"""Tensors between numpy, ONNX and torch, and the element types that are computed in.

1. float16 and bfloat16 are computed in float32: their tensors are widened where they are used, and a Cast to them
   leaves float32. So there is no mixing of widths, and gradients don't underflow.
2. Integers stay exact: int8 to int64 and uint8 are themselves, the wider unsigned ones are held in int64.
3. Whole-byte tensors share the memory of their array, also of a read-only memory map: no operator writes in place.
"""

from __future__ import annotations

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from onnxq.errors import ModelError

_TORCH_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float32,  # rule 1
    ir.DataType.BFLOAT16: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.int64,  # rule 2
    ir.DataType.UINT32: torch.int64,
    ir.DataType.UINT64: torch.int64,
}

_ONNX_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float64: ir.DataType.DOUBLE,
    torch.bool: ir.DataType.BOOL,
    torch.int8: ir.DataType.INT8,
    torch.int16: ir.DataType.INT16,
    torch.int32: ir.DataType.INT32,
    torch.int64: ir.DataType.INT64,
    torch.uint8: ir.DataType.UINT8,
}

_WIDENED = (np.dtype(np.uint16), np.dtype(np.uint32), np.dtype(np.uint64))
_SMALL_INTEGERS = tuple(np.dtype(kind) for kind in (ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.int2, ml_dtypes.uint2))


def torch_type(dtype: ir.DataType | int) -> torch.dtype:
    """The type that an ONNX element type is computed in.

    Raises:
        ModelError: a string, complex or narrow float type.
    """
    kind = ir.DataType(dtype)
    if kind not in _TORCH_TYPES:
        raise ModelError(f"the element type {kind.name} can't be computed with gradients")
    return _TORCH_TYPES[kind]


def onnx_type(dtype: torch.dtype) -> ir.DataType:
    """The ONNX element type of a tensor of this interpreter."""
    return _ONNX_TYPES[dtype]


def from_numpy(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """An array as a tensor on torch's default device; on the CPU it shares memory where torch has the type.

    See rules 2 and 3. float16 and bfloat16 keep their type, so that a stored weight is not copied; see `widened`.

    Raises:
        ModelError: a type that torch has no counterpart of.
    """
    device = torch.get_default_device()
    if array.dtype in _WIDENED:
        return torch.from_numpy(array.astype(np.int64)).to(device)
    if array.dtype in _SMALL_INTEGERS:
        return torch.from_numpy(array.astype(np.int8)).to(device)
    if any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array)
    half = array.dtype == np.dtype(ml_dtypes.bfloat16)
    try:
        with warnings.catch_warnings():
            # torch warns of read-only arrays: writing to one would be an error here anyway.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            tensor = torch.from_numpy(array.view(np.int16) if half else array)
    except TypeError as error:
        raise ModelError(f"arrays of {array.dtype} can't be computed with gradients") from error
    return (tensor.view(torch.bfloat16) if half else tensor).to(device)


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, in float32 where it is half precision (rule 1); a copy only then."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
