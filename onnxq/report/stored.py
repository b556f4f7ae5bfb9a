"""Which stored tensors of a graph are quantised weights, whoever quantised them, and how they decode.

Each kind of reader (our ops, MatMulNBits, GatherBlockQuantized, DequantizeLinear, the integer products) has
one entry in `_READERS`: which inputs hold codes, scales and zero points. A new form is one entry more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from onnxq import ops
from onnxq.formats.binary import BinaryEncoding, BinaryFormat, PackedBinary
from onnxq.formats.codebook import CodebookEncoding, CodebookFormat
from onnxq.formats.float8 import Float8Encoding, Float8Format, Float8Kind
from onnxq.formats.mixed import MixedEncoding, MixedFormat, PackedMixed, steps, tables
from onnxq.formats.packing import TILE_N, ceil_div, unpack_codes, untile_groups
from onnxq.formats.uniform import PackedUniform, UniformEncoding, UniformFormat, ZeroPoint
from onnxq.graph.tensors import WEIGHT_TYPES, read_array
from onnxq.passes.rewrite import WEIGHT_PROPERTY
from onnxq.report.stored_frames import around, half_steps
from onnxq.report.stored_planes import planes_of
from onnxq.runtime.optimized import initializer, nodes_of, stored_behind

_SMALLEST = 64
"""Quantised constants of fewer elements are biases and the like."""


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One matrix [N, K] and the nodes that read it; a stack of weights is several of one name.

    Attributes:
        name: the weight's name.
        n, k: outputs (or rows) and inputs (or row width).
        bits: of a code; the mean over all blocks where depths are mixed.
        label: its format, for people.
        nodes: what reads it.
        kinds: "linear", "table" or both.
        tensors: the initializers that hold it, codes first.
        decode: the matrix, float32 [N, K]; None where that is not known how.
    """

    name: str
    n: int
    k: int
    bits: float
    label: str
    nodes: tuple[ir.Node, ...]
    kinds: tuple[str, ...]
    tensors: tuple[ir.Value, ...]
    decode: Callable[[], np.ndarray] | None


@dataclasses.dataclass(frozen=True)
class _Found:
    """What one node says of the weight it reads."""

    n: int
    k: int
    bits: float
    label: str
    kind: str
    decode: Callable[[], np.ndarray] | None


def stored_parts(model: ir.Model) -> list[Part]:
    """Every quantised matrix of a model, in the order of its first reader; shared ones once."""
    found: dict[ir.Value, Part] = {}
    for node in nodes_of(model):
        if (planes := planes_of(node, model)) is not None:
            format, k, held, whole = planes
            kind = "linear" if node.op_type == "MatMulNBits" else "table"
            weight = _Found(format.planes[0], k, format.mean_planes(), format.label(), kind, whole)
            _add(found, node, weight, dict.fromkeys(held))
            continue
        reader = _READERS.get((node.domain, node.op_type))
        if reader is None or not any(value is not None for value in node.inputs):
            continue
        inputs, describe = reader
        operands = [node.inputs[index] if index < len(node.inputs) else None for index in inputs]
        codes = stored_behind(operands[0])
        if not codes or _type(codes[0]) in WEIGHT_TYPES:
            continue
        # A weight of ours may have no codes at all: where every depth is 0.
        if _elements(codes[0]) < _SMALLEST and node.domain != ops.DOMAIN:
            continue
        said = describe(node)
        if said is None:
            continue
        tensors = dict.fromkeys(v for operand in operands for v in stored_behind(operand) if v.is_initializer())
        if (steps := half_steps(node)) is not None:
            tensors[steps] = None
            said = dataclasses.replace(said, decode=None)
        if (node.domain, node.op_type) in _FRAMED:
            n, k, remark, decode = around(node, said.kind, said.n, said.k, said.decode)
            said = dataclasses.replace(said, n=n, k=k, label=said.label + remark, decode=decode)
        _add(found, node, said, tensors)
    return list(found.values())


def _add(found: dict[ir.Value, Part], node: ir.Node, said: _Found, tensors: Mapping[ir.Value, None]) -> None:
    """Files what a node says of its weight under the weight's codes, the first of its tensors."""
    codes = next(iter(tensors))
    known = found.get(codes)
    if known is None:
        name = node.metadata_props.get(WEIGHT_PROPERTY) or _plain_name(codes.name or node.name or "")
        found[codes] = Part(
            name, said.n, said.k, said.bits, said.label, (node,), (said.kind,), tuple(tensors), said.decode
        )
        return
    found[codes] = dataclasses.replace(
        known,
        nodes=(*known.nodes, node),
        kinds=tuple(dict.fromkeys((*known.kinds, said.kind))),
        tensors=tuple(dict.fromkeys((*known.tensors, *tensors))),
    )


