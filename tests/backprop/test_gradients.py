"""Derivatives of composed graphs against finite differences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("torch")
import torch

from onnxq.backprop import TorchGraph
from tests.graph.models import node


def _doubles(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def _model(nodes: Sequence[onnx.NodeProto], initializers: dict[str, np.ndarray], opset: int = 21) -> TorchGraph:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, None)],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return TorchGraph(ir.from_proto(proto))


def _check(graph: TorchGraph, x: np.ndarray, parameters: Sequence[str]) -> None:
    """gradcheck with respect to the input and to initializers."""
    initializers = graph.model.graph.initializers
    start = [torch.from_numpy(x.copy()).requires_grad_()]
    start += [graph.constant(initializers[name]).clone().requires_grad_() for name in parameters]

    def function(feed: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return graph.run({"x": feed}, values=dict(zip(parameters, values, strict=True)))["y"]

    assert torch.autograd.gradcheck(function, start)


def test_encoder_block() -> None:
    nodes = [
        node("LayerNormalization", "x gain shift", "n"),
        node("MatMul", "n wq", "q"),
        node("MatMul", "n wk", "k"),
        node("Transpose", "k", "kt", perm=[0, 2, 1]),
        node("MatMul", "q kt", "s"),
        node("Where", "mask s low", "masked"),
        node("Softmax", "masked", "p"),
        node("MatMul", "p n", "a"),
        node("Add", "a x", "r"),
        node("Gemm", "flat wf bf", "g", transB=1),
        node("Gelu", "g", "h"),
        node("ReduceMean", "h one", "y", keepdims=0),
    ]
    nodes.insert(9, node("Reshape", "r shape", "flat"))
    initializers = {
        "gain": _doubles(4, seed=1),
        "shift": _doubles(4, seed=2),
        "wq": _doubles(4, 4, seed=3),
        "wk": _doubles(4, 4, seed=4),
        "mask": np.tril(np.ones((3, 3), bool)),
        "low": np.array(-1e9),
        "wf": _doubles(5, 4, seed=5),
        "bf": _doubles(5, seed=6),
        "shape": np.array([-1, 4]),
        "one": np.array([1]),
    }
    _check(_model(nodes, initializers), _doubles(2, 3, 4), ["gain", "shift", "wq", "wf", "bf"])


def test_decomposed_rms_norm_and_rotary_positions() -> None:
    nodes = [
        node("Pow", "x two", "squares"),
        node("ReduceMean", "squares last", "mean"),
        node("Add", "mean epsilon", "safe"),
        node("Sqrt", "safe", "root"),
        node("Div", "x root", "n"),
        node("Mul", "gain n", "g"),
        node("Slice", "g zero half last", "first"),
        node("Slice", "g half end last", "second"),
        node("Neg", "second", "minus"),
        node("Concat", "minus first", "turned", axis=-1),
        node("Mul", "g cos", "c"),
        node("Mul", "turned sin", "s"),
        node("Add", "c s", "y"),
    ]
    initializers = {
        "two": np.array(2.0),
        "last": np.array([-1]),
        "epsilon": np.array(1e-3),
        "gain": _doubles(4, seed=1),
        "zero": np.array([0]),
        "half": np.array([2]),
        "end": np.array([2**63 - 1]),
        "cos": np.cos(_doubles(3, 4, seed=2)),
        "sin": np.sin(_doubles(3, 4, seed=2)),
    }
    _check(_model(nodes, initializers), _doubles(2, 3, 4), ["gain", "cos"])


def test_patches_and_scatter() -> None:
    nodes = [
        node("Conv", "x filter bias", "c", strides=[2, 2]),
        node("Reshape", "c shape", "tokens"),
        node("ScatterND", "tokens rows update", "replaced"),
        node("Gather", "replaced picked", "g", axis=1),
        node("CumSum", "g axis", "sums"),
        node("Sigmoid", "sums", "s"),
        node("Einsum", "s s", "y", equation="bij,bkj->bik"),
    ]
    initializers = {
        "filter": _doubles(3, 2, 2, 2),
        "bias": _doubles(3, seed=1),
        "shape": np.array([1, 3, -1]),
        "rows": np.array([[0, 1]]),
        "update": _doubles(1, 4, seed=2),
        "picked": np.array([2, 0, -1, 2]),
        "axis": np.array(1),
    }
    _check(_model(nodes, initializers), _doubles(1, 2, 4, 4), ["filter", "bias", "update"])


def test_attention_by_its_definition() -> None:
    nodes = [node("Attention", "x k v", "y", q_num_heads=2, kv_num_heads=1, is_causal=1)]
    graph = _model(nodes, {"k": _doubles(1, 3, 2), "v": _doubles(1, 3, 2, seed=1)}, opset=23)
    _check(graph, _doubles(1, 3, 4), ["k", "v"])


def test_a_row_without_a_key_sends_no_nan_back() -> None:
    nodes = [
        node("Add", "x mask", "s"),
        node("Softmax", "s", "p"),
        node("IsNaN", "p", "bad"),
        node("Where", "bad zero p", "y"),
    ]
    mask = np.array([[0.0, -np.inf], [-np.inf, -np.inf]])
    graph = _model(nodes, {"mask": mask, "zero": np.array(0.0)})
    x = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    y = graph.run({"x": x})["y"]
    assert y.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    (y * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
