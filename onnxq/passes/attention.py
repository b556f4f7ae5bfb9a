"""The two products of attention, softmax(Q K^T) V, and the pass that rounds what goes into them.

Softmax itself, activation functions, normalisations, residual sums and biases stay in float.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Literal

import onnx_ir as ir

from onnxq.calibration import TapRequest
from onnxq.errors import ModelError
from onnxq.graph.constants import VIEW_OPS, is_constant, places
from onnxq.graph.naming import make_unique
from onnxq.graph.rewrite_utils import RemoveDeadPass, fresh_names
from onnxq.passes.activations import Rounding, round_activation
from onnxq.passes.rewrite import carry_functions
from onnxq.passes.share import ShareTransformsPass

_VIEWS = frozenset(["Cast", "Dropout", "Expand", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"])
# Scaling, masks, position biases and soft caps; where a row is all masked, exporters put zeros for Softmax's NaN.
_TO_SOFTMAX = _VIEWS | {"Add", "Clip", "Div", "Max", "Min", "Mul", "Sub", "Tanh", "Where"}
_FROM_SOFTMAX = _VIEWS | {"Mul", "Where"}
_INPUTS: tuple[Literal["left"], Literal["right"]] = ("left", "right")


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionProduct:
    """A product of two activations.

    Attributes:
        name: the node's, made unique in the model.
        node: the MatMul.
        role: "scores", Q K^T, or "values", softmax(...) V.
        graph: the graph that holds the node.
    """

    name: str
    node: ir.Node
    role: Literal["scores", "values"]
    graph: ir.Graph

    def requests(self) -> tuple[TapRequest, TapRequest]:
        """What calibration should look at: ``NAME/left`` and ``NAME/right``. Rows are tokens: columns of K^T."""
        left, right = self.node.inputs
        assert left is not None, "a MatMul has two operands"
        assert right is not None, "a MatMul has two operands"
        return (
            TapRequest(f"{self.name}/left", left, "ranges"),
            TapRequest(f"{self.name}/right", right, "ranges", side="left" if self.role == "scores" else "right"),
        )


def attention_products(model: ir.Model) -> list[AttentionProduct]:
    """The products of attention in the main graph and its subgraphs.

    1. The node is a standard MatMul outside model-local functions.
    2. Neither operand is a stored constant, a view of one or one dequantised, and each has three axes or more as far as
       is known.
    3. Its result goes to a Softmax, or its left operand comes from one, through scaling, masks and views alone. So
       rotary angles, a product of two computed tensors as well, are none.
    """
    found: list[tuple[ir.Node, ir.Graph, Literal["scores", "values"]]] = []
    for node, place in places(model).items():
        graph = place.graph
        if node.op_type != "MatMul" or node.domain != "" or not isinstance(graph, ir.Graph):  # rule 1
            continue
        if any(_stored(value) or (_rank(value) or 3) < 3 for value in node.inputs):  # rule 2
            continue
        if _comes_from_softmax(node.inputs[0]):  # rule 3
            found.append((node, graph, "values"))
        elif _goes_to_softmax(node.outputs[0]):
            found.append((node, graph, "scores"))
    names = make_unique([node.name or f"{role}_{number}" for number, (node, _, role) in enumerate(found)])
    return [AttentionProduct(name, node, role, graph) for name, (node, graph, role) in zip(names, found, strict=True)]


def fused_attention(model: ir.Model) -> Counter[str]:
    """Nodes in the main graph and its subgraphs that compute attention inside, out of our reach, by operator.

    Such are ONNX's Attention and ONNX Runtime's MultiHeadAttention, GroupQueryAttention and others.
    """
    return Counter(node.op_type for node in places(model) if node.op_type.endswith("Attention"))


class RoundAttentionPass(ir.passes.InPlacePass):
    """Rounds inputs of attention's products.

    A rounding by token takes a scale for each row that is summed over: of K^T and V, for each column.

    Args:
        roundings: by the site name of the request for the input (`AttentionProduct.requests`); others stay.
    """

    def __init__(self, roundings: Mapping[str, Rounding]) -> None:
        self._roundings = dict(roundings)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Returns the same model, changed in place.

        Raises:
            ModelError: the model's opset is too old, or an input has no known rank.
            ValueError: a rounding is for no input of such a product.
        """
        opset = model.graph.opset_imports[""]
        for wanted in self._roundings.values():
            wanted.check_opset(opset)
        left = dict(self._roundings)
        names = fresh_names(model)
        for product in attention_products(model):
            for index, side in enumerate(_INPUTS):
                rounding = left.pop(f"{product.name}/{side}", None)
                if rounding is not None:
                    _round_input(product, index, rounding, names)
        if left:
            raise ValueError(f"no product of attention has the input {', '.join(sorted(left))}")
        carry_functions(model, {name for wanted in self._roundings.values() for name in wanted.functions()})
        ShareTransformsPass()(model)
        RemoveDeadPass()(model)
        return ir.passes.PassResult(model, bool(self._roundings))


