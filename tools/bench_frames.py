"""Times framed two-bit layers against ONNX Runtime's own products, and prints one table a case.

A framed layer is FrameAnalysis and a two-bit LowBitMatMul of K' inputs. The table holds it at each redundancy, beside
the same in stock ops (the function body inlined, and MatMulNBits of K' inputs), the analysis alone, and what one would
use without frames: MatMulNBits of two and four bits, a float32 MatMul, and LowBitMatMul of K inputs ("ours2"). A last
case has three layers share one analysis, as query, key and value do. All sessions of a case run in one process, one run
each in turn; the table holds medians in microseconds and their ratios (below 1: the row is faster than the column).

Example::

    ONNXQ_LIBRARY=build/libonnxq_ops.so python tools/bench_frames.py --rows 1 128 --threads 1 --groups column 64
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from onnxq import ops
from onnxq.runtime.library import describe_library
from tools.bench_kernels import Case, interleaved_medians, open_runner

DEFAULT_SHAPES = ["384x384", "1536x384", "384x1536", "4096x4096", "11008x4096"]
"""N x K."""
OPSET = 21
BLOCKS = {"1": (1, 1), "1.0625": (16, 17), "1.125": (16, 18), "1.25": (8, 10)}
"""Redundancies that `--redundancies` may name, as the block's [w, w']."""
WINDOWS = (4, 6)
LAYERS, SHARED_SHAPE = 3, (384, 384)
COLUMN = "column"
MICROSECONDS = 1e6


@dataclass
class Graph:
    """Nodes and initializers of a model from x to y."""

    case: Case
    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def add(
        self, op_type: str, x: list[str], arrays: dict[str, np.ndarray], y: str, domain: str, **attributes: int
    ) -> None:
        named = {f"{name}_{y}": array for name, array in arrays.items()}
        self.arrays |= named
        self.nodes.append(helper.make_node(op_type, [*x, *named], [y], domain=domain, **attributes))

    def model(self, *, width: int | None = None, bodies: bool = False) -> bytes:
        """The model; with function bodies for sessions that have no kernels. `width` of y, if it is not N."""
        graph = helper.make_graph(
            self.nodes,
            "bench",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", self.case.k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", width or self.case.n])],
            [numpy_helper.from_array(array, name) for name, array in self.arrays.items()],
        )
        opsets = [
            helper.make_opsetid(domain, version)
            for domain, version in (("", OPSET), ("com.microsoft", 1), (ops.DOMAIN, 1))
        ]
        functions = [ir.to_proto(body) for body in ops.functions_for("FrameAnalysis", OPSET)] if bodies else []
        return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10).SerializeToString()


def frame_factors(k: int, w: int) -> tuple[int, int, int]:
    """(left, middle, odd) of a frame of k inputs: w divides middle * odd, and left is near the root of k."""
    power = k & -k
    odd = k // power
    lefts = [1 << i for i in range(power.bit_length()) if (k >> i) % w == 0]
    if not lefts:
        raise SystemExit(f"a block of {w} rows does not divide {k}; choose other --redundancies")
    left = min(lefts, key=lambda value: abs(value * value - k))
    return left, power // left, odd


def add_analysis(graph: Graph, redundancy: str, y: str) -> int:
    """x to its coefficients; returns how many they are."""
    k, (w, wide) = graph.case.k, BLOCKS[redundancy]
    left, middle, odd = frame_factors(k, w)
    arrays = {
        "signs": graph.rng.integers(0, 256, -(-k // 8), dtype=np.uint8),
        "block": np.linalg.qr(graph.rng.standard_normal((wide, w)))[0].T.astype(np.float32),
    }
    graph.add("FrameAnalysis", ["x"], arrays, y, ops.DOMAIN, left=left, middle=middle, odd=odd)
    return k // w * wide


def add_ours(graph: Graph, x: str, k: int, group: str, y: str, window: int | None = None) -> None:
    """Our two-bit product of k inputs; group 'column' is one scale a column, a window is a trellis code's."""
    n, group_size = graph.case.n, -(-k // 32) * 32 if group == COLUMN else int(group)
    tiles, blocks, groups = -(-n // 32), -(-k // 32), -(-k // group_size)
    arrays = {
        # Any bytes are a weight, and speed does not depend on them.
        "packed": graph.rng.integers(0, 256, (tiles, blocks, 2, 32, 4), dtype=np.uint8),
        "scales": graph.rng.uniform(0.01, 0.1, (tiles, groups, 32)).astype(np.float16),
        "zero_points": np.full((1, 1, 1), 96, np.uint8),
        "bias": np.zeros(1, np.float32),
    }
    attributes = {"K": k, "N": n, "bits": 2, "group_size": group_size, "accuracy_level": 4}
    if window is None:
        graph.add("LowBitMatMul", [x], arrays, y, ops.DOMAIN, **attributes)
        return
    table = graph.rng.integers(0, 128, 1 << window, dtype=np.uint8)
    arrays = {"packed": arrays.pop("packed"), "table": table, **arrays}
    graph.add("CodebookMatMul", [x], arrays, y, ops.DOMAIN, window=window, **attributes)


def add_nbits(graph: Graph, x: str, k: int, bits: int, y: str) -> None:
    """ONNX Runtime's product of k inputs."""
    n, block_size = graph.case.n, graph.case.group_size
    blocks = -(-k // block_size)
    arrays = {
        "b": graph.rng.integers(0, 256, (n, blocks, block_size * bits // 8), dtype=np.uint8),
        "scales": graph.rng.uniform(0.01, 0.1, n * blocks).astype(np.float32),
    }
    attributes = {"K": k, "N": n, "bits": bits, "block_size": block_size, "accuracy_level": 4}
    graph.add("MatMulNBits", [x], arrays, y, "com.microsoft", **attributes)


def float_model(graph: Graph) -> bytes:
    arrays = {"b": graph.rng.standard_normal((graph.case.k, graph.case.n), dtype=np.float32)}
    graph.add("MatMul", ["x"], arrays, "y", "")
    return graph.model()


def nbits_model(graph: Graph, bits: int) -> bytes:
    add_nbits(graph, "x", graph.case.k, bits, "y")
    return graph.model()


def plain_model(graph: Graph, group: str) -> bytes:
    add_ours(graph, "x", graph.case.k, group, "y")
    return graph.model()


def analysis_model(graph: Graph, redundancy: str) -> tuple[bytes, int]:
    width = add_analysis(graph, redundancy, "y")
    return graph.model(width=width), width


def framed_model(graph: Graph, redundancy: str, group: str, window: int | None = None) -> bytes:
    add_ours(graph, "coefficients", add_analysis(graph, redundancy, "coefficients"), group, "y", window)
    return graph.model()


def stock_framed_model(graph: Graph, redundancy: str) -> bytes:
    add_nbits(graph, "coefficients", add_analysis(graph, redundancy, "coefficients"), 2, "y")
    return graph.model(bodies=True)


def three_model(graph: Graph, redundancy: str | None, group: str, *, shared: bool) -> bytes:
    """Three layers of one x, added up: with one analysis, with one each, or without frames (redundancy None)."""
    source, width = "x", graph.case.k
    for layer in range(LAYERS):
        if redundancy is not None and (layer == 0 or not shared):
            source = f"coefficients{layer}"
            width = add_analysis(graph, redundancy, source)
        add_ours(graph, source, width, group, f"y{layer}")
    graph.add("Sum", [f"y{layer}" for layer in range(LAYERS)], {}, "y", "")
    return graph.model()


def print_table(title: str, medians: dict[str, float], columns: list[str]) -> None:
    shown = [name for name in columns if name in medians]
    sys.stdout.write(f"\n{title}\n  {'':<24}{'us':>10}" + "".join(f"{'/' + name:>15}" for name in shown) + "\n")
    for name, seconds in medians.items():
        ratios = "".join(f"{seconds / medians[column]:15.2f}" for column in shown)
        sys.stdout.write(f"  {name:<24}{seconds * MICROSECONDS:10.1f}{ratios}\n")
    sys.stdout.flush()


def bench_layer(case: Case, rows: int, redundancies: list[str], groups: list[str], seconds: float) -> None:
    def graph() -> Graph:
        return Graph(case, np.random.default_rng(0))

    runners = {"fp32": open_runner(float_model(graph()), case, rows)}
    runners |= {f"nbits{bits}": open_runner(nbits_model(graph(), bits), case, rows) for bits in (2, 4)}
    runners |= {f"ours2 {group}": open_runner(plain_model(graph(), group), case, rows) for group in groups}
    for redundancy in redundancies:
        model, width = analysis_model(graph(), redundancy)
        runners[f"analysis {redundancy}"] = open_runner(model, replace(case, n=width), rows)
        for group in groups:
            model = framed_model(graph(), redundancy, group)
            runners[f"framed {redundancy} {group}"] = open_runner(model, case, rows)
        for window in WINDOWS:
            model = framed_model(graph(), redundancy, groups[0], window)
            runners[f"trellis w{window} {redundancy} {groups[0]}"] = open_runner(model, case, rows)
        model = stock_framed_model(graph(), redundancy)
        runners[f"stock framed {redundancy}"] = open_runner(model, case, rows, library=False)
    medians = interleaved_medians({name: run for name, run in runners.items() if run}, seconds)
    title = f"{case.n}x{case.k} rows {rows} threads {case.threads}, MatMulNBits blocks of {case.group_size}"
    print_table(title, medians, ["fp32", "nbits2", "nbits4", f"ours2 {groups[0]}"])


def bench_shared(case: Case, rows: int, redundancy: str, group: str, seconds: float) -> None:
    variants = {
        "no frame": (None, False),
        f"shared {redundancy}": (redundancy, True),
        f"one each {redundancy}": (redundancy, False),
    }
    runners = {}
    for name, (used, shared) in variants.items():
        model = three_model(Graph(case, np.random.default_rng(0)), used, group, shared=shared)
        runners[name] = open_runner(model, case, rows)
    medians = interleaved_medians({name: run for name, run in runners.items() if run}, seconds)
    title = f"{LAYERS} layers {case.n}x{case.k} rows {rows} threads {case.threads}, group {group}"
    print_table(title, medians, list(variants))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", default=DEFAULT_SHAPES, help="N x K of the weights")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 128])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--redundancies", nargs="+", choices=list(BLOCKS), default=["1", "1.125"])
    parser.add_argument("--groups", nargs="+", default=[COLUMN], help="of our product: 'column' or a multiple of 32")
    parser.add_argument("--block-size", type=int, default=32, help="of MatMulNBits")
    parser.add_argument("--seconds", type=float, default=2.0, help="per case")
    arguments = parser.parse_args()
    library = describe_library()
    sys.stdout.write(f"onnxruntime {ort.__version__}, onnxq {library['version']} on {library['isa']}\n")
    for threads in arguments.threads:
        for rows in arguments.rows:
            for shape in arguments.shapes:
                n, k = (int(part) for part in shape.split("x"))
                case = Case(n, k, arguments.block_size, threads)
                bench_layer(case, rows, arguments.redundancies, arguments.groups, arguments.seconds)
            case = Case(*SHARED_SHAPE, arguments.block_size, threads)
            bench_shared(case, rows, arguments.redundancies[-1], arguments.groups[0], arguments.seconds)


if __name__ == "__main__":
    main()
