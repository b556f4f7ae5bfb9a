"""BinaryCodeMatMul and MixedBitGather in plain numpy, written from the ops' text alone, as `layout_reference` is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx.helper as oh

from tests.custom_ops.layout_reference import product_model, with_bias

TILE = 64
INPUTS = ["codes", "scales", "offsets", "rank"]


@dataclass(frozen=True)
class BinaryWeight:
    """Rows as they are stored: bits uint8 [N, K], bit p for plane p, scales float16 [b, N, G], offsets [N, G].

    `order` names the row of the weight that each stored row is.
    """

    bits: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None
    order: np.ndarray | None
    plane_rows: tuple[int, ...]
    group_size: int
    gain: float

    @property
    def n(self) -> int:
        return self.bits.shape[0]

    @property
    def k(self) -> int:
        return self.bits.shape[1]

    def dequantize(self) -> np.ndarray:
        """float64 [N, K]: one weight after the other."""
        weight = np.zeros((self.n, self.k))
        for r in range(self.n):
            n = r if self.order is None else int(self.order[r])
            for k in range(self.k):
                group = k // self.group_size
                value = 0.0 if self.offsets is None else float(self.offsets[r, group])
                for p, rows in enumerate(self.plane_rows):
                    if r < rows:
                        sign = 2 * (int(self.bits[r, k]) >> p & 1) - 1
                        value += float(self.scales[p, r, group]) * sign
                weight[n, k] = self.gain * value
        return weight

    def pack(self) -> dict[str, np.ndarray]:
        """The ops' inputs but x, indices and bias."""
        chunks, groups = 8 * -(-self.k // 32), -(-self.k // self.group_size)
        codes, scales = [], []
        for p, rows in enumerate(self.plane_rows):
            plane = np.zeros((-(-rows // TILE), chunks, 32), np.uint8)
            for r in range(rows):
                tile, lane = divmod(r, TILE)
                for k in range(self.k):
                    bit = int(self.bits[r, k]) >> p & 1
                    plane[tile, k // 4, lane % 32] |= bit << (k % 4 + 4 * (lane // 32))
            codes.append(plane.ravel())
            scales.append(self._tiled(self.scales[p, :rows], groups).ravel())
        rank = np.array([-1], np.int32)
        if self.order is not None:
            rank = np.array([list(self.order).index(n) for n in range(self.n)], np.int32)
        return {
            "codes": np.concatenate(codes),
            "scales": np.concatenate(scales),
            "offsets": np.zeros(1, np.float16) if self.offsets is None else self._tiled(self.offsets, groups),
            "rank": rank,
        }

    @staticmethod
    def _tiled(values: np.ndarray, groups: int) -> np.ndarray:
        tiled = np.zeros((-(-len(values) // TILE), groups, TILE), np.float16)
        for r, row in enumerate(values):
            tiled[r // TILE, :, r % TILE] = row
        return tiled

    def attributes(self) -> dict[str, object]:
        """The ops' attributes but accuracy_level."""
        return {
            "K": self.k,
            "N": self.n,
            "plane_rows": list(self.plane_rows),
            "group_size": self.group_size,
            "gain": self.gain,
            "layout_version": 1,
        }


def random_binary(
    rng: np.random.Generator,
    plane_rows: tuple[int, ...],
    k: int,
    group_size: int | None = None,
    *,
    offset: bool = False,
    ordered: bool = False,
    gain: float = 1.0,
) -> BinaryWeight:
    """Any signs, scales, offsets and order; scales of a row are of very different sizes."""
    n, size = plane_rows[0], group_size or 32 * -(-k // 32)
    groups = -(-k // size)
    present = np.arange(n) < np.array(plane_rows)[:, None]
    places = (present << np.arange(len(plane_rows))[:, None]).sum(0)
    scales = rng.uniform(0.01, 1, (len(plane_rows), n, groups)) * present[:, :, None]
    return BinaryWeight(
        bits=(rng.integers(0, 64, (n, k)) & places[:, None]).astype(np.uint8),
        scales=scales.astype(np.float16),
        offsets=rng.uniform(-1, 1, (n, groups)).astype(np.float16) if offset else None,
        order=rng.permutation(n) if ordered else None,
        plane_rows=plane_rows,
        group_size=size,
        gain=gain,
    )


def relative_error(y: np.ndarray, x: np.ndarray, weight: BinaryWeight, bias: np.ndarray | float = 0.0) -> float:
    """Largest difference over the sum of |x| times the largest weight that the scales of its group allow."""
    reach = np.abs(weight.scales.astype(np.float64)).sum(0)
    if weight.offsets is not None:
        reach += np.abs(weight.offsets.astype(np.float64))
    size = np.repeat(reach, weight.group_size, axis=1)[:, : weight.k] * abs(weight.gain)
    if weight.order is not None:
        size = size[np.argsort(weight.order)]
    bound = np.abs(x).astype(np.float64) @ size.T + np.abs(bias) + 1e-12
    expected = x.astype(np.float64) @ weight.dequantize().T + bias
    return float(np.max(np.abs(y - expected) / bound, initial=0.0))


def binary_model(
    weight: BinaryWeight,
    bias: np.ndarray | None = None,
    *,
    accuracy_level: int = 4,
    x_shape: list[int | str | None] | None = None,
    replace: dict[str, np.ndarray] | None = None,
    **overrides: object,
) -> onnx.ModelProto:
    """x -> BinaryCodeMatMul -> y. `replace` swaps initializers and `overrides` attributes, to build wrong models."""
    arrays = weight.pack() | with_bias(bias) | (replace or {})
    attributes = weight.attributes() | {"accuracy_level": accuracy_level} | overrides
    return product_model("BinaryCodeMatMul", [*INPUTS, "bias"], arrays, attributes, weight.k, x_shape)


def gather_model(
    weight: BinaryWeight,
    indices: int = onnx.TensorProto.INT64,
    *,
    shape: list[int | str] | None = None,
    replace: dict[str, np.ndarray] | None = None,
    **overrides: object,
) -> onnx.ModelProto:
    """x -> MixedBitGather -> y."""
    dims = ["batch", "rows"] if shape is None else shape
    arrays = weight.pack() | (replace or {})
    node = oh.make_node("MixedBitGather", ["x", *INPUTS], ["y"], domain="onnxq", **(weight.attributes() | overrides))
    graph = oh.make_graph(
        [node],
        "gather",
        [oh.make_tensor_value_info("x", indices, dims)],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [*dims, weight.k])],
        [onnx.numpy_helper.from_array(arrays[name], name) for name in INPUTS],
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21), oh.make_opsetid("onnxq", 1)], ir_version=10)
