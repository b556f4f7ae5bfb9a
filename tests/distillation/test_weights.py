"""Decoding in torch equals decoding in numpy, its gradient is right, and nodes read what they read before."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")
import torch

from onnxq.backprop import TorchGraph
from onnxq.distillation import DecodedWeight, Part, uniform_part, uniform_weight, with_scales
from onnxq.distillation.weights import operand, uniform_decoder
from onnxq.formats.uniform import UniformFormat, ZeroPoint
from onnxq.graph import find_weights
from tests.encodings import random_encoding
from tests.graph import models

FORMATS = [
    UniformFormat(2, 32, ZeroPoint.MIDRISE),
    UniformFormat(3, 64, ZeroPoint.PER_GROUP),
    UniformFormat(4, None, ZeroPoint.INTEGER),
]


@pytest.mark.parametrize("format", FORMATS, ids=UniformFormat.label)
@pytest.mark.parametrize("shape", [(3, 128), (5, 100)])
def test_decoding_in_torch_is_decoding(format: UniformFormat, shape: tuple[int, int]) -> None:
    encoding = random_encoding(format, *shape)
    decoded = uniform_decoder(encoding)(torch.from_numpy(encoding.effective_scales()))
    assert np.array_equal(decoded.numpy(), encoding.dequantize())


@pytest.mark.parametrize("format", FORMATS, ids=UniformFormat.label)
def test_the_gradient_by_the_scales(format: UniformFormat) -> None:
    encoding = random_encoding(format, 3, 100)
    decode = uniform_decoder(encoding)
    scales = torch.from_numpy(encoding.effective_scales()).requires_grad_()
    slope = torch.from_numpy(np.random.default_rng(1).standard_normal((3, 100)).astype(np.float32))
    (found,) = torch.autograd.grad(decode(scales), scales, slope)
    # Decoding is linear in the scales: its derivative by one of them is what it gives for a one in that place.
    for row, group in np.ndindex(*scales.shape):
        one = torch.zeros_like(scales)
        one[row, group] = 1.0
        assert float(found[row, group]) == pytest.approx(float((decode(one) * slope).sum()), rel=1e-5, abs=1e-5)


def test_new_scales_are_rounded_as_stored_and_never_overflow() -> None:
    encoding = random_encoding(FORMATS[0], 3, 64)
    part = uniform_part(encoding)
    assert np.array_equal(part.round(part.scales), part.scales)
    moved = with_scales(encoding, part.scales * np.float32(1.2345))
    assert np.array_equal(part.round(part.scales * np.float32(1.2345)), moved.effective_scales())
    assert np.isfinite(with_scales(encoding, part.scales * np.float32(1e6)).scales).all()


@pytest.mark.parametrize(
    ("proto", "feeds"),
    [
        (models.mlp(), {"x": models.weight(2, 8)}),
        (models.tied_embedding(stored_twice=True), {"ids": np.array([[1, 2], [3, 0]])}),
        (models.tied_embedding(stored_twice=False), {"ids": np.array([[1, 2], [3, 0]])}),
        (models.merged_decoder(), {"ids": np.array([[1, 2]]), "use_cache_branch": np.array([True])}),
        (models.loop(), {"x": models.weight(2, 8)}),
        (models.function_body(), {"x": models.weight(2, 8)}),
    ],
)
def test_every_site_reads_its_matrix(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> None:
    graph = TorchGraph(models.as_ir(proto))
    weights = find_weights(graph.model).weights
    assert weights
    plain = graph.run(feeds)
    same = {(s.node, s.weight_input): operand(s, torch.from_numpy(w.matrix())) for w in weights for s in w.sites}
    doubled = {key: 2 * tensor for key, tensor in same.items()}
    for name, tensor in graph.run(feeds, operands=same).items():
        assert torch.allclose(tensor, plain[name], 1e-5, 1e-6)
    assert any(not torch.allclose(t, plain[name]) for name, t in graph.run(feeds, operands=doubled).items())


@pytest.mark.parametrize("left", [False, True])
def test_a_stack_of_weights(left: bool) -> None:
    x, w = ([3, 5, 4], (3, 6, 5)) if left else ([3, 5, 6], (3, 6, 4))
    y = [3, 6, 4] if left else [3, 5, 4]
    nodes = [models.node("MatMul", "w x" if left else "x w", "y", "fc")]
    proto = models.model(nodes, [models.floats("x", x)], [models.floats("y", y)], {"w": models.weight(*w)})
    graph = TorchGraph(models.as_ir(proto))
    (found,) = find_weights(graph.model).weights
    members = found.matrix().reshape(3, found.n, found.k)
    parts = tuple(
        Part(np.ones((found.n, 1), np.float32), lambda s, m=member: s * torch.from_numpy(m), lambda s: s)
        for member in members
    )
    matrix = DecodedWeight(found, parts).decode([torch.from_numpy(part.scales) for part in parts])
    feeds = {"x": models.weight(*x, seed=1)}
    (site,) = found.sites
    given = graph.run(feeds, operands={(site.node, site.weight_input): operand(site, matrix)})["y"]
    np.testing.assert_allclose(given.numpy(), models.run(proto, feeds)[0], 1e-5, 1e-6)


def test_members_of_a_stack_are_parts() -> None:
    proto = models.model(
        [models.node("MatMul", "x w", "y", "fc")],
        [models.floats("x", [2, 5, 64])],
        [models.floats("y", [2, 5, 4])],
        {"w": models.weight(2, 64, 4)},
    )
    (found,) = find_weights(models.as_ir(proto)).weights
    encodings = [random_encoding(FORMATS[0], 4, 64, seed) for seed in range(2)]
    item = uniform_weight(found, encodings)
    decoded = item.decode([torch.from_numpy(part.scales) for part in item.parts])
    assert np.array_equal(decoded.numpy(), np.concatenate([encoding.dequantize() for encoding in encodings]))