def _round_input(product: AttentionProduct, index: int, rounding: Rounding, names: Iterator[str]) -> None:
    value = product.node.inputs[index]
    assert value is not None, "a MatMul has two operands"
    tape = ir.tape.Tape()
    if rounding.static is None and index == 1:
        rank = _rank(value)
        if rank is None:
            raise ModelError(
                f"the right operand of '{product.name}' has no known rank, so it can't be rounded by its columns. "
                "Export the model again with shapes, run onnx's shape inference, or take static scales."
            )
        swap = {"perm": [*range(rank - 2), rank - 1, rank - 2]}
        columns = tape.op("Transpose", [value], swap)
        columns.dtype = value.dtype or ir.DataType.FLOAT
        rounded = tape.op("Transpose", [round_activation(tape, columns, rounding)], swap)
    else:
        rounded = round_activation(tape, value, rounding)
    for number, node in enumerate(tape.nodes):
        node.name = f"{product.name}/{_INPUTS[index]}/{node.op_type}_{number}"
        for output in node.outputs:
            output.name = next(names)
    product.graph.insert_before(product.node, tape.nodes)
    product.node.replace_input_with(index, rounded)


def _stored(value: ir.Value | None) -> bool:
    """Whether a value is a constant, if need be behind a DequantizeLinear: the products of stock forms have such."""
    if value is None or is_constant(value):
        return value is not None
    producer = value.producer()
    if producer is None or producer.domain != "" or producer.op_type not in (*VIEW_OPS, "DequantizeLinear"):
        return False
    return all(source is None or _stored(source) for source in producer.inputs)


def _rank(value: ir.Value | None, depth: int = 8) -> int | None:
    """The number of axes.

    Exporters that leave shapes out still say in which order axes are turned. Scales behind that have no more axes.
    """
    producer = None if value is None else value.producer()
    if value is not None and value.shape is not None:
        return len(value.shape)
    if producer is None or producer.domain != "" or not depth:
        return None
    if producer.op_type == "Transpose" and "perm" in producer.attributes:
        return len(producer.attributes["perm"].as_ints())
    if producer.op_type not in ("Cast", "Div", "Identity", "Mul"):
        return None
    return max((rank for source in producer.inputs if (rank := _rank(source, depth - 1)) is not None), default=None)


def _comes_from_softmax(value: ir.Value | None, depth: int = 16) -> bool:
    producer = None if value is None else value.producer()
    if producer is None or producer.domain != "" or not depth:
        return False
    if producer.op_type == "Softmax":
        return True
    return producer.op_type in _FROM_SOFTMAX and any(
        _comes_from_softmax(source, depth - 1) for source in producer.inputs
    )


def _goes_to_softmax(value: ir.Value, depth: int = 16) -> bool:
    return depth > 0 and any(
        user.op_type == "Softmax"
        or (user.op_type in _TO_SOFTMAX and any(_goes_to_softmax(output, depth - 1) for output in user.outputs))
        for user in value.consumers()
        if user.domain == ""
    )
