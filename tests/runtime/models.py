"""Low-bit models as other tools write them: the forms that ONNX Runtime fuses, and those that it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto

from tests.graph.models import floats, integers, model, node, save, weight

N, K, BLOCK = 48, 64, 32


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def int4(*shape: int) -> np.ndarray:
    return rng().integers(-8, 8, shape).astype(ml_dtypes.int4)


def steps(*shape: int) -> np.ndarray:
    return rng().uniform(0.01, 0.02, shape).astype(np.float32)


def write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    arrays: Mapping[str, np.ndarray],
) -> Path:
    """A model whose arrays may have the small types of ml_dtypes."""
    proto = model(nodes, inputs, outputs, domains=["com.microsoft"])
    proto.graph.initializer.extend(ir.to_proto(ir.tensor(array, name=name)) for name, array in arrays.items())
    return save(proto, path)


def dequantize(
    path: Path, codes: np.ndarray, scales: np.ndarray, behind: Sequence[onnx.NodeProto], **attributes: int
) -> Path:
    """codes -> DequantizeLinear -> w, and the nodes behind it that make y of x [rows, K] and w."""
    first = node("DequantizeLinear", "codes scales", "w", "dq", **attributes)
    return write(
        path,
        [first, *behind],
        [floats("x", ["rows", K])],
        [floats("y", ["rows", N])],
        {"codes": codes, "scales": scales},
    )


def fused(path: Path) -> Path:
    """[K, N] with axis 0 straight into MatMul."""
    return dequantize(
        path, int4(K, N), steps(K // BLOCK, N), [node("MatMul", "x w", "y", "fc")], axis=0, block_size=BLOCK
    )


def transposed(path: Path) -> Path:
    """[N, K] with axis 1, turned round behind DequantizeLinear."""
    behind = [node("Transpose", "w", "t", "turn", perm=[1, 0]), node("MatMul", "x t", "y", "fc")]
    return dequantize(path, int4(N, K), steps(N, K // BLOCK), behind, axis=1, block_size=BLOCK)


def shared(path: Path) -> Path:
    """One DequantizeLinear in front of two products."""
    behind = [
        node("MatMul", "x w", "a", "first"),
        node("Relu", "x", "r"),
        node("MatMul", "r w", "b", "second"),
        node("Add", "a b", "y"),
    ]
    return dequantize(path, int4(K, N), steps(K // BLOCK, N), behind, axis=0, block_size=BLOCK)


def float8(path: Path) -> Path:
    """float8 codes in front of MatMul."""
    codes = rng().standard_normal((K, N)).astype(ml_dtypes.float8_e4m3fn)
    return dequantize(path, codes, steps(N), [node("MatMul", "x w", "y", "fc")], axis=1)


def float8_cast(path: Path) -> Path:
    """float8 codes behind Cast, which is folded."""
    codes = rng().standard_normal((K, N)).astype(ml_dtypes.float8_e4m3fn)
    nodes = [node("Cast", "codes", "w", "cast", to=TensorProto.FLOAT), node("MatMul", "x w", "y", "fc")]
    return write(path, nodes, [floats("x", ["rows", K])], [floats("y", ["rows", N])], {"codes": codes})


def dequantized_table(path: Path) -> Path:
    """A table that is dequantised in front of Gather."""
    nodes = [
        node("DequantizeLinear", "codes scales", "w", "dq", axis=1, block_size=BLOCK),
        node("Gather", "w ids", "y", "embed"),
    ]
    arrays = {"codes": int4(N, K), "scales": steps(N, K // BLOCK)}
    return write(path, nodes, [integers("ids", ["s"])], [floats("y", ["s", K])], arrays)


def nbits(path: Path, *, bits: int, block: int = BLOCK, level: int | None = 4, float_zeros: bool = False) -> Path:
    """MatMulNBits with a 256-deep weight."""
    depth = 256
    blocks = depth // block
    arrays = {
        "codes": rng().integers(0, 256, (N, blocks, block * bits // 8)).astype(np.uint8),
        "scales": steps(N, blocks),
    }
    names = "x codes scales"
    if float_zeros:
        arrays["zeros"] = np.full((N, blocks), 1.5, np.float32)
        names += " zeros"
    attributes = {"K": depth, "N": N, "bits": bits, "block_size": block}
    if level is not None:
        attributes["accuracy_level"] = level
    product = node("MatMulNBits", names, "y", "fc", "com.microsoft", **attributes)
    return write(path, [product], [floats("x", ["rows", depth])], [floats("y", ["rows", N])], arrays)


def int8_dynamic(path: Path) -> Path:
    """DynamicQuantizeLinear -> MatMulInteger -> scaled back."""
    nodes = [
        node("DynamicQuantizeLinear", "x", "xq xs xz", "quantise"),
        node("MatMulInteger", "xq codes xz", "i", "fc"),
        node("Cast", "i", "f", to=TensorProto.FLOAT),
        node("Mul", "xs scale", "s"),
        node("Mul", "f s", "y"),
    ]
    codes = rng().integers(-128, 128, (K, N)).astype(np.int8)
    return write(
        path,
        nodes,
        [floats("x", ["rows", K])],
        [floats("y", ["rows", N])],
        {"codes": codes, "scale": np.array(0.01, np.float32)},
    )


def float_product(path: Path) -> Path:
    """x -> MatMul -> y in float32."""
    proto = model(
        [node("MatMul", "x w", "y", "fc")],
        [floats("x", ["rows", K])],
        [floats("y", ["rows", N])],
        {"w": weight(K, N)},
    )
    return save(proto, path)


def encoder(path: Path, vocabulary: int = 96, width: int = 64) -> Path:
    """ids, attention_mask -> table -> two layers of products with biases -> hidden.

    Weights are large enough for the recipes to take them.
    """
    nodes = [
        node("Gather", "embed.weight input_ids", "e", "/embed/Gather"),
        node("Cast", "attention_mask", "m", to=TensorProto.FLOAT),
        node("Unsqueeze", "m last", "mask"),
        node("Mul", "e mask", "h0"),
    ]
    arrays = {"embed.weight": weight(vocabulary, width, seed=1), "last": np.array([-1])}
    for layer in (0, 1):
        for part in ("up", "down"):
            name = f"layer.{layer}.{part}"
            source = f"h{layer}" if part == "up" else f"r{layer}"
            nodes += [
                node("MatMul", f"{source} {name}.weight", f"{name}.product", f"/layer.{layer}/{part}/MatMul"),
                node("Add", f"{name}.product {name}.bias", f"{name}.sum", f"/layer.{layer}/{part}/Add"),
            ]
            arrays[f"{name}.weight"] = weight(width, width, seed=10 * layer + len(part)) / 8
            arrays[f"{name}.bias"] = weight(width, seed=layer)
            if part == "up":
                nodes.append(node("Relu", f"{name}.sum", f"r{layer}"))
        nodes.append(node("Add", f"h{layer} layer.{layer}.down.sum", f"h{layer + 1}", f"/layer.{layer}/Add"))
    nodes.append(node("Identity", "h2", "hidden"))
    arrays = {name: array.astype(np.float32) if array.dtype == np.float64 else array for name, array in arrays.items()}
    inputs = [integers("input_ids", ["batch", "sequence"]), integers("attention_mask", ["batch", "sequence"])]
    proto = model(nodes, inputs, [floats("hidden", ["batch", "sequence", width])], arrays)
    onnx.checker.check_model(proto)
    return save(proto, path)


def stock_session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def without_functions(source: Path, path: Path) -> Path:
    """A model whose function bodies are lost."""
    proto = onnx.load(source)
    del proto.functions[:]
    onnx.save(proto, path)
    return path
