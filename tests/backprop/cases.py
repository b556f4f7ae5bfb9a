"""One small graph per operator and way of calling it: inputs as arrays, attributes, operator set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

_RANDOM = np.random.default_rng(7)


@dataclass(frozen=True)
class Case:
    """A call of one operator.

    Attributes:
        op: the operator.
        inputs: arrays, None where an input is left out.
        attributes: of the node.
        opset: of the model.
        outputs: number of outputs.
        reference: whether onnxruntime has no kernel for it, so that the onnx package's reference evaluator judges.
    """

    op: str
    inputs: tuple[np.ndarray | None, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 21
    outputs: int = 1
    reference: bool = False

    def __str__(self) -> str:
        shapes = ",".join("-" if a is None else f"{a.dtype}{list(a.shape)}" for a in self.inputs)
        written = ",".join(f"{k}={v}" for k, v in self.attributes.items() if not isinstance(v, onnx.TensorProto))
        return f"{self.op}-{self.opset}({shapes};{written})".replace(" ", "")

    def feeds(self) -> dict[str, np.ndarray]:
        """Inputs by name."""
        return {f"x{index}": array for index, array in enumerate(self.inputs) if array is not None}

    def model(self) -> onnx.ModelProto:
        """The model with this one node."""
        names = ["" if array is None else f"x{index}" for index, array in enumerate(self.inputs)]
        outputs = [f"y{index}" for index in range(self.outputs)]
        node = helper.make_node(self.op, names, outputs, name="the_node", **self.attributes)
        graph = helper.make_graph(
            [node],
            "g",
            [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
                for name, array in self.feeds().items()
            ],
            [helper.make_empty_tensor_value_info(name) for name in outputs],
        )
        # Output types are left to inference, as in a function's body.
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        return onnx.shape_inference.infer_shapes(proto)


def floats(*shape: int) -> np.ndarray:
    """Normal random float32."""
    return _RANDOM.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    """Uniform in [0.5, 1.5)."""
    return (_RANDOM.random(shape) + 0.5).astype(np.float32)


def inside(*shape: int) -> np.ndarray:
    """Uniform in (-0.9, 0.9)."""
    return (_RANDOM.random(shape) * 1.8 - 0.9).astype(np.float32)


def whole(low: int, high: int, *shape: int, dtype: type = np.int64) -> np.ndarray:
    """Uniform whole numbers in [low, high)."""
    return _RANDOM.integers(low, high, shape).astype(dtype)


def ints(*values: int, dtype: type = np.int64) -> np.ndarray:
    """A vector of these numbers."""
    return np.array(values, dtype)


def scalar(value: float, dtype: type = np.int64) -> np.ndarray:
    """A tensor without axes."""
    return np.array(value, dtype)


def truths(*shape: int) -> np.ndarray:
    """Random truth values."""
    return _RANDOM.random(shape) < 0.5


def tensor(array: np.ndarray) -> onnx.TensorProto:
    """For attributes."""
    return numpy_helper.from_array(array)


def _elementwise() -> Iterator[Case]:
    for op in ("Abs", "Ceil", "Cos", "Cosh", "Elu", "Erf", "Exp", "Floor", "HardSigmoid", "HardSwish", "Identity"):
        yield Case(op, (floats(2, 3) * 2,))
    for op in ("LeakyRelu", "Mish", "Neg", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus"):
        yield Case(op, (floats(2, 3) * 2,))
    for op in ("Softsign", "Tan", "Tanh", "ThresholdedRelu", "Asinh", "Atan", "Gelu", "Celu", "Dropout"):
        yield Case(op, (floats(2, 3),))
    for op in ("Acos", "Asin", "Atanh"):
        yield Case(op, (inside(2, 3),))
    for op in ("Log", "Reciprocal", "Sqrt"):
        yield Case(op, (positive(2, 3),))
    yield Case("Acosh", (positive(2, 3) + 1,))
    yield Case("Round", (np.array([0.5, 1.5, -0.5, -2.5], np.float32),))
    yield Case("Gelu", (floats(2, 3),), {"approximate": "tanh"})
    yield Case("Celu", (floats(2, 3),), {"alpha": 2.0})
    yield Case("Elu", (floats(2, 3),), {"alpha": 0.5})
    yield Case("Swish", (floats(2, 3),), {"alpha": 1.5}, opset=24, reference=True)
    yield Case("PRelu", (floats(2, 3, 4), positive(3, 1)))
    for op in ("Add", "Sub", "Mul", "Div"):
        yield Case(op, (floats(2, 3), positive(3)))
        yield Case(op, (whole(-9, 9, 2, 3), whole(1, 4, 3)))
        yield Case(op, (floats(2, 1).astype(np.float64), positive(3).astype(np.float64)))
    yield Case("Div", (ints(-7, 7, -7, 7), ints(2, 2, -2, -2)))
    yield Case("Mod", (ints(-7, 7, -7, 7), ints(2, 2, -2, -2)))
    yield Case("Mod", (ints(-7, 7, -7, 7), ints(2, 2, -2, -2)), {"fmod": 1})
    yield Case("Mod", (floats(4), positive(4)), {"fmod": 1})
    yield Case("Pow", (positive(2, 3), floats(3)))
    yield Case("Pow", (floats(2, 3), scalar(2)))
    yield Case("Pow", (ints(1, 2, 3), scalar(2.0, np.float32)))
    yield Case("Pow", (ints(1, 2, 3), ints(3, 2, 1)))
    for op in ("Max", "Min"):
        yield Case(op, (floats(2, 3), floats(3), floats(1)))
        yield Case(op, (whole(0, 9, 4), whole(0, 9, 4)))
    for op in ("Mean", "Sum"):
        yield Case(op, (floats(2, 3), floats(3), floats(1)))
    yield Case("Clip", (floats(2, 3), scalar(-0.5, np.float32), scalar(0.5, np.float32)))
    yield Case("Clip", (floats(2, 3), None, scalar(0.5, np.float32)))
    yield Case("Clip", (ints(-3, 5, 9), scalar(0), scalar(6)))
    for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
        yield Case(op, (whole(0, 3, 2, 3), whole(0, 3, 3)))
        yield Case(op, (floats(2, 3), floats(2, 1)))
    for op in ("And", "Or", "Xor"):
        yield Case(op, (truths(2, 3), truths(3)))
    yield Case("Not", (truths(2, 3),))
    yield Case("Where", (truths(2, 3), floats(3), floats(2, 1)))
    yield Case("Where", (truths(3), whole(0, 9, 3), whole(0, 9, 2, 3)))
    odd = np.array([0.0, np.nan, np.inf, -np.inf], np.float32)
    yield Case("IsNaN", (odd,))
    yield Case("IsInf", (odd,))
    yield Case("IsInf", (odd,), {"detect_negative": 0})
    for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor"):
        yield Case(op, (whole(0, 99, 4, dtype=np.int32), whole(0, 99, 4, dtype=np.int32)))
    yield Case("BitwiseNot", (whole(0, 99, 4, dtype=np.uint8),))
    yield Case("BitShift", (ints(1, 2, 200, dtype=np.uint8), ints(1, 3, 2, dtype=np.uint8)), {"direction": "LEFT"})
    yield Case("BitShift", (ints(1, 9, 200, dtype=np.uint8), ints(1, 3, 2, dtype=np.uint8)), {"direction": "RIGHT"})
    for kind in ("INT64", "INT32", "BOOL", "DOUBLE"):
        yield Case("Cast", (floats(5) * 3,), {"to": getattr(onnx.TensorProto, kind)})
    yield Case("Cast", (truths(5),), {"to": onnx.TensorProto.FLOAT}, opset=13)
    yield Case("CastLike", (whole(0, 5, 3), floats(1)))


def _shapes() -> Iterator[Case]:
    yield Case("Shape", (floats(2, 3, 4),), opset=13)
    yield Case("Shape", (floats(2, 3, 4),), {"start": 1})
    yield Case("Shape", (floats(2, 3, 4),), {"start": -2, "end": -1})
    yield Case("Size", (floats(2, 3),))
    yield Case("Reshape", (floats(2, 3, 4), ints(0, -1)))
    yield Case("Reshape", (floats(0, 3), ints(3, 0)), {"allowzero": 1})
    yield Case("Reshape", (floats(0, 3), ints(-1, 3)))
    yield Case("Reshape", (floats(1), np.zeros(0, np.int64)))
    yield Case("Flatten", (floats(2, 3, 4),), {"axis": 2})
    yield Case("Flatten", (floats(2, 3, 4),), {"axis": 0})
    yield Case("Transpose", (floats(2, 3, 4),), {"perm": [1, 2, 0]})
    yield Case("Transpose", (floats(2, 3, 4),))
    yield Case("Squeeze", (floats(1, 3, 1),))
    yield Case("Squeeze", (floats(1, 3, 1), ints(-1)))
    yield Case("Unsqueeze", (floats(2, 3), ints(0, -1)))
    yield Case("Unsqueeze", (scalar(3), ints(0)))
    yield Case("Expand", (floats(3, 1), ints(2, 1, 4)))
    yield Case("Tile", (floats(2, 3), ints(2, 1)))
    yield Case("Concat", (floats(2, 3), floats(2, 1)), {"axis": -1})
    yield Case("Split", (floats(2, 6),), {"axis": 1}, outputs=3, opset=13)
    yield Case("Split", (floats(2, 6), ints(1, 5)), {"axis": 1}, outputs=2)
    yield Case("Split", (floats(7, 2),), {"num_outputs": 3}, outputs=3)
    yield Case("Slice", (floats(5, 6), ints(1), ints(2**63 - 1), ints(-1), ints(2)))
    yield Case("Slice", (floats(5, 6), ints(-1, 4), ints(-(2**31), 1), ints(0, 1), ints(-1, -2)))
    yield Case("Slice", (floats(5, 6), ints(-3, 0), ints(-1, 99)))
    yield Case("Slice", (floats(5, 6), ints(7), ints(9), ints(0)))
    yield Case("Trilu", (floats(2, 4, 5),))
    yield Case("Trilu", (floats(4, 4), scalar(-1)), {"upper": 0})
    yield Case("Trilu", (truths(4, 4), scalar(1)), {"upper": 1})
    yield Case("Pad", (floats(2, 3), ints(1, 0, 0, 2)))
    yield Case("Pad", (floats(2, 3), ints(1, -1), scalar(9.0, np.float32), ints(-1)))
    yield Case("Pad", (whole(0, 9, 2, 3), ints(0, 1, 0, 1), scalar(7)), opset=13)
    for mode in ("edge", "reflect", "wrap"):
        yield Case("Pad", (floats(3, 5), ints(0, 2, 0, 3)), {"mode": mode})
    yield Case("Range", (scalar(1), scalar(8), scalar(3)))
    yield Case("Range", (scalar(5), scalar(0), scalar(-2)))
    yield Case("Range", (scalar(0.5, np.float32), scalar(2, np.float32), scalar(0.25, np.float32)))
    yield Case("Range", (scalar(5), scalar(5), scalar(1)))
    yield Case("ConstantOfShape", (ints(2, 3),))
    yield Case("ConstantOfShape", (ints(2),), {"value": tensor(ints(-5))})
    yield Case("ConstantOfShape", (np.zeros(0, np.int64),), {"value": tensor(np.array([True]))})
    yield Case("Constant", (), {"value": tensor(floats(2, 2))})
    yield Case("Constant", (), {"value_float": 1.5})
    yield Case("Constant", (), {"value_ints": [3, 4]})
    yield Case("EyeLike", (floats(3, 4),), {"k": 1})
    yield Case("EyeLike", (floats(3, 3),), {"dtype": onnx.TensorProto.INT64})
    for mode in ("DCR", "CRD"):
        yield Case("DepthToSpace", (floats(1, 8, 2, 3),), {"blocksize": 2, "mode": mode})
    yield Case("SpaceToDepth", (floats(1, 2, 4, 6),), {"blocksize": 2})


def _indexing() -> Iterator[Case]:
    yield Case("Gather", (floats(5, 3), ints(4, -1, 0)))
    yield Case("Gather", (floats(5, 3), whole(0, 5, 2, 2)))
    yield Case("Gather", (floats(5, 3), scalar(-1)), {"axis": 1})
    yield Case("Gather", (ints(4, 5, 6), scalar(1, np.int32)))
    yield Case("GatherElements", (floats(3, 3), ints(1, -1, 0)[None]), {"axis": 1})
    yield Case("GatherND", (floats(3, 4, 2), np.array([[0, 1], [-1, 2]])))
    yield Case("GatherND", (floats(3, 4, 2), whole(0, 4, 3, 5, 1)), {"batch_dims": 1})
    for reduction in ("none", "add", "mul", "max", "min"):
        rows = np.array([[0], [2]]) if reduction == "none" else np.array([[0], [2], [0]])
        more = {} if reduction == "none" else {"reduction": reduction}
        yield Case("ScatterND", (floats(4, 3), rows, floats(len(rows), 3)), more)
        yield Case(
            "ScatterElements",
            (floats(4, 3), rows.T, floats(1, len(rows))[:, : 2 + (len(rows) > 2)]),
            more | {"axis": 0},
        )
    yield Case("ScatterND", (floats(4, 3), np.array([[0, -1], [2, 1]]), floats(2)))
    yield Case("ScatterElements", (floats(4, 3), ints(1, -1)[None], floats(1, 2)), {"axis": 1}, opset=13)
    yield Case("NonZero", (whole(0, 2, 3, 4),))
    yield Case("OneHot", (ints(0, 2, -1), scalar(3), np.array([0.5, 2.0], np.float32)))
    yield Case("OneHot", (whole(0, 3, 2, 2), scalar(3), ints(0, 1)), {"axis": 0})
    yield Case("Compress", (floats(3, 4), np.array([False, True, True])), {"axis": 0})
    yield Case("Compress", (floats(2, 2), np.array([False, True, True])))


def _reductions() -> Iterator[Case]:
    names = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
    for name in names:
        yield Case(f"Reduce{name}", (positive(2, 3, 4), ints(0, -1)), {"keepdims": 0})
        yield Case(f"Reduce{name}", (positive(2, 3, 4),))
        if name != "Sum":
            yield Case(f"Reduce{name}", (positive(2, 3, 4),), {"axes": [1]}, opset=13)
    yield Case("ReduceSum", (whole(0, 5, 2, 3), ints(1)), {"keepdims": 0}, opset=13)
    yield Case("ReduceSum", (floats(2, 3), np.zeros(0, np.int64)), {"noop_with_empty_axes": 1})
    yield Case("ReduceMax", (whole(0, 50, 2, 3), ints(1)))
    for op in ("ArgMax", "ArgMin"):
        yield Case(op, (floats(3, 4),), {"axis": 1})
        yield Case(
            op, (np.array([[1, 2, 2], [0, 0, 1]], np.float32),), {"axis": -1, "select_last_index": 1, "keepdims": 0}
        )
    yield Case("TopK", (floats(3, 6), ints(2)), outputs=2)
    yield Case("TopK", (floats(3, 6), ints(2)), {"axis": 0, "largest": 0}, outputs=2)
    yield Case("CumSum", (floats(3, 4), scalar(1)))
    yield Case("CumSum", (whole(0, 9, 3, 4), scalar(-1)), {"exclusive": 1, "reverse": 1})
    yield Case("CumProd", (positive(3, 4), scalar(1)), {"exclusive": 1}, opset=26, reference=True)


def _linear() -> Iterator[Case]:
    yield Case("MatMul", (floats(2, 3, 4), floats(4, 5)))
    yield Case("MatMul", (floats(4), floats(4, 5)))
    yield Case("MatMul", (floats(2, 1, 3, 4), floats(5, 4, 2)))
    yield Case("Gemm", (floats(3, 4), floats(5, 4), floats(5)), {"transB": 1})
    yield Case("Gemm", (floats(4, 3), floats(4, 5), floats(3, 1)), {"transA": 1, "alpha": 0.5, "beta": 2.0})
    yield Case("Gemm", (floats(3, 4), floats(4, 5)))
    yield Case("Einsum", (floats(2, 3, 4), floats(2, 5, 4)), {"equation": "bij, bkj -> bik"})
    yield Case("Einsum", (floats(2, 3, 4),), {"equation": "...ij->...ji"})
    yield Case("Conv", (floats(2, 3, 8, 8), floats(4, 3, 4, 4), floats(4)), {"strides": [4, 4], "kernel_shape": [4, 4]})
    yield Case("Conv", (floats(2, 4, 9), floats(4, 1, 3), floats(4)), {"group": 4, "pads": [1, 2], "dilations": [2]})
    yield Case("Conv", (floats(1, 2, 4, 4, 4), floats(3, 2, 2, 2, 2)))
    for mode in ("SAME_UPPER", "SAME_LOWER", "VALID"):
        yield Case("Conv", (floats(1, 2, 7, 8), floats(3, 2, 3, 4)), {"auto_pad": mode, "strides": [2, 2]})


def _normalisation() -> Iterator[Case]:
    yield Case("Softmax", (floats(2, 3, 4),))
    yield Case("Softmax", (floats(2, 3, 4),), {"axis": 1}, opset=13)
    yield Case("LogSoftmax", (floats(2, 3, 4),), {"axis": 0})
    yield Case("LayerNormalization", (floats(2, 3, 4), floats(4), floats(4)), {"epsilon": 1e-3})
    yield Case("LayerNormalization", (floats(2, 3, 4), floats(3, 4)), {"axis": 1})
    yield Case("LayerNormalization", (floats(2, 3, 4), floats(4), floats(4)), outputs=3)
    yield Case("RMSNormalization", (floats(2, 3, 4), floats(4)), {"epsilon": 1e-3}, opset=23)
    yield Case("SimplifiedLayerNormalization", (floats(2, 3, 4), floats(4)), {"axis": -1, "epsilon": 1e-3})
    yield Case("BatchNormalization", (floats(2, 3, 4), floats(3), floats(3), floats(3), positive(3)))
    yield Case("InstanceNormalization", (floats(2, 3, 4), floats(3), floats(3)))
    yield Case("GroupNormalization", (floats(2, 4, 3), floats(4), floats(4)), {"num_groups": 2})
    yield Case("GroupNormalization", (floats(2, 4, 3), floats(2), floats(2)), {"num_groups": 2}, opset=18)
    yield Case("LpNormalization", (floats(2, 3),), {"axis": 1, "p": 1})


def _defined() -> Iterator[Case]:
    yield Case("MeanVarianceNormalization", (floats(2, 3, 2, 2),))
    yield Case("Shrink", (floats(6),), {"lambd": 0.5, "bias": 0.1})
    angle = floats(2, 3, 2)
    yield Case("RotaryEmbedding", (floats(2, 4, 3, 4), np.cos(angle), np.sin(angle)), opset=23)
    yield Case("RotaryEmbedding", (floats(2, 3, 16), np.cos(angle), np.sin(angle)), {"num_heads": 4}, opset=23)
    q, k, v = floats(2, 4, 3, 8), floats(2, 2, 5, 8), floats(2, 2, 5, 8)
    yield Case("Attention", (q, k, v), opset=23)
    yield Case("Attention", (q, k, v, floats(3, 5)), {"scale": 0.3, "softcap": 2.0}, opset=23)
    yield Case(
        "Attention",
        (floats(2, 5, 8), floats(2, 5, 8), floats(2, 5, 8)),
        {"q_num_heads": 2, "kv_num_heads": 2, "is_causal": 1},
        opset=23,
    )
    past = (floats(2, 2, 4, 8), floats(2, 2, 4, 8))
    yield Case("Attention", (q, k, v, None, *past), outputs=3, opset=23)


CASES = [
    *_elementwise(),
    *_shapes(),
    *_indexing(),
    *_reductions(),
    *_linear(),
    *_normalisation(),
    *_defined(),
]
