"""Float8 weights and rounding in plain numpy: codes are what ml_dtypes says, and models with one such node."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.custom_ops.layout_reference import finish_model, initializers, product_model, with_bias


@dataclass(frozen=True)
class Kind:
    """A type of ml_dtypes and what the ops' attributes call it."""

    dtype: type
    mantissa_bits: int
    exponent_bias: int
    largest: float

    def __str__(self) -> str:
        return self.dtype.__name__

    @property
    def attributes(self) -> dict[str, int]:
        return {"mantissa_bits": self.mantissa_bits, "exponent_bias": self.exponent_bias}

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return codes.view(self.dtype).astype(np.float64)

    def finite_codes(self) -> np.ndarray:
        codes = np.arange(256, dtype=np.uint8)
        return codes[np.isfinite(self.decode(codes))]


KINDS = [
    Kind(ml_dtypes.float8_e4m3fn, 3, 7, 448.0),
    Kind(ml_dtypes.float8_e5m2, 2, 15, 57344.0),
    Kind(ml_dtypes.float8_e4m3fnuz, 3, 8, 240.0),
    Kind(ml_dtypes.float8_e5m2fnuz, 2, 16, 57344.0),
]
E4M3FN = KINDS[0]


@dataclass(frozen=True)
class Weight:
    """codes uint8 [N, K], scales float16 [N, G] or [1, 1]."""

    kind: Kind
    codes: np.ndarray
    scales: np.ndarray
    group_size: int
    gain: float

    def dequantize(self) -> np.ndarray:
        """float64 [N, K]."""
        group = np.arange(self.codes.shape[1]) // self.group_size
        return self.gain * self.scales.astype(np.float64)[:, group] * self.kind.decode(self.codes)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"codes": self.codes, "scales": self.scales}

    def attributes(self, **overrides: object) -> dict[str, object]:
        n, k = self.codes.shape
        values: dict[str, object] = {"K": k, "N": n, "group_size": self.group_size, "gain": self.gain}
        return values | self.kind.attributes | {"layout_version": 1} | overrides


def random_weight(
    rng: np.random.Generator, kind: Kind, n: int, k: int, group_size: int | None = None, *, one_scale: bool = False
) -> Weight:
    """Any finite codes; no group size means a scale for each output."""
    groups = 1 if group_size is None else -(-k // group_size)
    return Weight(
        kind,
        rng.choice(kind.finite_codes(), (n, k)),
        rng.uniform(0.01, 0.1, (1, 1) if one_scale else (n, groups)).astype(np.float16),
        group_size or k,
        0.25,
    )


def matmul_model(
    weight: Weight,
    bias: np.ndarray | None = None,
    *,
    x_shape: list[int | str | None] | None = None,
    replace: dict[str, np.ndarray] | None = None,
    **overrides: object,
) -> onnx.ModelProto:
    """x -> Float8MatMul -> y. `replace` swaps initializers and `overrides` attributes, to build wrong models."""
    arrays = weight.arrays() | with_bias(bias) | (replace or {})
    inputs, said = ["codes", "scales", "bias"], weight.attributes(**overrides)
    return product_model("Float8MatMul", inputs, arrays, said, weight.codes.shape[1], x_shape)


def gather_model(weight: Weight, index_type: int = TensorProto.INT64, **overrides: object) -> onnx.ModelProto:
    node = helper.make_node(
        "Float8Gather",
        ["indices", "codes", "scales"],
        ["y"],
        name="the_table",
        domain="onnxq",
        **weight.attributes(**overrides),
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("indices", index_type, ["a", "b"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers(weight.arrays()),
    )
    return finish_model(graph)


def round_model(
    kind: Kind,
    scale: np.ndarray | None,
    x_shape: list[int | str | None],
    *,
    scale_input: bool = False,
    **overrides: object,
) -> onnx.ModelProto:
    """x -> Float8Round -> y, or Float8RoundTokens where there is no scale. The scale may be an input of the model."""
    node = helper.make_node(
        "Float8RoundTokens" if scale is None else "Float8Round",
        ["x"] if scale is None else ["x", "scale"],
        ["y"],
        name="the_node",
        domain="onnxq",
        **(kind.attributes | overrides),
    )
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)]
    if scale_input:
        inputs.append(helper.make_tensor_value_info("scale", TensorProto.FLOAT, None))
    graph = helper.make_graph(
        [node],
        "g",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        {} if scale is None or scale_input else initializers({"scale": scale}),
    )
    return finish_model(graph)


def rounded(x: np.ndarray, scale: np.ndarray, kind: Kind) -> np.ndarray:
    """scale * value(round(x / scale)): division and product in float32, ties to even, saturating."""
    with np.errstate(over="ignore", invalid="ignore"):
        ratio = np.clip(x / scale, np.float32(-kind.largest), np.float32(kind.largest))
    return ratio.astype(kind.dtype).astype(np.float32) * scale


def token_scales(x: np.ndarray, kind: Kind) -> np.ndarray:
    """float32 [..., 1]: what takes the largest magnitude of each row to that of the kind."""
    scales = np.abs(x).max(axis=-1, keepdims=True) / np.float32(kind.largest)
    return np.where(scales == 0, np.float32(1), scales)


def hard_values(kind: Kind) -> np.ndarray:
    """All values and midpoints with their neighbours, both signs, subnormals, infinities."""
    codes = kind.finite_codes()
    values = np.unique(np.abs(kind.decode(codes)))
    beyond = kind.largest * np.array([1.01, 1.0357, 1.07, 1.5, 1e4])
    positive = np.concatenate([values, (values[1:] + values[:-1]) / 2, beyond, [1e-45, 1e-40, 1e-30]])
    positive = positive.astype(np.float32)
    around = [np.nextafter(positive, np.float32(to)) for to in (0, np.inf)]
    positive = np.concatenate([positive, *around, np.array([np.inf], np.float32)])
    return np.concatenate([positive, -positive])
