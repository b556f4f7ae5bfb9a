"""What FrameAnalysis and FrameSynthesis mean, as one dense matrix in float64, and models with one such node."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir

from onnxq import ops

FLOAT32_SUMMATION = 4e-6
"""Largest `error` that float32 explains; a dense float32 product of these sizes shows up to half of it."""


@dataclass(frozen=True)
class FrameCase:
    left: int
    middle: int
    odd: int
    w: int = 1
    wide: int = 1

    @property
    def length(self) -> int:
        return self.left * self.middle * self.odd

    @property
    def wide_length(self) -> int:
        return self.length // self.w * self.wide

    def __str__(self) -> str:
        return f"{self.left}x{self.middle}x{self.odd}-block{self.w}to{self.wide}"


CASES = [
    FrameCase(1, 1, 1),
    FrameCase(1, 1, 1, 1, 2),
    FrameCase(1, 1, 15),
    FrameCase(1, 1, 15, 5, 7),
    FrameCase(2, 1, 1),
    FrameCase(4, 4, 1),
    FrameCase(1, 16, 1, 16, 18),
    FrameCase(2, 2, 3, 6, 7),
    FrameCase(8, 16, 3),
    FrameCase(8, 16, 3, 12, 14),
    FrameCase(8, 16, 3, 16, 18),
    FrameCase(8, 16, 3, 8, 10),
    FrameCase(8, 8, 9, 8, 10),
    FrameCase(8, 8, 9, 12, 14),
    FrameCase(16, 16, 3, 16, 18),
    FrameCase(16, 16, 3, 48, 54),
    FrameCase(2, 4, 125),
    FrameCase(2, 4, 125, 10, 11),
    FrameCase(1, 8, 125, 8, 10),
    FrameCase(1, 1, 301, 43, 48),
    FrameCase(64, 64, 1),
    FrameCase(64, 64, 1, 16, 18),
    FrameCase(4096, 1, 1),
    FrameCase(1, 512, 1, 256, 288),
    FrameCase(16, 64, 1, 64, 70),
]
LARGE_CASES = [FrameCase(16, 16, 43), FrameCase(16, 16, 43, 16, 18)]
"""11008: a dense matrix of 1 GB, so these are only compared with each other's implementations."""


def hadamard(size: int) -> np.ndarray:
    index = np.arange(size)
    common = index[:, None] & index[None, :]
    ones = np.array([bin(value).count("1") for value in range(size)])
    return (-1.0) ** ones[common] / np.sqrt(size)


def hartley(size: int) -> np.ndarray:
    index = np.arange(size)
    angle = 2 * np.pi * (np.outer(index, index) % size) / size
    return (np.cos(angle) + np.sin(angle)) / np.sqrt(size)


def dense_analysis(case: FrameCase, signs: np.ndarray, block: np.ndarray) -> np.ndarray:
    """A [d', d] in float64, one Kronecker product after the other."""
    negative = np.unpackbits(signs, count=case.length, bitorder="little")
    mixing = np.kron(hadamard(case.left), np.kron(hadamard(case.middle), hartley(case.odd)))
    # The block acts from the right on runs of a row: on column vectors, with its transpose.
    runs = mixing.reshape(case.length // case.w, case.w, case.length)
    wide = np.einsum("wv,rwd->rvd", block.astype(np.float64), runs).reshape(case.wide_length, case.length)
    return wide * (1.0 - 2.0 * negative)


def error(y: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the root mean square of what was expected, of a vector at least as long as 1."""
    scale = np.sqrt(np.sum(np.square(expected)) / max(expected.size, 1))
    return float(np.max(np.abs(y - expected), initial=0.0) / max(1.0, scale))


def random_frame(case: FrameCase, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random signs uint8 [ceil(d / 8)], bits beyond d included, and a block float32 [w, w'] of orthonormal rows."""
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 256, -(-case.length // 8), dtype=np.uint8)
    block = np.linalg.qr(rng.standard_normal((case.wide, case.w)))[0].T
    return signs, np.ascontiguousarray(block, dtype=np.float32)


def frame_model(
    op_type: str,
    case: FrameCase,
    signs: np.ndarray | None,
    block: np.ndarray | None,
    *,
    x_shape: list[int | str | None] | None = None,
    opset: int = 21,
    functions: bool = True,
    **attributes: int,
) -> onnx.ModelProto:
    """One node 'the_node' on input x; signs and block are initializers, or inputs where they are None."""
    if x_shape is None:
        x_shape = ["batch", "rows", case.length if op_type == "FrameAnalysis" else case.wide_length]
    inputs = [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x_shape)]
    if signs is None:
        inputs.append(oh.make_tensor_value_info("signs", onnx.TensorProto.UINT8, [None]))
    if block is None:
        inputs.append(oh.make_tensor_value_info("block", onnx.TensorProto.FLOAT, [None, None]))
    arrays = {"signs": signs, "block": block}
    values = {"left": case.left, "middle": case.middle, "odd": case.odd} | attributes
    node = oh.make_node(op_type, ["x", "signs", "block"], ["y"], name="the_node", domain=ops.DOMAIN, **values)
    graph = oh.make_graph(
        [node],
        "frame",
        inputs,
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None] * len(x_shape))],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items() if array is not None],
    )
    bodies = [ir.to_proto(function) for function in ops.functions_for(op_type, opset)] if functions else []
    return oh.make_model(
        graph,
        opset_imports=[oh.make_opsetid("", opset), oh.make_opsetid(ops.DOMAIN, 1)],
        functions=bodies,
        ir_version=10 if opset >= 21 else 8,
    )
