"""The pass that puts stored weights in place of float ones.

    MatMul(x, W)  ->  product(x, stored W)          Gather(T, ids)  ->  look-up(ids, stored T)

Rules (cited in the code):

1. A product with the weight on the left is turned round: W x = (x^T W^T)^T. Its input's rank must be known.
2. A bias that an Add puts on top, or Gemm's C, goes into the product where it is one constant float per output
   and nothing else reads the sum's operand; otherwise it stays an Add.
3. Gemm's alpha and beta stay factors outside the product.
4. Sites of other float types than float32 compute in float32 between two Casts: the ops have float32 activations.
5. A stack of B weights becomes B products, joined again; the input's rank and its batch axis must be known.
6. Sites in model-local functions can't see the main graph's initializers: inline the functions first.
7. A rounding of activations stands right in front of the product, behind what rules 1 and 4 put there, so that a scale
   for each token is one for each row that is summed over. Products of one input share it. Integers stand as a pair of
   QuantizeLinear and DequantizeLinear only where the form is made for it: see `onnxq.passes.activations`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from onnxq import ops
from onnxq.calibration.clipping import FLOAT8
from onnxq.graph.rewrite_utils import RemoveDeadPass, fresh_names
from onnxq.graph.sites import Site
from onnxq.graph.tensors import is_bias
from onnxq.graph.weights import Weight
from onnxq.passes.activations import ROUNDING, Rounding, round_activation
from onnxq.passes.forms.base import StoredWeight, constant
from onnxq.passes.forms.framed import TRANSFORM_PROPERTY
from onnxq.passes.forms.int8 import Int8StaticForm
from onnxq.passes.share import ShareTransformsPass

WEIGHT_PROPERTY = "onnxq.weight"
"""Metadata key of a rewritten node: which weight it reads."""

_FUNCTION_IR_VERSION = 8
_IR_VERSION_OF_BITS = {4: 10, 2: 13}
_IR_VERSION_OF_FLOAT8 = 9


@dataclasses.dataclass(frozen=True)
class Assignment:
    """A weight and what stands for it: one stored weight, or one for each member of a stack.

    Attributes:
        weight: in the model that is rewritten.
        parts: its stored form.
        rounding: of the activations in front of its products; None leaves them as they are.
    """

    weight: Weight
    parts: tuple[StoredWeight, ...]
    rounding: Rounding | None = None


def site_refusal(site: Site, weight: Weight) -> str | None:
    """Why a site can't be rewritten, or None. Checked before anything is solved."""
    if isinstance(site.graph, ir.Function):
        return "inside a model-local function"  # Rule 6
    if site.kind == "table":
        return None
    shape = site.input.shape
    if site.side == "left" and site.node.op_type == "MatMul" and shape is None:
        return "the weight is the left operand of a product whose right operand has no known rank"  # Rule 1
    if weight.batch > 1:  # Rule 5
        if site.side == "left" or site.node.op_type != "MatMul":
            return "a stack of weights as left operand"
        if shape is None or (len(shape) > 2 and shape[-3] not in (1, weight.batch)):
            return "a stack of weights whose input has no known batch axis"
    return None


class RewriteSitesPass(ir.passes.InPlacePass):
    """Replaces the sites of weights by the nodes of their stored forms.

    Args:
        assignments: the weights, found in the very model that the pass will be called on.
    """

    def __init__(self, assignments: Sequence[Assignment]) -> None:
        self._assignments = assignments

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the module's docstring."""
        needed: set[str] = set()
        names = fresh_names(model)
        opset = model.graph.opset_imports[""]
        for assignment in self._assignments:
            kinds = {site.kind for site in assignment.weight.sites}
            if assignment.rounding is not None and "linear" in kinds:
                assignment.rounding.check_opset(opset)
                needed.update(assignment.rounding.functions())
            for part in assignment.parts:
                for value in part.tensors.values():
                    if value.name not in model.graph.initializers:  # weights share some
                        model.graph.register_initializer(value)
                needed.update(part.form.functions(part, linear="linear" in kinds, table="table" in kinds))
            for site in assignment.weight.sites:
                _rewrite(site, assignment, names)
        carry_functions(model, needed)
        ShareTransformsPass()(model)
        RemoveDeadPass()(model)
        RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]  # onnx_ir leaves its __init__ untyped
        return ir.passes.PassResult(model, bool(self._assignments))