def _plain_name(name: str) -> str:
    """The weight's name without what quantisers append to that of its codes."""
    for suffix in (".packed", ".codes", "_quantized", "_Q4", "_Q8", "_Q2", "_quant"):
        name = name.removesuffix(suffix)
    return name


def _elements(value: ir.Value) -> int:
    tensor = initializer(value)
    return 0 if tensor is None else int(np.prod(tensor.shape.numpy(), dtype=np.int64))


def _type(value: ir.Value) -> ir.DataType | None:
    tensor = initializer(value)
    return None if tensor is None else tensor.dtype


def _array(value: ir.Value | None) -> np.ndarray:
    """The tensor that alone is behind a value, as it is stored: an initializer, or else what a Constant node holds."""
    behind = stored_behind(value)
    stored = [v for v in behind if v.is_initializer()] or behind
    (tensor,) = (t for v in stored if (t := initializer(v)) is not None)
    return read_array(tensor)


def _describe_ours(node: ir.Node) -> _Found:
    n, k = node.attributes.get_int("N", 0), node.attributes.get_int("K", 0)
    bits, group = node.attributes.get_int("bits", 0), node.attributes.get_int("group_size", 32)
    gain = node.attributes.get_float("gain", 1.0)
    zeros = _array(node.inputs[3])
    if zeros.size > 1:
        zero_point = ZeroPoint.PER_GROUP
    else:
        middle = int(zeros.ravel()[0]) == UniformFormat(bits, group).quantize_zero((2**bits - 1) / 2)
        zero_point = ZeroPoint.MIDRISE if middle else ZeroPoint.INTEGER
    column = group >= ceil_div(k, 32) * 32
    grid = UniformFormat(bits, None if column else group, zero_point)

    def decode() -> np.ndarray:
        arrays = PackedUniform(_array(node.inputs[1]), _array(node.inputs[2]), zeros)
        return UniformEncoding.unpack(arrays, grid, n, k, gain).dequantize()

    kind = "table" if node.op_type == "LowBitGather" else "linear"
    return _Found(n, k, bits, grid.label(), kind, decode)


def _describe_codebook(node: ir.Node) -> _Found | None:
    n, k = node.attributes.get_int("N", 0), node.attributes.get_int("K", 0)
    bits, window = node.attributes.get_int("bits", 0), node.attributes.get_int("window", 0)
    group, gain = node.attributes.get_int("group_size", 32), node.attributes.get_float("gain", 1.0)
    column = group >= ceil_div(k, 32) * 32
    try:
        format = CodebookFormat(bits, window, None if column else group)
    except ValueError:
        return _Found(n, k, bits, f"table of {1 << window} levels", "linear", None)

    def decode() -> np.ndarray:
        codes = unpack_codes(_array(node.inputs[1]), ceil_div(n, TILE_N) * TILE_N, k)
        scales = untile_groups(_array(node.inputs[3]), n)
        return CodebookEncoding(format, codes, scales, gain).dequantize()

    # A table of other levels decodes otherwise: it can't be compared.
    known = np.array_equal(_array(node.inputs[2]), format.table)
    return _Found(n, k, bits, format.label(), "linear", decode if known else None)


def _describe_mixed(node: ir.Node) -> _Found:
    n, k = node.attributes.get_int("N", 0), node.attributes.get_int("K", 0)
    band, gain = node.attributes.get_int("band", 0), node.attributes.get_float("gain", 1.0)
    depths, order = _array(node.inputs[2]), _array(node.inputs[5])
    try:
        format = MixedFormat.of(band, order, depths)
        bits = format.mean_depth(n)
    except ValueError:
        return _Found(n, k, float(depths.mean()), "mixed depths", "linear", None)

    def decode() -> np.ndarray:
        arrays = PackedMixed(_array(node.inputs[1]), depths, _array(node.inputs[3]), _array(node.inputs[4]))
        return MixedEncoding.unpack(arrays, order, band, n, gain).dequantize()

    # Other levels decode otherwise: they can't be compared.
    known = np.array_equal(_array(node.inputs[6]), tables()) and np.array_equal(_array(node.inputs[7]), steps())
    return _Found(n, k, bits, format.label(), "linear", decode if known else None)


