"""The small vectors around quantised weights that can be trained: biases of layers, parameters of norms.

1. A layer's bias is Gemm's third input, or what an Add puts on top of a MatMul's result (a Cast may be between).
2. A norm's parameters are the second and third input of a norm operator.
3. Norms that exporters write out end in x / sqrt(mean + epsilon), or x times its reciprocal: the Mul behind that has
   the gain, and the Add behind the Mul the bias.
4. All of them must be initializers that no caller can replace, of a float type, with one axis longer than 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from onnxq.graph import Site
from onnxq.graph.constants import is_constant
from onnxq.graph.load import all_nodes
from onnxq.graph.tensors import WEIGHT_TYPES, constant_tensor

NORM_OPS = (
    "BatchNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
)

_DENOMINATOR_OPS = ("Add", "Cast", "Clip", "Max", "Pow", "Reciprocal", "Sqrt", "Div")


def layer_biases(sites: Iterable[Site]) -> list[ir.Value]:
    """The biases of linear sites, each once (rule 1)."""
    found: dict[ir.Value, None] = {}
    for site in sites:
        if site.kind != "linear":
            continue
        if site.node.op_type == "Gemm":
            found.update(dict.fromkeys(_vectors(site.node.inputs[2:3])))
        else:
            found.update(dict.fromkeys(_added(site.node.outputs[0])))
    return list(found)


def norm_parameters(model: ir.Model) -> list[ir.Value]:
    """Gains and biases of all norms of a model, each once (rules 2 and 3)."""
    found: dict[ir.Value, None] = {}
    for node in all_nodes(model):
        if node.op_type in NORM_OPS and node.domain == "":
            found.update(dict.fromkeys(_vectors(node.inputs[1:3])))
        elif node.op_type == "Mul" and node.domain == "" and any(_is_normalised(v) for v in node.inputs):
            gains = list(_vectors(node.inputs))
            found.update(dict.fromkeys(gains))
            if gains:
                found.update(dict.fromkeys(_added(node.outputs[0])))
    return list(found)


def _vectors(values: Iterable[ir.Value | None]) -> Iterator[ir.Value]:
    """Those that can be trained (rule 4)."""
    for value in values:
        tensor = constant_tensor(value)
        if value is None or tensor is None or not value.is_initializer() or tensor.dtype not in WEIGHT_TYPES:
            continue
        if 1 < tensor.size == max(tensor.shape.numpy(), default=0):
            yield value


def _added(value: ir.Value) -> Iterator[ir.Value]:
    """Vectors that an Add puts on a value."""
    for node in value.consumers():
        if node.domain == "" and node.op_type == "Cast":
            yield from _added(node.outputs[0])
        elif node.domain == "" and node.op_type == "Add":
            yield from _vectors(v for v in node.inputs if v is not value)


def _is_normalised(value: ir.Value | None) -> bool:
    """Whether a value is a quotient, or product, with a root of a mean (rule 3)."""
    node = _producer(value)
    while node is not None and node.op_type == "Cast":
        node = _producer(node.inputs[0])
    return node is not None and node.op_type in ("Div", "Mul") and any(_is_root_of_mean(v) for v in node.inputs)


def _is_root_of_mean(value: ir.Value | None) -> bool:
    rooted = False
    node = _producer(value)
    while node is not None and node.op_type in _DENOMINATOR_OPS:
        computed = [v for v in node.inputs if v is not None and not is_constant(v)]
        if len(computed) != 1:
            return False
        rooted = rooted or node.op_type in ("Sqrt", "Pow")
        node = _producer(computed[0])
    return rooted and node is not None and node.op_type == "ReduceMean"


def _producer(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" else None
