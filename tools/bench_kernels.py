"""Times the products and float8 ops of this library against ONNX Runtime's own: a table row a case.

Rivals: float32 MatMul, MatMulNBits (2, 4, 8 bits, accuracy level 4) and DynamicQuantizeMatMul (int8); of float8 also
DequantizeLinear and MatMul, of its rounding QuantizeLinear and DequantizeLinear. All sessions of a case run in one
process, one run each in turn, so that a change of clock speed or a neighbour's load meets them alike; the table holds
medians in microseconds and their ratios (below 1: ours is faster).

Example::

    ONNXQ_LIBRARY=build/libonnxq_ops.so python tools/bench_kernels.py --rows 1 128 --threads 1 --bits 2 4
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from onnxq.formats import mixed
from onnxq.formats.float8 import Float8Kind
from onnxq.runtime.library import describe_library, library_path

DEFAULT_SHAPES = ["384x384", "1536x384", "384x1536", "4096x4096"]
"""N x K."""
NBITS_WIDTHS = (2, 4, 8)
NBITS_LARGEST_GROUP = 128
CODEBOOK_WIDTHS = (1, 2, 3, 4, 5, 6)
MIXED_DEPTHS = {"m2": (2,), "m2.5": (0, 1, 2, 3, 4, 5)}
"""Depths that blocks draw from, by the name of the mixture."""
MICROSECONDS = 1e6


@dataclass(frozen=True)
class Case:
    n: int
    k: int
    group_size: int
    threads: int


def build_model(nodes: list[onnx.NodeProto], case: Case, arrays: dict[str, np.ndarray]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "bench",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", case.k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", case.n])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [
        helper.make_opsetid(domain, version) for domain, version in (("", 21), ("com.microsoft", 1), ("onnxq", 1))
    ]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def float_model(case: Case, rng: np.random.Generator) -> bytes:
    b = rng.standard_normal((case.k, case.n), dtype=np.float32)
    return build_model([helper.make_node("MatMul", ["x", "b"], ["y"])], case, {"b": b})


def dynamic_int8_model(case: Case, rng: np.random.Generator) -> bytes:
    arrays = {"b": rng.integers(-127, 128, (case.k, case.n), dtype=np.int8), "scale": np.full(1, 0.01, np.float32)}
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "b", "scale"], ["y"], domain="com.microsoft")
    return build_model([node], case, arrays)


def nbits_model(case: Case, bits: int, rng: np.random.Generator) -> bytes:
    group_size = min(case.group_size, NBITS_LARGEST_GROUP)
    blocks = -(-case.k // group_size)
    arrays = {
        "b": rng.integers(0, 256, (case.n, blocks, group_size * bits // 8), dtype=np.uint8),
        "scales": rng.uniform(0.01, 0.1, case.n * blocks).astype(np.float32),
    }
    node = helper.make_node(
        "MatMulNBits",
        ["x", *arrays],
        ["y"],
        domain="com.microsoft",
        K=case.k,
        N=case.n,
        bits=bits,
        block_size=group_size,
        accuracy_level=4,
    )
    return build_model([node], case, arrays)


def our_model(case: Case, bits: int, window: int | None, accuracy_level: int, rng: np.random.Generator) -> bytes:
    """LowBitMatMul, or CodebookMatMul where there is a window."""
    tiles, blocks, groups = -(-case.n // 32), -(-case.k // 32), -(-case.k // case.group_size)
    attributes = {"K": case.k, "N": case.n, "bits": bits, "group_size": case.group_size}
    # Any bytes are a weight, and speed does not depend on them.
    arrays = {"packed": rng.integers(0, 256, (tiles, blocks, bits, 32, 4), dtype=np.uint8)}
    if window is not None:
        attributes["window"] = window
        arrays["table"] = rng.integers(0, 128, 2**window, dtype=np.uint8)
    arrays |= {
        "scales": rng.uniform(0.01, 0.1, (tiles, groups, 32)).astype(np.float16),
        "zero_points": np.full((1, 1, 1), 128, np.uint8),
        "bias": np.zeros(1, np.float32),
    }
    node = helper.make_node(
        "LowBitMatMul" if window is None else "CodebookMatMul",
        ["x", *arrays],
        ["y"],
        domain="onnxq",
        accuracy_level=accuracy_level,
        **attributes,
    )
    return build_model([node], case, arrays)


def mixed_model(case: Case, choice: tuple[int, ...], band: int, accuracy_level: int, rng: np.random.Generator) -> bytes:
    """MixedBitMatMul with a random depth of `choice` for each block of each band."""
    tiles, blocks = -(-case.n // 32), -(-case.k // 32)
    depths = rng.choice(np.array(choice, np.uint8), (-(-case.n // band), blocks))
    by_tile = np.repeat(depths, band // 32, axis=0)[:tiles]
    arrays = {
        "packed": rng.integers(0, 256, int(by_tile.sum(dtype=np.int64)) * 128, dtype=np.uint8),
        "depths": depths,
        "columns": rng.integers(0, 32, (len(depths), 32 * blocks), dtype=np.uint8),
        "scales": rng.uniform(0.01, 0.1, (tiles, 1, 32)).astype(np.float16),
        "order": rng.permutation(case.k).astype(np.uint16),
        "tables": mixed.tables(),
        "steps": mixed.steps(),
        "bias": np.zeros(1, np.float32),
    }
    attributes = {"K": case.k, "N": case.n, "band": band, "accuracy_level": accuracy_level}
    node = helper.make_node("MixedBitMatMul", ["x", *arrays], ["y"], domain="onnxq", **attributes)
    return build_model([node], case, arrays)


def binary_model(case: Case, planes: int, group_size: int, accuracy_level: int, rng: np.random.Generator) -> bytes:
    """BinaryCodeMatMul with the same number of planes for every row."""
    tiles, chunks, groups = -(-case.n // 64), 8 * -(-case.k // 32), -(-case.k // group_size)
    arrays = {
        "codes": rng.integers(0, 256, planes * tiles * chunks * 32, dtype=np.uint8),
        "scales": rng.uniform(0.01, 0.1, planes * tiles * groups * 64).astype(np.float16),
        "offsets": np.zeros(1, np.float16),
        "rank": np.full(1, -1, np.int32),
        "bias": np.zeros(1, np.float32),
    }
    attributes = {"K": case.k, "N": case.n, "plane_rows": [case.n] * planes, "group_size": group_size}
    node = helper.make_node(
        "BinaryCodeMatMul", ["x", *arrays], ["y"], domain="onnxq", accuracy_level=accuracy_level, **attributes
    )
    return build_model([node], case, arrays)


def random_float8(kind: Float8Kind, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32).astype(kind.dtype)


def float8_attributes(kind: Float8Kind) -> dict[str, int]:
    return {"mantissa_bits": kind.mantissa_bits, "exponent_bias": kind.bias}


def float8_model(case: Case, kind: Float8Kind, group_size: int, rng: np.random.Generator) -> bytes:
    arrays = {
        "codes": random_float8(kind, (case.n, case.k), rng).view(np.uint8),
        "scales": rng.uniform(0.01, 0.1, (case.n, -(-case.k // group_size))).astype(np.float16),
        "bias": np.zeros(1, np.float32),
    }
    attributes = {"K": case.k, "N": case.n, "group_size": group_size, **float8_attributes(kind)}
    node = helper.make_node("Float8MatMul", ["x", *arrays], ["y"], domain="onnxq", **attributes)
    return build_model([node], case, arrays)


def dequantized_float8_model(case: Case, kind: Float8Kind, rng: np.random.Generator) -> bytes:
    """DequantizeLinear, which ONNX Runtime runs at every call, and MatMul."""
    arrays = {
        "codes": random_float8(kind, (case.k, case.n), rng),
        "scales": rng.uniform(0.01, 0.1, case.n).astype(np.float32),
    }
    nodes = [
        helper.make_node("DequantizeLinear", [*arrays], ["b"], axis=1),
        helper.make_node("MatMul", ["x", "b"], ["y"]),
    ]
    return build_model(nodes, case, arrays)


def rounding_models(case: Case, kind: Float8Kind) -> dict[str, bytes]:
    """Activations to values of float8: with one scale, with one a row, and as stock ops do it with one scale."""
    scale = {"scale": np.full((), 0.01, np.float32)}
    pair = [
        helper.make_node(
            "QuantizeLinear", ["x", "scale"], ["codes"], output_dtype=helper.np_dtype_to_tensor_dtype(kind.dtype)
        ),
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["y"]),
    ]
    said = {"domain": "onnxq", **float8_attributes(kind)}
    return {
        "q+dq": build_model(pair, case, scale),
        "oursround": build_model([helper.make_node("Float8Round", ["x", "scale"], ["y"], **said)], case, scale),
        "ourstokens": build_model([helper.make_node("Float8RoundTokens", ["x"], ["y"], **said)], case, {}),
    }


def open_runner(model: bytes, case: Case, rows: int, *, library: bool = True) -> Callable[[], float] | None:
    """A function that runs the model once and returns the seconds; None where ONNX Runtime lacks the operator."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.log_severity_level = 4
    if library:
        options.register_custom_ops_library(str(library_path()))
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        x = np.random.default_rng(0).standard_normal((rows, case.k), dtype=np.float32)
        binding.bind_cpu_input("x", x)
        y = ort.OrtValue.ortvalue_from_shape_and_type([rows, case.n], np.float32, "cpu")
        binding.bind_ortvalue_output("y", y)
        session.run_with_iobinding(binding)
    except Exception:  # noqa: BLE001 - the runtime's exceptions have no common base
        return None

    def run() -> float:
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        return time.perf_counter() - start

    return run


