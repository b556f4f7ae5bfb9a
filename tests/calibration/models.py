"""Small models for the calibration tests, written as ONNX text, and what their taps must be in NumPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from onnxq.calibration import TapRequest

K, H, V = 6, 5, 11
"""Width, inner width, vocabulary."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Stands for onnxq.graph.LoadedModel."""

    model: ir.Model


def weight(name: str, *shape: int) -> np.ndarray:
    """Reproducible float32 weights, different for each name."""
    return np.random.default_rng(sum(name.encode())).standard_normal(shape).astype(np.float32)


def parse(text: str, **weights: np.ndarray) -> Loaded:
    """A model from ONNX text, with main-graph initializers."""
    proto = onnx.parser.parse_model(text)
    # Before the IR is built: a name used in a branch must be known in the outer scope.
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in weights.items())
    return Loaded(ir.from_proto(proto))


HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'


def value(loaded: Loaded, name: str) -> ir.Value:
    """The tensor of that name, anywhere in the model."""
    for node in loaded.model.graph.all_nodes():
        for candidate in (*node.outputs, *node.inputs):
            if candidate is not None and candidate.name == name:
                return candidate
    raise KeyError(name)


def tap(loaded: Loaded, name: str, **options: object) -> TapRequest:
    """A request for the tensor of that name."""
    return TapRequest(**{"site_name": f"site of {name}", "value": value(loaded, name), **options})  # type: ignore[arg-type]


def token_model() -> Loaded:
    """ids -> table -> three projections of one input -> relu -> projection."""
    return parse(
        HEADER
        + """m (int64[B, S] input_ids, int64[B, S] attention_mask) => (float[B, S, 6] logits) {
            x = Gather (table, input_ids)
            q = MatMul (x, wq)
            k = MatMul (x, wk)
            sum = Add (q, k)
            h = Relu (sum)
            y = MatMul (h, wo)
            logits = Mul (y, y)
        }""",
        table=weight("table", V, K),
        wq=weight("wq", K, H),
        wk=weight("wk", K, H),
        wo=weight("wo", H, K),
    )


def token_feeds(seed: int = 0, batches: int = 3) -> list[dict[str, np.ndarray]]:
    """Feeds of different lengths with padding at the right."""
    rng = np.random.default_rng(seed)
    feeds = []
    for number in range(batches):
        shape = (3, 4 + number)
        mask = (np.arange(shape[1]) < rng.integers(1, shape[1] + 1, (3, 1))).astype(np.int64)
        feeds.append({"input_ids": rng.integers(0, V, shape), "attention_mask": mask})
    return feeds


def token_rows(feeds: list[dict[str, np.ndarray]], wq: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Unpadded rows of x and of h, by hand."""
    wq = weight("wq", K, H) if wq is None else wq
    ids = np.concatenate([f["input_ids"][f["attention_mask"] != 0] for f in feeds])
    x = weight("table", V, K)[ids]
    return x, np.maximum(x @ wq + x @ weight("wk", K, H), 0)


def assert_moments(found: object, rows: np.ndarray, tolerance: float = 1e-5) -> None:
    """Statistics equal NumPy's in float64; tolerance relative to the largest entry (float32 products)."""
    from onnxq.calibration import InputStatistics

    assert isinstance(found, InputStatistics)
    rows = rows.astype(np.float64)
    assert found.count == rows.shape[0]
    moment = rows.T @ rows / rows.shape[0]
    scale = np.abs(moment).max()
    if found.second_moment is not None:
        np.testing.assert_allclose(found.second_moment, moment, atol=tolerance * scale, rtol=0)
    np.testing.assert_allclose(found.diagonal, np.diag(moment), atol=tolerance * scale, rtol=0)
    np.testing.assert_allclose(found.mean, rows.mean(0), atol=tolerance * np.sqrt(scale), rtol=0)
    np.testing.assert_allclose(found.absmax, np.abs(rows).max(0), rtol=1e-5)
