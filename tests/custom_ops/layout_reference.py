"""The packed layout (version 1) and the two ops in plain numpy, written from the layout's text alone.

Slow and literal on purpose: it shares no code with the package or with the C++ kernels that it is held against.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TILE = 32
BLOCK = 32


def plane_widths(bits: int) -> list[int]:
    """Binary digits of `bits`, widest first."""
    return [width for width in (8, 4, 2, 1) if bits & width]


@dataclass(frozen=True)
class Weight:
    """One quantised weight: codes uint8 [N, K], scales float16 [N, G], zero_points uint8 [N, G] or [1, 1]."""

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    bits: int
    group_size: int
    gain: float

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1]

    def dequantize(self) -> np.ndarray:
        """float64 [N, K]."""
        group = np.arange(self.k) // self.group_size
        zero = np.broadcast_to(self.zero_points.astype(np.float64), self.scales.shape) / 2.0 ** (8 - self.bits)
        return self.gain * self.scales.astype(np.float64)[:, group] * (self.codes - zero[:, group])

    def pack(self) -> dict[str, np.ndarray]:
        tiles, blocks = -(-self.n // TILE), -(-self.k // BLOCK)
        groups = self.scales.shape[1]
        codes = np.zeros((tiles * TILE, blocks * BLOCK), np.uint8)
        codes[: self.n, : self.k] = self.codes
        packed = np.zeros((tiles, blocks, self.bits, TILE, 4), np.uint8)
        row, low = 0, 0
        for width in plane_widths(self.bits):
            plane = (codes >> low) & ((1 << width) - 1)
            # axes: tile, n, block, quad, j
            quads = plane.reshape(tiles, TILE, blocks, 8, 4)
            fields = 8 // width
            for v in range(width):
                for f in range(fields):
                    packed[:, :, row + v] |= quads[:, :, :, v * fields + f].transpose(0, 2, 1, 3) << (f * width)
            row, low = row + width, low + width

        def side(values: np.ndarray) -> np.ndarray:
            padded = np.zeros((tiles * TILE, groups), values.dtype)
            padded[: self.n] = values
            return padded.reshape(tiles, TILE, groups).transpose(0, 2, 1).copy()

        shared = self.zero_points.shape == (1, 1)
        return {
            "packed": packed,
            "scales": side(self.scales),
            "zero_points": self.zero_points.reshape(1, 1, 1) if shared else side(self.zero_points),
        }


def random_weight(
    rng: np.random.Generator, n: int, k: int, bits: int, group_size: int, *, shared_zero: bool = True, gain: float = 1.0
) -> Weight:
    groups = -(-k // group_size)
    return Weight(
        codes=rng.integers(0, 2**bits, (n, k), dtype=np.uint8),
        scales=rng.uniform(0.01, 0.1, (n, groups)).astype(np.float16),
        zero_points=rng.integers(0, 256, (1, 1) if shared_zero else (n, groups), dtype=np.uint8),
        bits=bits,
        group_size=group_size,
        gain=gain,
    )


def quantize_activations(x: np.ndarray, group_size: int) -> np.ndarray:
    """x float32 [M, K] after a round trip through int8 per row and block of min(group_size, 128)."""
    out = np.empty_like(x)
    block = min(group_size, 128)
    for start in range(0, x.shape[1], block):
        part = x[:, start : start + block]
        largest = np.abs(part).max(axis=1, keepdims=True)
        # By the reciprocal, as the kernels do: x / scale falls on the other side of a half now and then.
        out[:, start : start + block] = np.rint(part * (np.float32(127) / largest)) * (largest / np.float32(127))
    return out


def attributes(weight: Weight, **overrides: object) -> dict[str, object]:
    values: dict[str, object] = {
        "K": weight.k,
        "N": weight.n,
        "bits": weight.bits,
        "group_size": weight.group_size,
        "gain": weight.gain,
        "layout_version": 1,
    }
    return values | overrides


def finish_model(graph: onnx.GraphProto) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("onnxq", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def initializers(arrays: dict[str, np.ndarray]) -> list[onnx.TensorProto]:
    return [numpy_helper.from_array(array, name) for name, array in arrays.items()]


INPUTS = ["packed", "scales", "zero_points", "bias"]


def product_model(
    op_type: str,
    inputs: list[str],
    arrays: dict[str, np.ndarray],
    attributes: dict[str, object],
    k: int,
    x_shape: list[int | str | None] | None,
) -> onnx.ModelProto:
    """x -> an op with x and these arrays as inputs -> y. Where no bias is among the arrays it is one zero."""
    node = helper.make_node(op_type, ["x", *inputs], ["y"], name="the_node", domain="onnxq", **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape or ["rows", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers({"bias": np.zeros(1, np.float32)} | arrays),
    )
    return finish_model(graph)


def with_bias(bias: np.ndarray | None) -> dict[str, np.ndarray]:
    """The array of a bias, where there is one."""
    return {} if bias is None else {"bias": bias}


def matmul_model(
    weight: Weight,
    bias: np.ndarray | None = None,
    *,
    accuracy_level: int = 4,
    x_shape: list[int | str | None] | None = None,
    replace: dict[str, np.ndarray] | None = None,
    **overrides: object,
) -> onnx.ModelProto:
    """x -> LowBitMatMul -> y. `replace` swaps initializers and `overrides` attributes, to build wrong models."""
    said = attributes(weight, accuracy_level=accuracy_level, **overrides)
    arrays = weight.pack() | with_bias(bias) | (replace or {})
    return product_model("LowBitMatMul", INPUTS, arrays, said, weight.k, x_shape)


def gather_model(weight: Weight, index_type: int = TensorProto.INT64, **overrides: object) -> onnx.ModelProto:
    node = helper.make_node(
        "LowBitGather",
        ["indices", "packed", "scales", "zero_points"],
        ["y"],
        name="the_table",
        domain="onnxq",
        **attributes(weight, **overrides),
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("indices", index_type, ["a", "b"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers(weight.pack()),
    )
    return finish_model(graph)
