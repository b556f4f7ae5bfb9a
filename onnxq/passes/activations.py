"""Rounding of activations in front of a product, for the file's two targets.

                      stock                                             kernel
    float8, static    QuantizeLinear -> DequantizeLinear                onnxq.Float8Round
    float8, by token  Abs, ReduceMax, Div -> Cast -> Cast -> Mul        onnxq.Float8RoundTokens
    uint8, int8       QuantizeLinear -> DequantizeLinear                Div -> Round -> Clip -> Mul

QuantizeLinear to float8 has no zero-point input: `output_dtype` says the type. With one, ONNX Runtime drops a Relu in
front of it. In front of our ops integers are rounded without DequantizeLinear: ONNX Runtime would fuse it with the one
that a function body has for its blocked weight, to a product that fails (docs/stock_onnxruntime.md). Nodes are marked,
so that products of one input share one rounding.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnxq import ops
from onnxq.calibration.clipping import FLOAT8, INTEGERS, KINDS, ActivationScale, Kind, largest
from onnxq.errors import ModelError
from onnxq.passes.forms.base import constant
from onnxq.passes.forms.framed import TRANSFORM_PROPERTY

ROUNDING = "rounding"
"""What `TRANSFORM_PROPERTY` says of a rounding's nodes."""

_OLDEST_STATIC, _OLDEST_TOKENS = 21, 19
_TYPES = {kind: ir.DataType.from_numpy(FLOAT8[kind].dtype if kind in FLOAT8 else np.dtype(kind)) for kind in KINDS}


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How activations are rounded.

    Attributes:
        kind: the grid.
        static: the scale; None takes one for each token as it comes, which only float8 does here (for int8 see
            `onnxq.passes.forms.int8.Int8DynamicForm`).
        stock: in the arrangements that stock ONNX Runtime fuses and other providers read. Not in front of our ops.
    """

    kind: Kind
    static: ActivationScale | None
    stock: bool = False

    def __post_init__(self) -> None:
        if self.static is not None and self.static.kind != self.kind:
            raise ValueError(f"a scale for {self.static.kind} does not round to {self.kind}")
        if self.static is None and self.kind not in FLOAT8:
            raise ValueError(f"{self.kind} needs a static scale")

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"{self.kind} static" if self.static is not None else f"{self.kind} by token"

    def functions(self) -> tuple[str, ...]:
        """Names of the onnxq ops whose function bodies the model must carry."""
        if self.stock or self.kind not in FLOAT8:
            return ()
        return ("Float8RoundTokens",) if self.static is None else ("Float8Round",)

    def check_opset(self, opset: int) -> None:
        """Whether a model of the opset can hold the stock form; `onnxq.ops.functions_for` asks for the kernel's.

        Raises:
            ModelError: it can't.
        """
        if not self.stock or self.kind not in FLOAT8:
            return
        oldest = _OLDEST_TOKENS if self.static is None else _OLDEST_STATIC
        if opset < oldest:
            raise ModelError(
                f"opset {opset} is too old: rounding activations to {self.name} in standard ops needs opset {oldest} "
                "or newer. Export the model again with `onnxq export --opset 21`, or raise it with onnx's version "
                "converter."
            )


def round_activation(tape: ir.tape.Tape, x: ir.Value, rounding: Rounding) -> ir.Value:
    """Appends the rounding of x [..., K] to the tape; of x's type, float32 where that is not known.

    Other float types are rounded in float32 between two Casts.
    """
    before = len(tape.nodes)
    other = None if x.dtype in (None, ir.DataType.FLOAT) else x.dtype
    y = x if other is None else _typed(tape.op("Cast", [x], {"to": int(ir.DataType.FLOAT)}), x, ir.DataType.FLOAT)
    if not rounding.stock:
        y = _kernel(tape, y, rounding)
    elif rounding.static is None:
        y = _tokens(tape, y, rounding.kind)
    else:
        y = _pair(tape, y, rounding.static)
    y = _typed(y, x, ir.DataType.FLOAT)
    if other is not None:
        y = _typed(tape.op("Cast", [y], {"to": int(other)}), x, other)
    for node in list(tape.nodes)[before:]:
        node.metadata_props[TRANSFORM_PROPERTY] = ROUNDING
    return y


def _pair(tape: ir.tape.Tape, x: ir.Value, scale: ActivationScale) -> ir.Value:
    step = constant(tape, np.array(scale.scale, np.float32))
    code = _TYPES[scale.kind]
    if scale.zero_point is None:
        codes = tape.op("QuantizeLinear", [x, step], {"output_dtype": int(code), "saturate": 1})
        return tape.op("DequantizeLinear", [_typed(codes, x, code), step])
    zero = constant(tape, np.array(scale.zero_point, code.numpy()))
    codes = tape.op("QuantizeLinear", [x, step, zero])
    return tape.op("DequantizeLinear", [_typed(codes, x, code), step, zero])


def _tokens(tape: ir.tape.Tape, x: ir.Value, kind: Kind) -> ir.Value:
    last = constant(tape, np.array([-1], np.int64))
    bound = tape.op("ReduceMax", [tape.op("Abs", [x]), last], {"keepdims": 1})
    steps = tape.op("Div", [bound, constant(tape, np.array(largest(kind), np.float32))])
    # A row of zeros stays zeros, not 0 / 0.
    zero, one = (constant(tape, np.array(value, np.float32)) for value in (0, 1))
    steps = tape.op("Where", [tape.op("Equal", [steps, zero]), one, steps])
    codes = tape.op("Cast", [tape.op("Div", [x, steps])], {"to": int(_TYPES[kind]), "saturate": 1})
    values = tape.op("Cast", [_typed(codes, x, _TYPES[kind])], {"to": int(ir.DataType.FLOAT)})
    return tape.op("Mul", [values, steps])


def _kernel(tape: ir.tape.Tape, x: ir.Value, rounding: Rounding) -> ir.Value:
    scale = rounding.static
    if scale is not None and scale.zero_point is not None:
        low, high = (constant(tape, np.array(bound - scale.zero_point, np.float32)) for bound in INTEGERS[scale.kind])
        step = constant(tape, np.array(scale.scale, np.float32))
        steps = tape.op("Clip", [tape.op("Round", [tape.op("Div", [x, step])]), low, high])
        return tape.op("Mul", [steps, step])
    kind = FLOAT8[rounding.kind]
    attributes = {
        "mantissa_bits": kind.mantissa_bits,
        "exponent_bias": kind.bias,
        "layout_version": ops.LAYOUT_VERSION,
    }
    if scale is None:
        return tape.op("Float8RoundTokens", [x], attributes, domain=ops.DOMAIN)
    step = constant(tape, np.array(scale.scale, np.float32))
    return tape.op("Float8Round", [x, step], attributes, domain=ops.DOMAIN)


def _typed(value: ir.Value, like: ir.Value, dtype: ir.DataType) -> ir.Value:
    value.shape, value.dtype = like.shape, dtype
    return value
