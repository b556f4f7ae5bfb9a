"""The pass that folds a frame between two weights into both: no transform is left at run time.

    y = W2 (W1 x + b1)   ->   y = (W2 A^T) (A W1 x + A b1),        A^T A = I

Rules (cited in the code):

1. Between the two lies nothing but the first one's bias: a norm or an activation function does not commute with A.
2. All that reads the first one's output are products with weights that are to be in the frame; all of them take part.
3. Each of the weights has that one use, and is stored as float32: what is folded in is stored nowhere else.
4. The weight in front is to be quantised too: what stays in float stays as it is, and does not grow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnxq.frames import Frame
from onnxq.graph import Site, Weight
from onnxq.graph.rewrite_utils import RemoveDeadPass
from onnxq.graph.tensors import constant_tensor, is_bias, read_array


@dataclasses.dataclass(frozen=True)
class Folded:
    """What was done about one tensor.

    Attributes:
        before: the weight in front, now A W1.
        after: the weights behind, now W2 A^T, by name.
    """

    before: str
    after: tuple[str, ...]


class FoldFramesPass(ir.passes.InPlacePass):
    """Folds frames where the rules allow it. Weights have to be found anew afterwards.

    Memory: two copies of the weights of one place at a time, and in all what the folded ones take.

    Args:
        weights: all of the model.
        frame_of: the frame that a weight is to be in, or None.
        may_change: whether a weight will be quantised, which it need not be in a frame.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        frame_of: Callable[[Weight], Frame | None],
        may_change: Callable[[Weight], bool] = lambda _: True,
    ) -> None:
        self._weights = weights
        self._frame_of = frame_of
        self._may_change = may_change
        self.folded: list[Folded] = []

    @property
    def origins(self) -> dict[str, str]:
        """Names of the new weights, and those of the weights that they were made of."""
        return {folded_name(name): name for item in self.folded for name in (item.before, *item.after)}

    @property
    def in_frame(self) -> frozenset[str]:
        """Names of the new weights whose inputs are coefficients already."""
        return frozenset(folded_name(name) for item in self.folded for name in item.after)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the module's docstring."""
        by_node = {site.node: weight for weight in self._weights for site in weight.sites if site.kind == "linear"}
        touched: set[str] = set()
        for weight in self._weights:
            if weight.name in touched or not _alone(weight) or not self._may_change(weight):  # rule 4
                continue
            found = _place(weight.sites[0], by_node)
            if found is None:
                continue
            bias, readers = found
            frames = [self._frame_of(reader) for reader in readers]
            if frames[0] is None or any(frame is None or frame.key != frames[0].key for frame in frames):  # rule 2
                continue
            if any(reader.name in touched for reader in readers):
                continue  # what was read of it before no longer holds
            touched |= {weight.name, *(reader.name for reader in readers)}
            self.folded.append(_fold(model, weight, bias, readers, frames[0]))
        if self.folded:
            RemoveDeadPass()(model)
        return ir.passes.PassResult(model, bool(self.folded))


def folded_name(name: str) -> str:
    """What a tensor is called that a frame is folded into."""
    return f"{name}.folded"


def _alone(weight: Weight) -> bool:
    """Rule 3, and a product that the matrix stands right of."""
    if len(weight.sites) != 1 or weight.batch != 1 or weight.other_uses or weight.dtype != ir.DataType.FLOAT:
        return False
    site = weight.sites[0]
    if site.kind != "linear" or site.side != "right" or site.dtype != ir.DataType.FLOAT:
        return False
    if not isinstance(site.graph, ir.Graph):
        return False
    node = site.node
    factors = (node.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
    return node.op_type == "MatMul" or (all(factor == 1.0 for factor in factors) and not _flag(node, "transA"))


def _flag(node: ir.Node, name: str) -> bool:
    return node.attributes.get_int(name, 0) != 0


def _place(site: Site, by_node: dict[ir.Node, Weight]) -> tuple[tuple[ir.Node, int] | None, tuple[Weight, ...]] | None:
    """A product's bias, as a node's input, and the weights that read what comes out; None where rule 1 or 2 fails."""
    output = site.node.outputs[0]
    bias: tuple[ir.Node, int] | None = None
    if site.node.op_type == "Gemm":
        if len(site.node.inputs) > 2 and site.node.inputs[2] is not None:
            bias = (site.node, 2)
    elif len(output.consumers()) == 1 and output.consumers()[0].op_type == "Add" and not output.is_graph_output():
        add = output.consumers()[0]
        bias = (add, 1 if add.inputs[0] is output else 0)
        output = add.outputs[0]
    if bias is not None and not is_bias(bias[0].inputs[bias[1]], site.n):
        return None
    readers = []
    for node, index in output.uses():
        reader = by_node.get(node)
        if reader is None or not _alone(reader) or index == reader.sites[0].weight_input:  # rule 2
            return None
        if node.graph is not site.graph:
            return None
        readers.append(reader)
    return None if not readers or output.is_graph_output() else (bias, tuple(readers))


def _fold(
    model: ir.Model, weight: Weight, bias: tuple[ir.Node, int] | None, readers: tuple[Weight, ...], frame: Frame
) -> Folded:
    turned = frame.analysis(np.ascontiguousarray(weight.matrix().T)).T
    _replace(model, weight.sites[0].node, weight.sites[0].weight_input, weight.name, turned)
    if bias is not None:
        node, index = bias
        tensor = constant_tensor(node.inputs[index])
        assert tensor is not None, "_place looked at it"
        vector = frame.analysis(read_array(tensor))
        _store(model, node, index, f"{weight.name}.bias", vector)
    for reader in readers:
        site = reader.sites[0]
        _replace(model, site.node, site.weight_input, reader.name, frame.analysis(reader.matrix()))
    # Shapes of what lies between may have changed.
    output = weight.sites[0].node.outputs[0]
    between = [output, *(value for node in output.consumers() if node.op_type == "Add" for value in node.outputs)]
    for value in between:
        if value.shape is not None:
            value.shape = ir.Shape([*value.shape[:-1], frame.shape.coefficients])
    return Folded(weight.name, tuple(reader.name for reader in readers))


def _replace(model: ir.Model, node: ir.Node, index: int, name: str, matrix: np.ndarray) -> None:
    """Puts a matrix [N, K] where a product reads its right factor."""
    stored = matrix if node.op_type == "Gemm" and _flag(node, "transB") else matrix.T
    _store(model, node, index, name, stored)


def _store(model: ir.Model, node: ir.Node, index: int, name: str, array: np.ndarray) -> None:
    tensor = ir.tensor(np.ascontiguousarray(array, np.float32), name=folded_name(name))
    value = ir.Value(
        name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape)
    )
    model.graph.register_initializer(value)
    node.replace_input_with(index, value)