def interleaved_medians(runners: dict[str, Callable[[], float]], seconds: float) -> dict[str, float]:
    """Median seconds of one run each, taken in turns for about `seconds`."""
    for run in runners.values():
        run()
    once = sum(run() for run in runners.values())
    repeats = int(np.clip(seconds / once, 7, 3000))
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(repeats):
        for name, run in runners.items():
            # The first run after a rival's finds the caches full of the rival's weight; time the second.
            run()
            times[name].append(run())
    return {name: float(np.median(values)) for name, values in times.items()}


def show(title: str, models: dict[str, bytes], case: Case, rows: int, seconds: float) -> None:
    """One table: those whose names begin with `ours` against the others."""
    runners = {name: run for name, model in models.items() if (run := open_runner(model, case, rows))}
    medians = interleaved_medians(runners, seconds)
    stock = " ".join(f"{name} {medians[name] * MICROSECONDS:.1f}" for name in medians if not name.startswith("ours"))
    sys.stdout.write(f"\n{title} rows {rows} threads {case.threads}   stock us: {stock}\n")
    rivals = [name for name in medians if not name.startswith("ours")]
    sys.stdout.write("  ours              us" + "".join(f"{'/' + name:>10}" for name in rivals) + "\n")
    for name, value in medians.items():
        if name.startswith("ours"):
            ratios = "".join(f"{value / medians[rival]:10.2f}" for rival in rivals)
            sys.stdout.write(f"  {name[4:]:<12}{value * MICROSECONDS:8.1f}{ratios}\n")
    sys.stdout.flush()


