"""Names of tensors that tell them apart, also in the branches of merged decoders."""

from __future__ import annotations

import difflib

import onnx_ir as ir

from onnxq.backprop.registry import subgraphs
from onnxq.errors import ModelError


class TensorNames:
    """Tensors of the main graph and of If branches by name.

    1. A tensor of the main graph goes by its name.
    2. One in a branch goes by the way there and its name: ``if_node.then_branch/name``.
    3. It also goes by its plain name where no other tensor has that.
    """

    def __init__(self, model: ir.Model) -> None:
        self._values: dict[str, ir.Value] = {}
        self._keys: dict[ir.Value, str] = {}
        self._plain: dict[str, list[ir.Value]] = {}
        self._enter(model.graph, "")

    def key(self, value: ir.Value) -> str:
        """The name of a tensor by rules 1 and 2.

        Raises:
            ModelError: it is in none of these graphs.
        """
        if value not in self._keys:
            raise ModelError(
                f"The tensor '{value.name}' is in a Loop's body, in a model-local function or in another model: it can "
                "be neither watched nor replaced. Inline functions first."
            )
        return self._keys[value]

    def value(self, name: str) -> ir.Value:
        """The tensor of that name.

        Raises:
            ModelError: there is none, or several.
        """
        if name in self._values:
            return self._values[name]
        alike = self._plain.get(name, [])
        if len(alike) == 1:
            return alike[0]
        if alike:
            raise ModelError(f"'{name}' names {len(alike)} tensors: say {', '.join(self._keys[v] for v in alike)}.")
        near = difflib.get_close_matches(name, self._values, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ModelError(f"The model has no tensor '{name}' that can be reached.{hint}")

    def _enter(self, graph: ir.Graph, way: str) -> None:
        inside = [value for node in graph for value in node.outputs]
        for value in (*graph.inputs, *graph.initializers.values(), *inside):
            if value.name:
                self._values.setdefault(way + value.name, value)
                self._keys[value] = way + value.name
                self._plain.setdefault(value.name, []).append(value)
        for node in graph:
            if node.domain == "" and node.op_type == "If":
                for attribute, branch in subgraphs(node):
                    self._enter(branch, f"{way}{node.name}.{attribute}/")
