"""Where a node of an optimised graph comes from: which node of the file, and which of its stored tensors."""

from __future__ import annotations

import re

import onnx_ir as ir

from onnxq import ops
from onnxq.graph.tensors import WEIGHT_TYPES
from onnxq.runtime.optimized import initializer, nodes_of, stored_behind

_SMALLEST = 256
"""Codes of a weight of 1024 elements at 2 bits, in bytes."""

_FUSION_SUFFIX = re.compile(r"(/duplicated|/MatMulAddFusion|/MatmulTransposeFusion|/GemmTransposeFusion)?/?$")
_INLINED = "_inlfunc_"
_HOPS_AHEAD = 8
_HOPS_BACK = 4


class Source:
    """A model as it is in the file, for looking up what became of it."""

    def __init__(self, model: ir.Model) -> None:
        self._nodes = {node.name: node for node in nodes_of(model) if node.name}
        self._makers = {value.name: node for node in nodes_of(model) for value in node.outputs if value.name}
        self.stored = {
            name: value
            for graph in model.graphs()
            for name, value in graph.initializers.items()
            if value.const_value is not None
        }
        for node in nodes_of(model):
            if node.op_type == "Constant" and initializer(node.outputs[0]) is not None:
                self.stored[node.outputs[0].name or ""] = node.outputs[0]

    def origin(self, node: ir.Node) -> ir.Node | None:
        """The node of the file that an optimised node comes from.

        By its own name less what fusions append; else by following its outputs to a value that the file
        names, and, where a fusion joined our node with the one behind it, a few steps back from there.
        """
        named = self._nodes.get(_FUSION_SUFFIX.sub("", node.name or "")) or self._nodes.get(node.name or "")
        if named is not None:
            return named
        # Counts the nodes of its kind in between: the first named value is then made by the last of them.
        front, seen = {node: 0}, {node}
        for _ in range(_HOPS_AHEAD):
            ahead: dict[ir.Node, int] = {}
            for candidate, crossed in front.items():
                for value in candidate.outputs:
                    if value.name in self._makers:
                        return _ours_behind(self._makers[value.name], node, crossed)
                    for user in value.consumers():
                        if user not in seen:
                            ahead.setdefault(user, crossed + (user.op_type == node.op_type))
            front = ahead
            seen.update(front)
        return None

    def behind(self, value: ir.Value) -> list[ir.Value]:
        """The stored tensors of the file that a stored value of the optimised graph is or was made of."""
        if value.name in self.stored:
            return [self.stored[value.name]]
        maker = self._makers.get(value.name or "")
        if maker is None:
            return []
        return stored_behind(next(output for output in maker.outputs if output.name == value.name))

    def cone(self, origin: ir.Node | None, weights: list[ir.Value]) -> list[ir.Value]:
        """The tensors of the file that the weight of a node is made of, scales and zero points included.

        Args:
            origin: the node of the file.
            weights: the large stored values that the optimised node reads.
        """
        found: dict[ir.Value, None] = {}
        for operand in origin.inputs if origin is not None else ():
            behind = stored_behind(operand)
            if _is_one_weight(origin) or any(elements(value) >= _SMALLEST for value in behind):
                found.update(dict.fromkeys(behind))
        for value in weights:
            found.update(dict.fromkeys(self.behind(value)))
        return [value for value in found if value.is_initializer() or elements(value) >= _SMALLEST]


def _ours_behind(found: ir.Node, node: ir.Node, crossed: int) -> ir.Node:
    """The onnxq node at or before `found`, for a `node` that came out of its function body; else `found`.

    Args:
        found: the node of the file that makes the first named value behind `node`.
        node: of the optimised graph.
        crossed: how many nodes like `node` lie between the two.
    """
    name = node.name or ""
    if not name.startswith(_INLINED):
        return found
    front, seen = [found], {found}
    for _ in range(_HOPS_BACK + crossed):
        for candidate in front:
            if candidate.domain == ops.DOMAIN and any(
                f"_{part}_" in name for part in ops.body_names(candidate.op_type)
            ):
                if not crossed:
                    return candidate
                crossed -= 1
        behind = [p for n in front for v in n.inputs if v is not None and (p := v.producer()) is not None]
        front = [one for one in dict.fromkeys(behind) if one not in seen]
        seen.update(front)
    return found


def _is_one_weight(node: ir.Node | None) -> bool:
    """Whether all constant operands of a node belong to one weight: codes, scales, zero points."""
    quantised = ("MatMulNBits", "GatherBlockQuantized", "DequantizeLinear")
    return node is not None and (node.domain == ops.DOMAIN or node.op_type in quantised)


def elements(value: ir.Value) -> int:
    """Number of elements of a stored value."""
    tensor = initializer(value)
    return 0 if tensor is None else tensor.size


def stored_bytes(values: list[ir.Value]) -> int:
    """Bytes of stored values."""
    return sum(tensor.nbytes for value in values if (tensor := initializer(value)) is not None)


def is_float_matrix(value: ir.Value) -> bool:
    """Whether a stored value is a float weight of two axes or more."""
    tensor = initializer(value)
    return tensor is not None and tensor.dtype in WEIGHT_TYPES and len(tensor.shape) > 1


def is_code(value: ir.Value) -> bool:
    """Whether a stored value holds packed or narrow numbers: no float weight, index or mask."""
    tensor = initializer(value)
    if tensor is None or tensor.dtype in (*WEIGHT_TYPES, ir.DataType.BOOL, ir.DataType.STRING):
        return False
    return tensor.dtype.bitwidth <= 8


def type_names(values: list[ir.Value]) -> str:
    """Element types of stored values, for people."""
    names = [tensor.dtype.name.lower() for value in values if (tensor := initializer(value)) is not None]
    return " and ".join(dict.fromkeys("float32" if name == "float" else name for name in names))
