"""What rewrites need, before and afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxq.graph.load import all_graphs


def fresh_names(model: ir.Model) -> Iterator[str]:
    """Names for values that no graph has: left to itself each graph would count from the start, and branches shadow."""
    taken = {value.name for graph in model.graphs() for node in graph for value in node.outputs}
    return (name for count in itertools.count() if (name := f"onnxq.val.{count}") not in taken)


class RemoveDeadPass(ir.passes.InPlacePass):
    """Remove nodes and initializers that nothing reads any more.

    1. onnx-ir's own pass removes dead nodes everywhere and dead initializers of the main graph.
    2. That pass leaves the initializers of subgraphs; they go here.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Returns the same model, changed in place."""
        modified = RemoveUnusedNodesPass()(model).modified  # rule 1
        for graph in all_graphs(model):  # rule 2
            for value in list(graph.initializers.values()):
                if value.uses() or value.is_graph_output() or value.is_graph_input():
                    continue
                assert value.name is not None
                del graph.initializers[value.name]
                modified = True
        return ir.passes.PassResult(model, modified)
