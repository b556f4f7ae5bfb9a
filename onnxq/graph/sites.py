"""Find the sites: every use of a constant matrix that a low-bit operator could take over."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from onnxq.graph.constants import (
    VIEW_OPS,
    Place,
    Refusal,
    Seen,
    follow,
    int_attribute,
    is_constant,
    places,
    stored_constants,
)
from onnxq.graph.layout import Layout
from onnxq.graph.load import OWN_DOMAIN
from onnxq.graph.naming import make_unique
from onnxq.graph.tensors import WEIGHT_TYPES

_QUANTISED_OPS = frozenset(
    [
        "DequantizeLinear", "QuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv",
        "QGemm", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits", "MatMulBnb4", "MatMulFpQ4",
        "GatherBlockQuantized", "QAttention", "QMoE", "QEmbedLayerNormalization",
    ]
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Site:
    """One use of a constant matrix by one node.

    Attributes:
        kind: "linear" (MatMul, Gemm) or "table" (Gather of rows).
        node: the node that uses it.
        weight_input: the index of the node's input that is the constant.
        scope: where the node stands (see `onnxq.graph.constants.Place`).
        root: the initializer, or the output of the Constant node, that stores it.
        chain: the view operators between ``root`` and ``node``, in order.
        side: for linear sites, whether the constant is the right or the left factor; "right" for tables.
        input: the other operand: activations [..., K] (side "right"), [..., K, columns] (side "left", or as
            Gemm's transA and transB say), or the indices of a table.
        name: the node's name, made unique in the model.
        graph: the graph or function that holds the node.
        order: the node's number in a walk through the whole model.
        shape: shape of the constant as the node reads it, after ``chain``.
        dtype: its element type there, which is also the type of the activations.
        layout: the view of ``root`` that is the site's matrix [batch * n, k].
        batch: number of matrices (1 unless the constant has leading axes longer than 1).
        n: outputs (rows of a table) of one matrix.
        k: inputs (row width of a table).
    """

    kind: Literal["linear", "table"]
    node: ir.Node
    weight_input: int
    scope: str
    root: ir.Value
    chain: tuple[ir.Node, ...]
    side: Literal["right", "left"]
    input: ir.Value
    name: str
    graph: ir.Graph | ir.Function
    order: int
    shape: tuple[int, ...]
    dtype: ir.DataType
    layout: Layout
    batch: int
    n: int
    k: int


@dataclass(frozen=True, eq=False)
class Constant:
    """A stored constant with all that uses it.

    Attributes:
        value: the initializer, or the output of the Constant node.
        tensor: its data.
        sites: uses as a constant matrix, in walking order.
        refusals: every other use, and why it is no site.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]


def find_constants(model: ir.Model) -> list[Constant]:
    """Every stored constant of the model with its sites and its other uses. Reads no weight.

    A use is a site when:

    1. The constant is an initializer no caller can override, or a Constant node's output, of a float weight
       type.
    2. It reaches the node directly or through view operators (`onnxq.graph.constants.follow`), in any scope.
    3. The node is a standard MatMul or Gemm whose other operand is computed at run time.
    4. At a MatMul the constant has two axes at least; axes before the last two are a batch.
    5. A Gemm's ``transA`` and ``transB`` are written in the node. ``alpha``, ``beta`` and the bias are left
       to the rewrite.
    6. The sum runs over more than one element (K > 1): outer products, as with rotary frequencies, are no
       compression target.
    7. Or the node is a standard Gather of whole rows: two axes, axis 0.
    """
    where = places(model)
    found = []
    for value, tensor in stored_constants(model):
        tracer = _Tracer(model, where, value)
        if value.is_initializer() and value.is_graph_input():  # rule 1
            tracer.refuse("also a graph input, which a caller may replace: export without initializers as inputs")
        else:
            tracer.trace(value, Seen(Layout.identity(tuple(tensor.shape.numpy())), tensor.dtype), ())
        sites = sorted(tracer.sites, key=lambda site: site.order)
        if sites and tensor.dtype not in WEIGHT_TYPES:  # rule 1
            tracer.refuse(f"{tensor.dtype.name}: only float32, float16, bfloat16 and double weights are encoded")
            sites = []
        found.append(Constant(value, tensor, tuple(sites), tuple(tracer.refusals)))
    return _with_unique_names(found)


