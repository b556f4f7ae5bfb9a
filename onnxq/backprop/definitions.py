"""Operators that run by the definition the ONNX standard gives: a function of simpler operators.

The large operators of the newest sets have many optional inputs; their definition is exact, and differentiable
because its parts are.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx.defs
import onnx_ir as ir
from torch import Tensor

from onnxq.backprop.convert import onnx_type
from onnxq.errors import ModelError

DEFINED = ("Attention", "MeanVarianceNormalization", "RotaryEmbedding", "Shrink")
"""Standard operators that are run by their definition."""


class Definitions:
    """Function bodies of nodes, made once for each use that differs in attributes, types or ranks."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], ir.Function] = {}

    def body(self, node: ir.Node, opset: int, inputs: list[Tensor | None]) -> ir.Function:
        """The definition of a node's operator for these inputs.

        Raises:
            ModelError: the standard has none.
        """
        described = tuple(None if t is None else (t.dtype, tuple(t.shape)) for t in inputs)
        key = (id(node), opset, described)
        if key not in self._made:
            self._made[key] = _define(node, opset, inputs)
        return self._made[key]


def defaults(node: ir.Node, opset: int) -> dict[str, ir.Attr]:
    """The attributes that a node leaves to the standard."""
    schema: Any = onnx.defs.get_schema(node.op_type, opset, "")
    return {
        name: ir.serde.deserialize_attribute(attribute.default_value)
        for name, attribute in schema.attributes.items()
        if not attribute.required and attribute.default_value.name and name not in node.attributes
    }


def _define(node: ir.Node, opset: int, inputs: list[Tensor | None]) -> ir.Function:
    schema: Any = onnx.defs.get_schema(node.op_type, opset, "")
    proto = onnx.FunctionProto()
    if schema.has_context_dependent_function:
        version = _newest(schema.context_dependent_function_opset_versions, opset)
        types = [b"" if t is None else _type_of(t).SerializeToString() for t in inputs]
        text = schema.get_context_dependent_function_with_opset_version(
            version, ir.to_proto(node).SerializeToString(), types
        )
    elif schema.has_function:
        text = schema.get_function_with_opset_version(_newest(schema.function_opset_versions, opset))
    else:
        raise ModelError(f"operator set {opset} gives no definition of {node.op_type}")
    proto.ParseFromString(text)
    made = {name for inner in proto.node for name in inner.output}
    for name in proto.output:
        if name not in made:  # an output that the node does not ask for; positions must stay
            proto.node.add(op_type="Constant", output=[name]).attribute.add(name="value_int", type=2, i=0)
    return ir.serde.deserialize_function(proto)


def _newest(versions: list[int], opset: int) -> int:
    return max(version for version in versions if version <= opset)


def _type_of(tensor: Tensor) -> onnx.TypeProto:
    type_ = onnx.TypeProto()
    type_.tensor_type.elem_type = int(onnx_type(tensor.dtype))
    for size in tensor.shape:
        type_.tensor_type.shape.dim.add().dim_value = size
    return type_