def carry_functions(model: ir.Model, op_types: Collection[str]) -> None:
    """Adds the bodies of ops, imports the domains of new nodes and raises the IR version to what their types need."""
    for op_type in sorted(op_types):
        for function in ops.functions_for(op_type, model.graph.opset_imports[""]):
            model.functions.setdefault(function.identifier(), function)
    if op_types:
        model.ir_version = max(model.ir_version, _FUNCTION_IR_VERSION)
    for graph in model.graphs():
        for node in graph:
            if node.domain == ops.DOMAIN:
                model.graph.opset_imports[ops.DOMAIN] = ops.OPSET_VERSION
            elif node.domain == "com.microsoft":
                model.graph.opset_imports.setdefault("com.microsoft", 1)
            for value in node.outputs:
                model.ir_version = max(model.ir_version, _ir_version(value.dtype))
        for value in graph.initializers.values():
            model.ir_version = max(model.ir_version, _ir_version(value.dtype))


def _ir_version(dtype: ir.DataType | None) -> int:
    if dtype is None:
        return 0
    if dtype.name.startswith("FLOAT8"):
        return _IR_VERSION_OF_FLOAT8
    unsized = dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED)
    return 0 if unsized else _IR_VERSION_OF_BITS.get(dtype.bitwidth, 0)


def _rewrite(site: Site, assignment: Assignment, names: Iterator[str]) -> None:
    tape = ir.tape.Tape()
    site_name = site.node.name
    replaced = [site.node]
    if site.kind == "table":
        result = _cast_back(tape, _table(tape, site, assignment), site)
    else:
        result, extra = _linear(tape, site, assignment)
        replaced += extra
    for node in tape.nodes:
        node.metadata_props[WEIGHT_PROPERTY] = assignment.weight.name
        for value in node.outputs:
            value.name = value.name or next(names)
        if site_name:
            product = node is result.producer() or node.domain in (ops.DOMAIN, "com.microsoft")
            product = product and node.metadata_props.get(TRANSFORM_PROPERTY) != ROUNDING
            node.name = site_name if product else None
    _make_names_unique(tape.nodes, site_name)
    old = replaced[-1].outputs[0]
    ir.convenience.replace_nodes_and_values(
        site.graph, replaced[-1], list(reversed(replaced)), tape.nodes, [old], [result]
    )


def _make_names_unique(nodes: Sequence[ir.Node], site_name: str | None) -> None:
    """The node that does the work keeps the name of the node it replaces; the others get it as a prefix."""
    if not site_name:
        return
    keeper = next((node for node in nodes if node.name == site_name), nodes[-1])
    for index, node in enumerate(nodes):
        node.name = site_name if node is keeper else f"{site_name}/{node.op_type}_{index}"


def _operand(site: Site) -> ir.Value:
    """The other operand as the graph is now: `Site.input` dates from before the sites in front were rewritten."""
    value = site.node.inputs[1 - site.weight_input]
    assert value is not None, "a site has two operands"
    return value


def _table(tape: ir.tape.Tape, site: Site, assignment: Assignment) -> ir.Value:
    (part,) = assignment.parts
    return part.form.table(tape, _operand(site), part)


def _linear(tape: ir.tape.Tape, site: Site, assignment: Assignment) -> tuple[ir.Value, list[ir.Node]]:
    """The product of a linear site, and the nodes besides the site's own that it makes superfluous."""
    x = _operand(site)
    single = site.dtype == ir.DataType.FLOAT
    if not single:  # Rule 4
        cast = tape.op("Cast", [x], {"to": int(ir.DataType.FLOAT)})
        cast.shape = x.shape
        tape.nodes[-1].metadata_props[TRANSFORM_PROPERTY] = "cast"
        x = cast
    if site.node.op_type == "Gemm":
        return _gemm(tape, site, x, assignment), []
    rank = None if x.shape is None else len(x.shape)
    if site.side == "left" and rank != 1:  # Rule 1
        assert rank is not None, "site_refusal lets no left product of unknown rank through"
        swap = {"perm": [*range(rank - 2), rank - 1, rank - 2]}
        product = _product(tape, tape.op("Transpose", [x], swap), assignment, None)
        return _cast_back(tape, tape.op("Transpose", [product], swap), site), []
    bias, add = _fusible_bias(site, assignment) if single else (None, None)  # Rule 2
    product = _product(tape, x, assignment, bias)
    return _cast_back(tape, product, site), [] if add is None else [add]