def bench(
    case: Case, rows: int, bits: list[int], windows: list[int], bands: list[int], levels: list[int], seconds: float
) -> None:
    rng = np.random.default_rng(0)
    formats = [(f"{b}", b, None) for b in bits]
    formats += [(f"{b}w{window}", b, window) for b in bits if b in CODEBOOK_WIDTHS for window in windows if window >= b]
    models = {"fp32": float_model(case, rng), "int8dyn": dynamic_int8_model(case, rng)}
    models |= {f"nbits{b}": nbits_model(case, b, rng) for b in NBITS_WIDTHS if case.k % 32 == 0}
    models |= {
        f"ours{name}/{level}": our_model(case, b, window, level, rng) for level in levels for name, b, window in formats
    }
    models |= {
        f"ours{name}b{band}/{level}": mixed_model(case, choice, band, level, rng)
        for level in levels
        for name, choice in MIXED_DEPTHS.items()
        for band in bands
    }
    show(f"{case.n}x{case.k} group {case.group_size}", models, case, rows, seconds)


def bench_binary(case: Case, rows: int, planes: list[int], levels: list[int], seconds: float) -> None:
    rng = np.random.default_rng(0)
    models = {"fp32": float_model(case, rng), "int8dyn": dynamic_int8_model(case, rng)}
    models |= {f"nbits{b}": nbits_model(case, b, rng) for b in (2, 4) if case.k % 32 == 0}
    sizes = sorted({case.group_size, -(-case.k // 32) * 32}, reverse=True)
    models |= {
        f"ours{p}p g{size}/{level}": binary_model(case, p, size, level, rng)
        for level in levels
        for p in planes
        for size in sizes
    }
    show(f"{case.n}x{case.k} binary", models, case, rows, seconds)


def bench_float8(case: Case, rows: int, kinds: list[Float8Kind], seconds: float) -> None:
    rng = np.random.default_rng(0)
    models = {"fp32": float_model(case, rng)}
    if case.k % 32 == 0:
        models["nbits8"] = nbits_model(case, 8, rng)
    for kind in kinds:
        models[f"dq {kind.value}"] = dequantized_float8_model(case, kind, rng)
        for group_size in sorted({case.group_size, case.k}):
            models[f"ours{kind.value} g{group_size}"] = float8_model(case, kind, group_size, rng)
    show(f"{case.n}x{case.k} float8", models, case, rows, seconds)
    for kind in kinds:
        square = Case(case.k, case.k, case.group_size, case.threads)
        show(f"{case.k} wide to {kind.value}", rounding_models(square, kind), square, rows, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", default=DEFAULT_SHAPES, help="N x K of the weights")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 128])
    parser.add_argument("--bits", nargs="*", type=int, default=list(range(1, 9)))
    parser.add_argument("--windows", nargs="*", type=int, default=[4, 6], help="of codebooks, `bits` (no trellis) to 6")
    parser.add_argument("--bands", nargs="*", type=int, default=[256], help="of mixed weights, multiples of 32")
    parser.add_argument("--planes", nargs="*", type=int, default=[1, 2, 3, 4], help="of binary codes, 1 to 6")
    parser.add_argument("--float8", nargs="*", default=["e4m3fn"], help="kinds: e4m3fn, e5m2, e4m3fnuz, e5m2fnuz")
    parser.add_argument("--levels", nargs="+", type=int, default=[4, 1], help="accuracy levels")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--group-size", type=int, default=32, help="0: the whole column, 128 for MatMulNBits")
    parser.add_argument("--seconds", type=float, default=2.0, help="per case")
    arguments = parser.parse_args()
    library = describe_library()
    sys.stdout.write(f"onnxruntime {ort.__version__}, onnxq {library['version']} on {library['isa']}\n")
    for threads in arguments.threads:
        for rows in arguments.rows:
            for shape in arguments.shapes:
                n, k = (int(part) for part in shape.split("x"))
                case = Case(n, k, arguments.group_size or -(-k // 32) * 32, threads)
                if arguments.bits or arguments.bands:
                    bench(
                        case,
                        rows,
                        arguments.bits,
                        arguments.windows,
                        arguments.bands,
                        arguments.levels,
                        arguments.seconds,
                    )
                if arguments.planes:
                    bench_binary(case, rows, arguments.planes, arguments.levels, arguments.seconds)
                if arguments.float8:
                    bench_float8(case, rows, [Float8Kind(kind) for kind in arguments.float8], arguments.seconds)


if __name__ == "__main__":
    main()
