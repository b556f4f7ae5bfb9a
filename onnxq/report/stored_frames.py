"""The frames around the weights of a stored model, read back from its transforms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxq import ops
from onnxq.formats.framed import from_frames
from onnxq.frames import Frame, FrameShape
from onnxq.graph.tensors import read_array
from onnxq.passes.forms.framed import FRAME_PROPERTY, TRANSFORM_PROPERTY
from onnxq.runtime.optimized import initializer

Decode = Callable[[], np.ndarray]


def around(reader: ir.Node, kind: str, n: int, k: int, decode: Decode | None) -> tuple[int, int, str, Decode | None]:
    """What a stored matrix means with the transforms around its reader.

    Args:
        reader: what reads the matrix; a DequantizeLinear stands for the one product behind it.
        kind: "linear" for products whose input 0 is their activations, "table" for look-ups.
        n, k: of the stored matrix.
        decode: that matrix.

    Returns:
        (N, K) of the weight, a remark for its label (empty without frames), and the weight, float32 [N, K]; None where
        the transforms are in standard ops or not constant.
    """
    if kind == "table":
        after = _synthesis_behind(reader.outputs[0])
        if after is None:
            return n, k, "", decode
        rows = _frame(after)
        framed = None if rows is None or decode is None else _synthesised(decode, rows, None)
        return n, _size(after, k), _remark(rows), framed
    product = _product(reader)
    before = None if product is None or product.inputs[0] is None else product.inputs[0].producer()
    if product is None or before is None or before.metadata_props.get(TRANSFORM_PROPERTY) != "analysis":
        return n, k, "", decode
    after = _synthesis_behind(product.outputs[0])
    inputs, outputs = _frame(before), None if after is None else _frame(after)
    unknown = inputs is None or decode is None or (after is not None and outputs is None)
    framed = None if unknown or inputs is None or decode is None else _synthesised(decode, inputs, outputs)
    return n if after is None else _size(after, n), _size(before, k), _remark(inputs), framed


def half_steps(reader: ir.Node) -> ir.Value | None:
    """The half steps that a product's sum of inputs is multiplied with, of levels about zero in stock ONNX Runtime."""
    add = _sole_user(reader.outputs[0], "Add")
    for value in () if add is None else add.inputs:
        factor = None if value is None else value.producer()
        if factor is not None and factor.op_type == "Mul":
            total, steps = factor.inputs
            summed = None if total is None else total.producer()
            if summed is not None and summed.op_type == "ReduceSum" and summed.inputs[0] is reader.inputs[0]:
                return steps
    return None


def _product(reader: ir.Node) -> ir.Node | None:
    return _sole_user(reader.outputs[0], "MatMul") if reader.op_type == "DequantizeLinear" else reader


def _sole_user(value: ir.Value, op_type: str | None = None) -> ir.Node | None:
    users = [user for user in value.consumers() if user.op_type != "Shape"]
    return users[0] if len(users) == 1 and op_type in (None, users[0].op_type) else None


def _synthesis_behind(value: ir.Value) -> ir.Node | None:
    """The first node of the synthesis that alone reads a product, half steps added."""
    producer, user = value.producer(), _sole_user(value)
    if user is not None and user.op_type == "Add" and producer is not None and half_steps(producer) is not None:
        user = _sole_user(user.outputs[0])
    if user is None or not (user.op_type == "FrameSynthesis" or FRAME_PROPERTY in user.metadata_props):
        return None
    return user if TRANSFORM_PROPERTY not in user.metadata_props else None  # the next weight's analysis


def _synthesised(decode: Decode, inputs: Frame, outputs: Frame | None) -> Decode:
    return lambda: from_frames(decode(), inputs, outputs)


def _remark(frame: Frame | None) -> str:
    return " in a frame" if frame is None else f" in frame {frame.shape.redundancy:.4g}"


def _size(node: ir.Node, otherwise: int) -> int:
    """Inputs of the frame that a node belongs to."""
    frame = _frame(node)
    stored = node.metadata_props.get(FRAME_PROPERTY, "")
    return int(stored) if stored.isdigit() else otherwise if frame is None else frame.shape.size


def _frame(node: ir.Node) -> Frame | None:
    if node.domain != ops.DOMAIN:
        return None
    tensors = [initializer(value) for value in node.inputs[1:3]]
    if any(tensor is None for tensor in tensors):
        return None
    signs, block = (read_array(tensor) for tensor in tensors if tensor is not None)
    left, middle, odd = (node.attributes.get_int(name, 1) for name in ("left", "middle", "odd"))
    padded = left * middle * odd
    stored = node.metadata_props.get(FRAME_PROPERTY, "")
    size = min(int(stored), padded) if stored.isdigit() else padded
    return Frame(FrameShape(size, left, middle, odd, *block.shape), signs, block)
