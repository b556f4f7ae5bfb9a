"""Operators that work element by element, with broadcasting."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from onnxq.backprop.call import Call, Op, is_float
from onnxq.backprop.convert import torch_type
from onnxq.errors import ModelError


def _unary(function: Callable[[Tensor], Tensor]) -> Op:
    return lambda _, x: function(x)


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Op:
    return lambda _, a, b: function(a, b)


def _many(function: Callable[[Tensor, Tensor], Tensor]) -> Op:
    return lambda _, *inputs: functools.reduce(function, inputs)


def _divide(_: Call, a: Tensor, b: Tensor) -> Tensor:
    return a / b if is_float(a) else torch.div(a, b, rounding_mode="trunc")


def _modulo(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if call.integer("fmod", 0) else torch.remainder(a, b)


def _power(_: Call, base: Tensor, exponent: Tensor) -> Tensor:
    """The result has the base's type, whatever the exponent's."""
    if is_float(base):
        return torch.pow(base, exponent.to(base.dtype))
    return torch.pow(base.to(exponent.dtype) if is_float(exponent) else base, exponent).to(base.dtype)


def _mean(_: Call, *inputs: Tensor) -> Tensor:
    return functools.reduce(torch.add, inputs) / len(inputs)


def _clip(_: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if low is not None:
        x = torch.maximum(x, low.reshape(()))
    return x if high is None else torch.minimum(x, high.reshape(()))


def _cast(call: Call, x: Tensor) -> Tensor:
    return x.to(torch_type(call.integer("to", 1)))


def _cast_like(_: Call, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


def _where(_: Call, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(condition, x, y)


def _gelu(call: Call, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=call.text("approximate", "none"))


def _leaky_relu(call: Call, x: Tensor) -> Tensor:
    return F.leaky_relu(x, call.number("alpha", 0.01))


def _prelu(_: Call, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def _elu(call: Call, x: Tensor) -> Tensor:
    return F.elu(x, call.number("alpha", 1.0))


def _selu(call: Call, x: Tensor) -> Tensor:
    alpha, gamma = call.number("alpha", 1.67326319217681884765625), call.number("gamma", 1.05070102214813232421875)
    return gamma * F.elu(x, alpha)


def _celu(call: Call, x: Tensor) -> Tensor:
    return F.celu(x, call.number("alpha", 1.0))


def _thresholded_relu(call: Call, x: Tensor) -> Tensor:
    return torch.where(x > call.number("alpha", 1.0), x, torch.zeros_like(x))


def _hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    return torch.clamp(call.number("alpha", 0.2) * x + call.number("beta", 0.5), 0, 1)


def _hard_swish(_: Call, x: Tensor) -> Tensor:
    return x * torch.clamp(x / 6 + 0.5, 0, 1)


def _swish(call: Call, x: Tensor) -> Tensor:
    return x * torch.sigmoid(call.number("alpha", 1.0) * x)


def _softplus(_: Call, x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def _mish(call: Call, x: Tensor) -> Tensor:
    return x * torch.tanh(_softplus(call, x))


def _is_infinite(call: Call, x: Tensor) -> Tensor:
    found = torch.zeros_like(x, dtype=torch.bool)
    if call.integer("detect_positive", 1):
        found = found | torch.isposinf(x)
    return found | torch.isneginf(x) if call.integer("detect_negative", 1) else found


def _shift(call: Call, x: Tensor, by: Tensor) -> Tensor:
    if call.text("direction", "") == "LEFT":
        return torch.bitwise_left_shift(x, by)
    return torch.bitwise_right_shift(x, by)


def _dropout(_: Call, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> tuple[Tensor, ...]:
    """As at inference: nothing is dropped."""
    if training is not None and bool(training) and (ratio is None or float(ratio) > 0):
        raise ModelError("it drops elements at random; export the model for inference")
    return x, torch.ones_like(x, dtype=torch.bool)


OPS: dict[str, Op] = {
    "Abs": _unary(torch.abs),
    "Acos": _unary(torch.acos),
    "Acosh": _unary(torch.acosh),
    "Add": _binary(torch.add),
    "And": _binary(torch.logical_and),
    "Asin": _unary(torch.asin),
    "Asinh": _unary(torch.asinh),
    "Atan": _unary(torch.atan),
    "Atanh": _unary(torch.atanh),
    "BitShift": _shift,
    "BitwiseAnd": _binary(torch.bitwise_and),
    "BitwiseNot": _unary(torch.bitwise_not),
    "BitwiseOr": _binary(torch.bitwise_or),
    "BitwiseXor": _binary(torch.bitwise_xor),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": _unary(torch.ceil),
    "Celu": _celu,
    "Clip": _clip,
    "Cos": _unary(torch.cos),
    "Cosh": _unary(torch.cosh),
    "Div": _divide,
    "Dropout": _dropout,
    "Elu": _elu,
    "Equal": _binary(torch.eq),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Floor": _unary(torch.floor),
    "Gelu": _gelu,
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Identity": _unary(lambda x: x),
    "IsInf": _is_infinite,
    "IsNaN": _unary(torch.isnan),
    "LeakyRelu": _leaky_relu,
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "Log": _unary(torch.log),
    "Max": _many(torch.maximum),
    "Mean": _mean,
    "Min": _many(torch.minimum),
    "Mish": _mish,
    "Mod": _modulo,
    "Mul": _binary(torch.mul),
    "Neg": _unary(torch.neg),
    "Not": _unary(torch.logical_not),
    "Or": _binary(torch.logical_or),
    "PRelu": _prelu,
    "Pow": _power,
    "Reciprocal": _unary(torch.reciprocal),
    "Relu": _unary(torch.relu),
    "Round": _unary(torch.round),  # halves go to even in both
    "Selu": _selu,
    "Sigmoid": _unary(torch.sigmoid),
    "Sign": _unary(torch.sign),
    "Sin": _unary(torch.sin),
    "Sinh": _unary(torch.sinh),
    "Softplus": _softplus,
    "Softsign": _unary(F.softsign),
    "Sqrt": _unary(torch.sqrt),
    "Sub": _binary(torch.sub),
    "Sum": _many(torch.add),
    "Swish": _swish,
    "Tan": _unary(torch.tan),
    "Tanh": _unary(torch.tanh),
    "ThresholdedRelu": _thresholded_relu,
    "Where": _where,
    "Xor": _binary(torch.logical_xor),
}