def _describe_float8(node: ir.Node) -> _Found:
    n, k = node.attributes.get_int("N", 0), node.attributes.get_int("K", 0)
    group, gain = node.attributes.get_int("group_size", k), node.attributes.get_float("gain", 1.0)
    mantissa_bits, bias = node.attributes.get_int("mantissa_bits", 0), node.attributes.get_int("exponent_bias", 0)
    reader, scales = "table" if node.op_type == "Float8Gather" else "linear", _array(node.inputs[2])
    try:
        kind = Float8Kind.of(mantissa_bits, bias)
    except ValueError:
        return _Found(n, k, 8, "float8 of no known kind", reader, None)
    format = Float8Format(kind, None if group >= k else group, one_scale=scales.size == 1 < n)

    def decode() -> np.ndarray:
        return Float8Encoding(format, _array(node.inputs[1]), scales, gain).dequantize()

    return _Found(n, k, 8, format.label(), reader, decode)


def _describe_binary(node: ir.Node) -> _Found:
    k, group = node.attributes.get_int("K", 0), node.attributes.get_int("group_size", 0)
    planes, gain = tuple(node.attributes.get_ints("plane_rows", ())), node.attributes.get_float("gain", 1.0)
    arrays = PackedBinary(*(_array(value) for value in node.inputs[1:5]))
    reader = "table" if node.op_type == "MixedBitGather" else "linear"
    # Only several values can be offsets and ranks: a row has a tile of its own.
    offset, ordered = arrays.offsets.size > 1, arrays.rank.size > 1
    try:
        format = BinaryFormat(planes, None if group >= k else group, offset, ordered)
    except ValueError:
        return _Found(node.attributes.get_int("N", 0), k, len(planes), "binary codes", reader, None)

    def decode() -> np.ndarray:
        return BinaryEncoding.unpack(arrays, format, k, gain).dequantize()

    return _Found(planes[0], k, format.mean_planes(), format.label(), reader, decode)


