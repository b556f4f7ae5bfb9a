"""Binary weights in ops that stock ONNX Runtime has: one bit on disk for each sign, two in memory where products read.

Signs lie row by row in stored order, and in a row plane by plane, eight to a byte: a row of q planes is q *plane rows*
one behind the other. So rows may have different numbers of planes, and both readers share all bytes.

- A product takes rows of q planes together: x, q times in a row, times a 2-bit weight of q K inputs, MatMulNBits with
  codes 1 and 3 about its zero point of 2. It sums up the planes by itself. Codes are spread from the signs by a table,
  which ONNX Runtime folds when a session is created. Offsets go with the sums of their groups of inputs.
- A look-up finds the plane rows of a row by their numbers, spreads their bytes by a table of signs, and sums them up.

All ops are as they were in opset 13.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq.formats.binary import BinaryEncoding, BinaryFormat
from onnxq.formats.packing import BLOCK_K, ceil_div
from onnxq.passes.forms.base import SharedArray, StoredWeight, constant
from onnxq.passes.forms.kernel import INT8_ACTIVATIONS

PLANES_PROPERTY = "onnxq.planes"
"""Metadata key of the nodes that read a weight: its layout, for who reads the file."""
OLDEST_OPSET = 13
_FAST_BLOCKS = (128, 64, 32)
_SIGNS_OF_BYTE = 8
TABLE_PREFIX = "onnxq.planes."
"""Of the names of what all weights share."""


def planes_refusal(encoding: BinaryEncoding, opset: int) -> str | None:
    """Why a weight can't stand in stock ops, or None."""
    k = encoding.shape[1]
    if k % BLOCK_K:
        return f"rows of {k} inputs are not whole blocks of {BLOCK_K}"
    if opset < OLDEST_OPSET:
        return f"the ops that binary codes take are those of opset {OLDEST_OPSET}"
    return None


def planes_cost_bits(format: BinaryFormat, n: int, k: int) -> int:
    """Bits on disk of a weight [N, K]: signs, scales, offsets and order, or what it takes as a function."""
    if k % BLOCK_K:
        return format.cost_bits(n, k)
    groups, rows = format.groups(k), sum(format.planes)
    sides = (rows + n * format.offset) * groups * 16
    return rows * k + sides + n * format.ordered * 32


def planes_nodes(format: BinaryFormat, *, products: int, look_ups: int) -> int:
    """Upper bound of the nodes that so many products and look-ups of a weight take, constants among them."""
    runs = len(list(format.runs()))
    product = (11 if runs == 1 else 15 * runs + 1) + 17 * format.offset + format.ordered
    return products * product + look_ups * (36 + 5 * format.offset)


