"""What makes a node of an optimised graph fast, slow or large.

Rules, in the order they are tried (cited in the code). The limits were measured on ONNX Runtime 1.32, CPU.

1. A node of the domain onnxq runs on our kernel: fast. Those of float8 weights have float32 activations, which other
   nodes of ours may have rounded.
2. MatMulNBits is fast, except with float activations (accuracy level below 4) at 2 or 8 bits, with float zero
   points, or at 2 bits with blocks other than 32, 64 and 128: 10 to 100 times slower. Codes that are reshaped
   for it while a look-up reads them as they are stand in memory twice.
3. GatherBlockQuantized and the integer products are fast.
4. DequantizeLinear of a stored weight that is still there was not fused: it runs again at every call.
5. A node that reads packed bytes in any other way decodes them at every call; one that picks rows decodes these.
6. A stored tensor that is not in the file, made of tensors that are smaller there, was folded when the
   session was created: fast, at the price of memory.
7. A product or look-up of a float weight is as it was in the file.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import NamedTuple

import onnx_ir as ir

from onnxq import ops
from onnxq.graph.tensors import WEIGHT_TYPES
from onnxq.runtime import cures
from onnxq.runtime.optimized import initializer
from onnxq.runtime.provenance import Source, is_code, is_float_matrix, stored_bytes, type_names

_GROWTH = 1.25
"""A folded tensor is reported where it takes this many times the bytes of its file form."""

_INTEGER_PRODUCTS = frozenset(
    ["MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "QAttention"]
)
_PRODUCTS = frozenset(["MatMul", "Gemm", "FusedMatMul", "FusedGemm"])
_FLOAT_READERS = _PRODUCTS | {"Gather", "Conv", "FusedConv", "Attention"}
_VIEWS = frozenset(["Reshape", "Squeeze", "Unsqueeze", "Identity", "Shape"])
_FAST_2_BIT_BLOCKS = (32, 64, 128)
_FLOAT_ACTIVATIONS, _INT8_ACTIVATIONS = 1, 4


class Verdict(enum.Enum):
    """How a node does."""

    FAST = "fast"
    SLOW = "slow"
    FOLDED = "folded"
    FLOAT = "float"


class Decision(NamedTuple):
    """What a rule says: the verdict, what happens, and the cure, empty where nothing is wrong."""

    verdict: Verdict
    what: str
    cure: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A node of the optimised graph that reads a stored weight, with all that rules look at.

    Attributes:
        node: the node.
        weights: the large stored values it reads.
        memory_bytes: of all stored values it reads.
        origin: the node of the file that it comes from, where that can be told.
        cone: the tensors of the file that its weight is made of.
        source: the model as it is in the file.
    """

    node: ir.Node
    weights: list[ir.Value]
    memory_bytes: int
    origin: ir.Node | None
    cone: list[ir.Value]
    source: Source

    @property
    def ours(self) -> bool:
        """Whether it is, or came out of the body of, an onnxq node."""
        return self.origin is not None and self.origin.domain == ops.DOMAIN

    @property
    def grown(self) -> bool:
        """Whether the weight takes clearly more memory than in the file."""
        stored = stored_bytes(self.cone)
        return stored > 0 and self.memory_bytes > _GROWTH * stored

    @property
    def unchanged(self) -> list[ir.Value]:
        """Those of the weights that are in the file as they are."""
        return [value for value in self.weights if value.name in self.source.stored]

    @property
    def looks_up(self) -> bool:
        """Whether it picks whole rows."""
        return self.node.op_type == "Gather" and self.node.attributes.get_int("axis", 0) == 0


def judge(subject: Subject) -> Decision | None:
    """What the first rule that fits says; None where none has anything to say."""
    for rule in (
        _try_kernel,
        _try_product,
        _try_low_bit,
        _try_dequantize,
        _try_decoding,
        _try_folded,
        _try_float,
    ):
        decision = rule(subject)
        if decision is not None:
            return decision
    return None


def _try_kernel(subject: Subject) -> Decision | None:
    """Rule 1."""
    node = subject.node
    if node.domain != ops.DOMAIN:
        return None
    if node.op_type in ("LowBitGather", "Float8Gather", "MixedBitGather"):
        return Decision(Verdict.FAST, "kernel, rows decoded as they are looked up")
    if node.op_type.startswith("Frame"):
        return Decision(Verdict.FAST, "kernel, a transform of activations")
    if node.op_type.startswith("Float8Round"):
        return Decision(Verdict.FAST, "kernel, a rounding of activations")
    level = _FLOAT_ACTIVATIONS if node.op_type == "Float8MatMul" else _INT8_ACTIVATIONS
    return Decision(Verdict.FAST, f"kernel, {_activations(node, level)}")