def _product(tape: ir.tape.Tape, x: ir.Value, assignment: Assignment, bias: ir.Value | None) -> ir.Value:
    rounding = assignment.rounding
    if rounding is not None:  # Rule 7
        paired = rounding.kind in FLOAT8 or all(isinstance(part.form, Int8StaticForm) for part in assignment.parts)
        x = round_activation(tape, x, rounding if paired else dataclasses.replace(rounding, stock=False))
    if len(assignment.parts) == 1:
        (part,) = assignment.parts
        return part.form.linear(tape, x, part, bias)
    # Rule 5: negative axes count from the end, so leading axes don't matter.
    stacked = x.shape is not None and len(x.shape) > 2 and x.shape[-3] == len(assignment.parts)
    axis = constant(tape, np.array([-3], np.int64))
    products = []
    for index, part in enumerate(assignment.parts):
        member = x
        if x.shape is not None and len(x.shape) > 2:
            position = constant(tape, np.array(index if stacked else 0, np.int64))
            member = tape.op("Gather", [x, position], {"axis": -3})
        products.append(tape.op("Unsqueeze", [part.form.linear(tape, member, part, None), axis]))
    return tape.op("Concat", products, {"axis": -3})


def _gemm(tape: ir.tape.Tape, site: Site, x: ir.Value, assignment: Assignment) -> ir.Value:
    node = site.node
    transposed = node.attributes.get_int("transB" if site.side == "left" else "transA", 0) != 0
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    c = node.inputs[2] if len(node.inputs) > 2 else None
    n = assignment.weight.n
    fusible = site.side == "right" and alpha == beta == 1.0 and site.dtype == ir.DataType.FLOAT
    bias = c if fusible and is_bias(c, n) else None  # Rule 2
    # On the left side x^T is wanted: that is B itself when Gemm already transposes it (rule 1).
    if transposed != (site.side == "left"):
        x = tape.op("Transpose", [x], {"perm": [1, 0]})
    result = _product(tape, x, assignment, bias)
    if site.side == "left":
        result = tape.op("Transpose", [result], {"perm": [1, 0]})
    if alpha != 1.0:  # Rule 3
        result = tape.op("Mul", [result, constant(tape, np.float32(alpha).reshape(()))])
    result = _cast_back(tape, result, site)
    if c is None or bias is not None:
        return result
    if beta != 1.0:  # Rule 3
        c = tape.op("Mul", [c, constant(tape, np.array(beta, site.dtype.numpy()))])
    return tape.op("Add", [result, c])


def _cast_back(tape: ir.tape.Tape, result: ir.Value, site: Site) -> ir.Value:
    """Back to the site's element type (rule 4)."""
    if site.dtype == ir.DataType.FLOAT:
        return result
    return tape.op("Cast", [result], {"to": int(site.dtype)})


def _fusible_bias(site: Site, assignment: Assignment) -> tuple[ir.Value | None, ir.Node | None]:
    """The bias that an Add right behind the site puts on every output, and that Add (rule 2)."""
    output = site.node.outputs[0]
    users = output.consumers()
    if assignment.weight.batch > 1 or output.is_graph_output() or len(users) != 1:
        return None, None
    add = users[0]
    if add.op_type != "Add" or add.domain != "" or add.graph is not site.graph:
        return None, None
    others = [value for value in add.inputs if value is not output]
    if len(others) == 1 and is_bias(others[0], assignment.weight.n):
        return others[0], add
    return None, None