def plane_rows(encoding: BinaryEncoding) -> tuple[np.ndarray, np.ndarray]:
    """Signs and scales by plane rows: bytes uint8 [T, K / 8], lowest bit first, and float16 [T, G]."""
    signs, scales = [], []
    for planes, rows in encoding.format.runs():
        depths = np.arange(planes, dtype=np.uint8)
        bits = (encoding.codes[rows, None] >> depths[:, None]) & 1
        signs.append(np.packbits(bits, axis=2, bitorder="little").reshape(-1, encoding.shape[1] // _SIGNS_OF_BYTE))
        scales.append(encoding.scales[:planes, rows].transpose(1, 0, 2).reshape(-1, encoding.scales.shape[2]))
    return np.concatenate(signs), np.concatenate(scales)


def from_plane_rows(
    signs: np.ndarray,
    scales: np.ndarray,
    offsets: np.ndarray | None,
    rank: np.ndarray | None,
    format: BinaryFormat,
    gain: float,
) -> BinaryEncoding:
    """The encoding behind stored arrays: uint8 [T, K / 8], float16 [T, G] and [N, G], int32 [N]."""
    n, k, groups = format.planes[0], signs.shape[1] * _SIGNS_OF_BYTE, scales.shape[1]
    codes, levels = np.zeros((n, k), np.uint8), np.zeros((len(format.planes), n, groups), np.float16)
    start = 0
    for planes, rows in format.runs():
        count = planes * (rows.stop - rows.start)
        bits = np.unpackbits(signs[start : start + count], axis=1, bitorder="little").reshape(-1, planes, k)
        codes[rows] = np.bitwise_or.reduce(bits << np.arange(planes, dtype=np.uint8)[:, None], axis=1)
        levels[:planes, rows] = scales[start : start + count].reshape(-1, planes, groups).transpose(1, 0, 2)
        start += count
    order = None if rank is None else np.argsort(rank).astype(np.int32)
    return BinaryEncoding(format, codes, levels, offsets, order, gain)


@dataclasses.dataclass(frozen=True)
class PlanesForm:
    """See the module's docstring.

    Attributes:
        accuracy_level: of MatMulNBits; 4 computes with int8 activations, the only fast one at 2 bits.
    """

    accuracy_level: int = INT8_ACTIVATIONS
    name: str = "MatMulNBits of planes"

    def arrays(self, encoding: BinaryEncoding) -> dict[str, np.ndarray]:
        """See `Form.arrays`. Side data has a third axis: a matrix that rows are gathered from would be a table."""
        signs, scales = plane_rows(encoding)
        gain = encoding.gain if _gain(encoding) == 1 else 1.0
        arrays = {"signs": signs, "scales": (scales.astype(np.float32) * gain).astype(np.float16)[:, :, None]}
        if encoding.offsets is not None:
            arrays["offsets"] = (encoding.offsets.astype(np.float32) * gain).astype(np.float16)[:, :, None]
        if encoding.order is not None:
            rank = np.empty(len(encoding.order), np.int32)
            rank[encoding.order] = np.arange(len(rank), dtype=np.int32)
            arrays["rank"] = rank
        return arrays

    def shared_arrays(self, encoding: BinaryEncoding) -> dict[str, SharedArray]:
        """See `Form.shared_arrays`."""
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        # Of a nibble's signs the 2-bit codes, low first: 1 or 3.
        fields = (1 + 2 * bits.reshape(256, 2, 4)) << np.arange(0, 8, 2, dtype=np.uint8)
        tables = {"spread": np.bitwise_or.reduce(fields, axis=2), "signs": (2 * bits.astype(np.int8) - 1)}
        return {f"{role}.table": SharedArray(f"{TABLE_PREFIX}{role}", array) for role, array in tables.items()}

    def attributes(self, encoding: BinaryEncoding) -> dict[str, Any]:
        """See `Form.attributes`."""
        format, k = encoding.format, encoding.shape[1]
        return {"planes": list(format.planes), "group_size": format.effective_group(k), "gain": _gain(encoding)}

    def linear(self, tape: ir.tape.Tape, x: ir.Value, weight: StoredWeight, bias: ir.Value | None) -> ir.Value:
        """See `Form.linear`."""
        reader = _Reader(tape, weight)
        result = reader.product(x, self.accuracy_level)
        return result if bias is None else tape.op("Add", [result, bias])

    def table(self, tape: ir.tape.Tape, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        """See `Form.table`."""
        return _Reader(tape, weight).rows(indices)

    def functions(self, weight: StoredWeight, *, linear: bool, table: bool) -> tuple[str, ...]:
        """See `Form.functions`."""
        return ()


def _gain(encoding: BinaryEncoding) -> float:
    """What is left to multiply with when scales and offsets take the gain along: 1 where float16 holds all of them."""
    sides = [encoding.scales, *([] if encoding.offsets is None else [encoding.offsets])]
    for side in sides:
        wanted = side.astype(np.float32) * np.float32(encoding.gain)
        with np.errstate(over="ignore"):
            if not np.array_equal(wanted.astype(np.float16).astype(np.float32), wanted):
                return float(encoding.gain)
    return 1.0


class _Reader:
    """Nodes of one site."""

    def __init__(self, tape: ir.tape.Tape, weight: StoredWeight) -> None:
        self._tape = tape
        self._tensors = weight.tensors
        self._n, self._k = weight.shape
        self._gain: float = weight.attributes["gain"]
        self._size: int = weight.attributes["group_size"]
        self._groups = ceil_div(self._k, self._size)
        group = None if self._groups == 1 else self._size
        ordered, offset = "rank" in weight.tensors, "offsets" in weight.tensors
        self._format = BinaryFormat(tuple(weight.attributes["planes"]), group, offset, ordered)
        about = {**weight.attributes, "tensors": {role: value.name for role, value in weight.tensors.items()}}
        self._about = json.dumps(about)

    def product(self, x: ir.Value, accuracy_level: int) -> ir.Value:
        """Activations [..., K] to [..., N]: rows with as many planes are one weight."""
        tape = self._tape
        # A block lies in one group and divides a plane, the last of whose groups may be ragged.
        block = next(block for block in _FAST_BLOCKS if self._size % block == 0 and self._k % block == 0)
        parts, start = [], 0
        runs = list(self._format.runs())
        for planes, rows in runs:
            n = rows.stop - rows.start
            stop = start + planes * n
            codes, scales = self._tensors["signs"], self._tensors["scales"]
            if len(runs) > 1:
                ends = self._ints([start]), self._ints([stop])
                codes, scales = tape.op("Slice", [codes, *ends]), tape.op("Slice", [scales, *ends])
            codes = tape.op("Gather", [self._tensors["spread.table"], self._cast(codes, ir.DataType.INT32)])
            codes = tape.op("Reshape", [codes, self._ints([n, planes * self._k // block, block // 4])])
            scales = self._by(block, scales, 1)
            scales = tape.op("Reshape", [scales, self._ints([n, planes * self._k // block])])
            inputs = x if planes == 1 else tape.op("Concat", [x] * planes, {"axis": -1})
            sizes = {"K": planes * self._k, "N": n, "bits": 2, "block_size": block, "accuracy_level": accuracy_level}
            parts.append(tape.op("MatMulNBits", [inputs, codes, self._scaled(scales)], sizes, domain="com.microsoft"))
            tape.nodes[-1].metadata_props[PLANES_PROPERTY] = self._about
            start = stop
        result = parts[0] if len(parts) == 1 else tape.op("Concat", parts, {"axis": -1})
        if self._format.offset:
            result = tape.op("Add", [result, self._shifts(x, block)])
        if self._format.ordered:
            result = tape.op("Gather", [result, self._tensors["rank"]], {"axis": -1})
        return result

    def _shifts(self, x: ir.Value, block: int) -> ir.Value:
        """What offsets put on every output, in stored order: sums of blocks of inputs times the blocks' offsets."""
        tape = self._tape
        lead = tape.op("Slice", [tape.op("Shape", [x]), self._ints([0]), self._ints([-1])])
        split = tape.op("Concat", [lead, self._ints([self._k // block, block])], {"axis": 0})
        sums = tape.op("ReduceSum", [tape.op("Reshape", [x, split]), self._ints([-1])], {"keepdims": 0})
        offsets = tape.op("Squeeze", [self._by(block, self._tensors["offsets"], 1), self._ints([2])])
        offsets = self._scaled(tape.op("Transpose", [offsets], {"perm": [1, 0]}))
        return tape.op("MatMul", [sums, offsets])

    def rows(self, indices: ir.Value) -> ir.Value:
        """Indices [...] to rows [..., K]."""
        tape, inner = self._tape, self._ints([-1])
        row = self._cast(indices, ir.DataType.INT64)
        if self._format.ordered:
            row = self._cast(tape.op("Gather", [self._tensors["rank"], row]), ir.DataType.INT64)
        else:
            behind = tape.op("Add", [row, self._int(self._n)])
            row = tape.op("Where", [tape.op("Less", [row, self._int(0)]), behind, row])
        # Plane rows of the rows before, then this row's own: [..., planes]. Rows without a plane read their first.
        single = tape.op("Unsqueeze", [row, inner])
        owners = self._ints(self._format.planes)
        first = tape.op("ReduceSum", [tape.op("Min", [single, owners]), inner])
        number = tape.op("Add", [first, self._ints(range(len(self._format.planes)))])
        present = None
        if self._format.planes[-1] < self._n:
            present = tape.op("Less", [single, owners])
            number = tape.op("Where", [present, number, first])
        packed = tape.op("Gather", [self._tensors["signs"], number])
        tape.nodes[-1].metadata_props[PLANES_PROPERTY] = self._about
        # Signs have axes for planes, bytes and bits.
        signs = tape.op("Gather", [self._tensors["signs.table"], self._cast(packed, ir.DataType.INT32)])
        scales = self._scaled(tape.op("Gather", [self._tensors["scales"], number]))
        if present is not None:
            present = tape.op("Unsqueeze", [present, self._ints([-2, -1])])
            scales = tape.op("Where", [present, scales, constant(tape, np.float32(0).reshape(()))])
        signed = tape.op("Mul", [self._cast(signs, ir.DataType.FLOAT), self._by(_SIGNS_OF_BYTE, scales, -2)])
        values = tape.op("ReduceSum", [signed, self._ints([-3])], {"keepdims": 0})
        if self._format.offset:
            offsets = self._scaled(tape.op("Gather", [self._tensors["offsets"], row]))
            values = tape.op("Add", [values, self._by(_SIGNS_OF_BYTE, offsets, -2)])
        shape = tape.op("Concat", [tape.op("Shape", [row]), self._ints([self._k])], {"axis": 0})
        return tape.op("Reshape", [values, shape])

    def _by(self, width: int, sides: ir.Value, axis: int) -> ir.Value:
        """Side data of groups along an axis, as that of so many inputs; look-ups leave one group to broadcasting."""
        count = self._k // width
        if self._groups == count or (self._groups == 1 and width == _SIGNS_OF_BYTE):
            return sides
        index = np.arange(count, dtype=np.int64) * width // self._size
        return self._tape.op("Gather", [sides, constant(self._tape, index)], {"axis": axis})

    def _scaled(self, sides: ir.Value) -> ir.Value:
        """Float16 side data in float32, with the gain that they did not take along."""
        sides = self._cast(sides, ir.DataType.FLOAT)
        if self._gain == 1:
            return sides
        return self._tape.op("Mul", [sides, constant(self._tape, np.float32(self._gain).reshape(()))])

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self._tape.op("Cast", [value], {"to": int(dtype)})

    def _ints(self, values: Any) -> ir.Value:
        return constant(self._tape, np.array(list(values), np.int64))

    def _int(self, value: int) -> ir.Value:
        return constant(self._tape, np.array(value, np.int64))
