"""The pass that computes a transform of activations once for all products that read it."""

from __future__ import annotations

import onnx_ir as ir

from onnxq.graph.rewrite_utils import RemoveDeadPass
from onnxq.passes.forms.framed import TRANSFORM_PROPERTY


class ShareTransformsPass(ir.passes.InPlacePass):
    """Merges equal nodes among those that forms marked as transforms.

    1. Nodes are equal that have the same op, attributes and inputs; constants, the same value.
    2. The first in the graph stays: what it reads is there wherever the others stood.
    3. Graphs are looked at one by one: a branch does not lend its nodes to another.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Returns the same model, changed in place."""
        modified = False
        for graph in model.graphs():  # rule 3
            first: dict[tuple[object, ...], ir.Node] = {}
            for node in graph:
                if TRANSFORM_PROPERTY not in node.metadata_props:
                    continue
                known = first.setdefault(_key(node), node)
                if known is not node:  # rules 1 and 2
                    ir.convenience.replace_all_uses_with(node.outputs, known.outputs)
                    modified = True
        if modified:
            RemoveDeadPass()(model)
        return ir.passes.PassResult(model, modified)


def _key(node: ir.Node) -> tuple[object, ...]:
    attributes = []
    for name, attribute in sorted(node.attributes.items()):
        value = attribute.value
        if attribute.type is ir.AttributeType.TENSOR:
            array = value.numpy()
            value = (array.dtype.str, array.shape, array.tobytes())
        attributes.append((name, value if isinstance(value, tuple) else str(value)))
    return node.domain, node.op_type, tuple(attributes), tuple(id(value) for value in node.inputs)