def _try_product(subject: Subject) -> Decision | None:
    """Rule 2."""
    node = subject.node
    if node.op_type != "MatMulNBits":
        return None
    bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 0)
    level = node.attributes.get_int("accuracy_level", 0)
    zeros = initializer(node.inputs[3]) if len(node.inputs) > 3 else None
    if zeros is not None and zeros.dtype in WEIGHT_TYPES:
        what = f"{bits}-bit product with float zero points: no fast kernel"
        return Decision(Verdict.SLOW, what, cures.float_zero_points(bits))
    if level < _INT8_ACTIVATIONS and bits in (2, 8):
        what = f"{bits}-bit product at accuracy level {level}: float activations have no fast kernel"
        return Decision(Verdict.SLOW, what, cures.ACCURACY)
    if bits == 2 and block not in _FAST_2_BIT_BLOCKS:
        what = f"2-bit product in blocks of {block}: fast kernels have 32, 64 and 128"
        return Decision(Verdict.SLOW, what, cures.BLOCKS)
    if _copied(subject):
        what = "fast, but its codes are in memory twice: they are reshaped for it"
        return Decision(Verdict.FOLDED, what, cures.COPIED)
    if subject.ours and subject.grown:
        what = "the function body, folded to ONNX Runtime's own 8-bit product"
        return Decision(Verdict.FOLDED, what, cures.LIBRARY)
    return Decision(Verdict.FAST, f"{bits}-bit product of ONNX Runtime, {_activations(node, 0)}")


def _copied(subject: Subject) -> bool:
    """Whether a product reads a folded copy of codes that another node reads as they are in the file."""
    codes = subject.node.inputs[1]
    if codes is None or codes.name in subject.source.stored:
        return False
    graph = subject.node.graph
    held = graph.initializers if isinstance(graph, ir.Graph) else {}
    return any(is_code(value) and value.name in held for value in subject.source.behind(codes))


def _try_low_bit(subject: Subject) -> Decision | None:
    """Rule 3."""
    node = subject.node
    if node.op_type == "GatherBlockQuantized":
        bits = node.attributes.get_int("bits", 4)
        return Decision(Verdict.FAST, f"{bits}-bit rows, decoded as they are looked up")
    if node.op_type in _INTEGER_PRODUCTS:
        return Decision(Verdict.FAST, "int8 product of ONNX Runtime")
    return None


def _try_dequantize(subject: Subject) -> Decision | None:
    """Rule 4: what keeps a DequantizeLinear from being fused, and the cure."""
    node = subject.node
    if node.op_type != "DequantizeLinear":
        return None
    codes = node.inputs[0]
    tensor = initializer(codes)
    if codes is None or tensor is None:
        return None
    users = [user for value in node.outputs for user in value.consumers()]
    products = [user for user in users if user.op_type in _PRODUCTS or user.op_type == "Transpose"]
    turned = any(user.op_type == "Transpose" or user.attributes.get_int("transB", 0) for user in products)
    shared = len(products) > 1 or len(codes.consumers()) > 1
    again = "all of it is dequantised again at every call"
    if "FLOAT8" in tensor.dtype.name:
        what, cure = f"{tensor.dtype.name.lower()} weight, which no product takes: {again}", cures.FLOAT8
    elif any(user.op_type == "Gather" for user in users):
        what, cure = f"table in front of Gather: {again}, not only the rows looked up", cures.TABLE
    elif not products:
        names = ", ".join(sorted({user.op_type for user in users})) or "its user"
        what, cure = f"{again}: {names} takes no low-bit weight", cures.OTHER
    elif turned:
        what, cure = f"not fused, for it is transposed behind DequantizeLinear: {again}", cures.TRANSPOSED
    elif shared:
        what, cure = f"not fused, for several products share it: {again}", cures.SHARED
    else:
        what, cure = f"not fused with {products[0].op_type}: {again}", cures.unfused(node)
    return Decision(Verdict.SLOW, what, cure)


def _try_decoding(subject: Subject) -> Decision | None:
    """Rule 5."""
    if subject.node.op_type in _VIEWS or not any(map(is_code, subject.unchanged)):
        return None
    if subject.looks_up:
        return Decision(Verdict.FAST, "rows decoded as they are looked up") if subject.ours else None
    what = f"{subject.node.op_type} decodes the packed weight again at every call"
    return Decision(Verdict.SLOW, what, cures.decoding(subject.ours))


def _try_folded(subject: Subject) -> Decision | None:
    """Rule 6."""
    if not subject.grown or len(subject.unchanged) == len(subject.weights):
        return None
    types = type_names(subject.weights)
    if not subject.ours:
        return Decision(Verdict.FOLDED, f"expanded to {types} when the session is created", cures.FOLDED)
    what = "its rows are unpacked to bytes" if subject.looks_up else f"its body is decoded to {types}"
    return Decision(Verdict.FOLDED, f"{what} when the session is created", cures.LIBRARY)


def _try_float(subject: Subject) -> Decision | None:
    """Rule 7. The scales that a function body looks up are no weights."""
    if subject.ours or subject.node.op_type not in _FLOAT_READERS:
        return None
    floats = [value for value in subject.weights if is_float_matrix(value)]
    return Decision(Verdict.FLOAT, f"{type_names(floats)} weight") if floats else None


def _activations(node: ir.Node, default: int) -> str:
    level = node.attributes.get_int("accuracy_level", default)
    return "int8 activations" if level == _INT8_ACTIVATIONS else "float32 activations"