def _fields(packed: np.ndarray, bits: int) -> np.ndarray:
    """Bytes [..., B] of low-first fields to codes [..., B * 8 / bits]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes: np.ndarray = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(*packed.shape[:-1], -1)


def _decode_blocks(
    codes: np.ndarray, scales: ir.Value | None, zeros: ir.Value | None, bits: int, block: int, k: int
) -> np.ndarray:
    """Codes [N, >= K] of MatMulNBits or GatherBlockQuantized to float32 [N, K]."""
    n = len(codes)
    steps = _array(scales).reshape(n, -1).astype(np.float32)
    middle: np.ndarray = np.full(steps.shape, 1 << (bits - 1), np.float32)
    if zeros is not None:
        stored = _array(zeros)
        if stored.dtype == np.uint8:
            middle = _fields(stored.reshape(n, -1), bits)[:, : steps.shape[1]].astype(np.float32)
        else:
            middle = stored.reshape(n, -1).astype(np.float32)
    wide = [np.repeat(side, block, axis=1)[:, :k] for side in (steps, middle)]
    decoded: np.ndarray = (codes[:, :k].astype(np.float32) - wide[1]) * wide[0]
    return decoded


def _describe_nbits(node: ir.Node) -> _Found:
    n, k = node.attributes.get_int("N", 0), node.attributes.get_int("K", 0)
    bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 32)
    zeros = node.inputs[3] if len(node.inputs) > 3 else None

    def decode() -> np.ndarray:
        return _decode_blocks(
            _fields(_array(node.inputs[1]).reshape(n, -1), bits), node.inputs[2], zeros, bits, block, k
        )

    return _Found(n, k, bits, f"int{bits} blocks of {block}", "linear", decode)


def _describe_rows(node: ir.Node) -> _Found | None:
    tensor = initializer(stored_behind(node.inputs[0])[0])
    if tensor is None or len(tensor.shape) != 2:
        return None
    bits = node.attributes.get_int("bits", 4) if tensor.dtype == ir.DataType.UINT8 else tensor.dtype.bitwidth
    n, width = (int(dim) for dim in tensor.shape.numpy())
    k = width * 8 // bits if tensor.dtype == ir.DataType.UINT8 else width
    block = node.attributes.get_int("block_size", 128) or k
    zeros = node.inputs[3] if len(node.inputs) > 3 else None

    def decode() -> np.ndarray:
        return _decode_blocks(_fields(_array(node.inputs[0]), bits), node.inputs[2], zeros, bits, block, k)

    packed = tensor.dtype == ir.DataType.UINT8
    return _Found(n, k, bits, f"int{bits} blocks of {block}", "table", decode if packed else None)


def _describe_dequantize(node: ir.Node) -> _Found | None:
    tensor = initializer(stored_behind(node.inputs[0])[0])
    if tensor is None or not len(tensor.shape):
        return None
    dims = tuple(int(dim) for dim in tensor.shape.numpy())
    users = [user for output in node.outputs for user in output.consumers()]
    table = any(user.op_type == "Gather" for user in users)
    turned = len(dims) == 2 and any(
        user.op_type == "MatMul" or (user.op_type == "Gemm" and not user.attributes.get_int("transB", 0))
        for user in users
    )
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    one_scale = all(_elements(value) == 1 for value in stored_behind(node.inputs[1]))
    grouping = f"blocks of {block}" if block else "per tensor" if one_scale else "per column"
    flat = (dims[0], int(np.prod(dims[1:], dtype=np.int64)))
    n, k = (flat[1], flat[0]) if turned else flat

    def decode() -> np.ndarray:
        stored = _array(node.inputs[0]).astype(np.float32)
        sides = [_array(node.inputs[1]).astype(np.float32)]
        sides.append(
            _array(node.inputs[2]).astype(np.float32)
            if len(node.inputs) > 2 and node.inputs[2] is not None
            else np.zeros_like(sides[0])
        )
        if block:
            sides = [np.take(np.repeat(side, block, axis=axis), range(dims[axis]), axis=axis) for side in sides]
        elif sides[0].size > 1:
            along = [1] * len(dims)
            along[axis] = dims[axis]
            sides = [side.reshape(along) for side in sides]
        matrix = ((stored - sides[1]) * sides[0]).reshape(flat)
        return np.ascontiguousarray(matrix.T) if turned else matrix

    name = tensor.dtype.name.lower()
    return _Found(n, k, tensor.dtype.bitwidth, f"{name} {grouping}", "table" if table else "linear", decode)


def _describe_integer(node: ir.Node) -> _Found | None:
    operand = node.inputs[_READERS[node.domain, node.op_type][0][0]]
    tensor = initializer(stored_behind(operand)[0])
    if tensor is None or len(tensor.shape) < 2:
        return None
    dims = tuple(int(dim) for dim in tensor.shape.numpy())
    k, n = dims[-2], int(np.prod(dims, dtype=np.int64)) // max(dims[-2], 1)
    return _Found(n, k, 8, f"{tensor.dtype.name.lower()} product", "linear", None)


# Readers that may stand between the transforms of a frame.
_FRAMED = {
    (ops.DOMAIN, "LowBitMatMul"),
    (ops.DOMAIN, "LowBitGather"),
    (ops.DOMAIN, "CodebookMatMul"),
    ("com.microsoft", "MatMulNBits"),
    ("com.microsoft", "GatherBlockQuantized"),
    ("", "DequantizeLinear"),
}
_Describe = Callable[[ir.Node], "_Found | None"]
_READERS: Mapping[tuple[str, str], tuple[tuple[int, ...], _Describe]] = {
    (ops.DOMAIN, "LowBitMatMul"): ((1, 2, 3), _describe_ours),
    (ops.DOMAIN, "LowBitGather"): ((1, 2, 3), _describe_ours),
    (ops.DOMAIN, "CodebookMatMul"): ((1, 3, 4), _describe_codebook),  # weights share tables
    (ops.DOMAIN, "MixedBitMatMul"): ((1, 2, 3, 4), _describe_mixed),  # they share orders too
    (ops.DOMAIN, "Float8MatMul"): ((1, 2), _describe_float8),
    (ops.DOMAIN, "Float8Gather"): ((1, 2), _describe_float8),
    (ops.DOMAIN, "BinaryCodeMatMul"): ((1, 2, 3, 4), _describe_binary),
    (ops.DOMAIN, "MixedBitGather"): ((1, 2, 3, 4), _describe_binary),
    ("com.microsoft", "MatMulNBits"): ((1, 2, 3), _describe_nbits),
    ("com.microsoft", "GatherBlockQuantized"): ((0, 2, 3), _describe_rows),
    ("", "DequantizeLinear"): ((0, 1, 2), _describe_dequantize),
    ("", "MatMulInteger"): ((1, 3), _describe_integer),
    ("", "QLinearMatMul"): ((3, 4, 5), _describe_integer),
    ("com.microsoft", "DynamicQuantizeMatMul"): ((1, 2, 3), _describe_integer),
    ("com.microsoft", "MatMulIntegerToFloat"): ((1, 3, 5), _describe_integer),
}