class _Tracer:
    """Walks from one constant to all that reads it."""

    def __init__(self, model: ir.Model, where: dict[ir.Node, Place], root: ir.Value) -> None:
        self.model, self.where, self.root = model, where, root
        self.sites: list[Site] = []
        self.refusals: list[Refusal] = []

    def refuse(self, reason: str) -> None:
        self.refusals.append(Refusal(reason))

    def trace(self, value: ir.Value, seen: Seen, chain: tuple[ir.Node, ...]) -> None:
        if value.is_graph_output():
            self.refuse("graph output" if value.graph is self.model.graph else "output of a subgraph or function")
        for node, index in value.uses():
            if node not in self.where:  # cut out of the graph by an earlier pass
                continue
            if node.domain == "" and node.op_type in VIEW_OPS and index == 0:  # rule 2
                after = follow(node, seen)
                if isinstance(after, Seen):
                    self.trace(node.outputs[0], after, (*chain, node))
                else:
                    self.refusals.append(after)
                continue
            decision = self._try_site(node, index, seen, chain)
            if isinstance(decision, Site):
                self.sites.append(decision)
            else:
                self.refusals.append(decision)

    def _try_site(self, node: ir.Node, index: int, seen: Seen, chain: tuple[ir.Node, ...]) -> Site | Refusal:
        if node.domain == "" and node.op_type == "MatMul":
            return self._try_linear(node, index, seen, chain, transposed=index == 1)
        if node.domain == "" and node.op_type == "Gemm" and index < 2:
            flag = int_attribute(node, "transA" if index == 0 else "transB", 0)
            if flag is None:  # rule 5
                return Refusal(f"Gemm '{node.name}' takes its transposition from its function's caller")
            return self._try_linear(node, index, seen, chain, transposed=bool(flag) == (index == 0))
        if node.domain == "" and node.op_type == "Gather" and index == 0:
            return self._try_table(node, seen, chain)
        return _refuse_use(self.model, node, index, seen.dtype)

    def _try_linear(
        self, node: ir.Node, index: int, seen: Seen, chain: tuple[ir.Node, ...], *, transposed: bool
    ) -> Site | Refusal:
        """Rules 3, 4, 6. ``transposed``: the constant has to be transposed to be [N, K]."""
        what, shape = f"{node.op_type} '{node.name}'", seen.layout.shape
        other = node.inputs[1 - index]
        if other is None or is_constant(other):  # rule 3
            return Refusal(f"both operands of {what} are constant: constant folding removes it")
        if len(shape) < 2:  # rule 4
            return Refusal(f"rank {len(shape)}: a vector operand of {what}")
        layout = seen.layout.swapped() if transposed else seen.layout
        *batch, n, k = layout.shape
        if k < 2:  # rule 6
            return Refusal(f"{what} has K = {k}: an outer product, nothing to sum over")
        count = math.prod(batch)
        side: Literal["right", "left"] = "right" if index == 1 else "left"
        return self._site("linear", node, index, chain, side, other, seen, layout.reshaped((count * n, k)), count)

    def _try_table(self, node: ir.Node, seen: Seen, chain: tuple[ir.Node, ...]) -> Site | Refusal:
        """Rule 7."""
        what, shape = f"Gather '{node.name}'", seen.layout.shape
        axis, indices = int_attribute(node, "axis", 0), node.inputs[1]
        if axis is None or indices is None:
            return Refusal(f"{what} takes its axis from its function's caller")
        if len(shape) != 2:
            return Refusal(f"rank {len(shape)}: {what} picks from an array that is no table of rows")
        if axis % 2 != 0:
            return Refusal(f"{what} picks columns (axis {axis}), not rows")
        return self._site("table", node, 0, chain, "right", indices, seen, seen.layout, 1)

    def _site(
        self,
        kind: Literal["linear", "table"],
        node: ir.Node,
        index: int,
        chain: tuple[ir.Node, ...],
        side: Literal["right", "left"],
        other: ir.Value,
        seen: Seen,
        layout: Layout,
        batch: int,
    ) -> Site:
        place, (rows, k) = self.where[node], layout.shape
        return Site(
            kind=kind,
            node=node,
            weight_input=index,
            scope=place.scope,
            root=self.root,
            chain=chain,
            side=side,
            input=other,
            name=node.name or f"{node.op_type}_{place.order}",
            graph=place.graph,
            order=place.order,
            shape=seen.layout.shape,
            dtype=seen.dtype,
            layout=layout,
            batch=batch,
            n=rows // max(batch, 1),
            k=k,
        )


def _refuse_use(model: ir.Model, node: ir.Node, index: int, dtype: ir.DataType) -> Refusal:
    """The reason why a use outside MatMul, Gemm and Gather is no site."""
    op = node.op_type if node.domain == "" else f"{node.domain}::{node.op_type}"
    what = f"{op} '{node.name}'" if node.name else op
    if node.domain == OWN_DOMAIN:
        return Refusal(f"already quantised by onnxq ({what})", quantised=True)
    if node.op_type in _QUANTISED_OPS:
        if node.op_type in ("DequantizeLinear", "QuantizeLinear") and index > 0:
            return Refusal(f"{'scale' if index == 1 else 'zero point'} of {what}", quantised=True)
        if dtype in WEIGHT_TYPES and node.op_type != "QuantizeLinear":
            return Refusal(f"scale or bias of {what}")
        return Refusal(f"already quantised ({what})", quantised=True)
    if node.op_identifier() in model.functions:
        return Refusal(f"passed to the model-local function {what}: inline functions first")
    if node.domain == "com.microsoft":
        return Refusal(f"used by {what}, fused by ONNX Runtime: start from the model as it was exported", generic=True)
    if node.op_type == "Gemm":
        return Refusal(f"bias of {what}")
    return Refusal(f"used by {what}", generic=True)


def _with_unique_names(constants: list[Constant]) -> list[Constant]:
    """Number the sites that share a name: the branches of a merged decoder repeat every node name."""
    sites = sorted((s for c in constants for s in c.sites), key=lambda s: (s.order, s.weight_input))
    renamed = {
        site: replace(site, name=name) for site, name in zip(sites, make_unique([s.name for s in sites]), strict=True)
    }
    return [replace(c, sites=tuple(renamed[s] for s in c.sites)) for c in constants]
