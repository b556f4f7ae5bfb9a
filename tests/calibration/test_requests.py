"""Against the real graph package: sites as it finds them, statistics as the solvers need them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.calibration import collect, model_inputs, open_data, requests_for
from onnxq.graph import LoadedModel, find_weights, load
from tests.calibration.models import (
    HEADER,
    H,
    K,
    V,
    assert_moments,
    parse,
    token_feeds,
    token_model,
    token_rows,
    weight,
)


def on_disk(model: ir.Model, folder: Path) -> LoadedModel:
    ir.save(model, folder / "m.onnx", external_data="m.onnx.data", size_threshold_bytes=0)
    return load(folder / "m.onnx")


def test_every_site_of_a_loaded_model_gets_its_statistics(tmp_path: Path) -> None:
    loaded, feeds = on_disk(token_model().model, tmp_path), token_feeds()
    weights = find_weights(loaded.model).weights
    requests = requests_for(weights)
    found = collect(loaded, requests, open_data(feeds, model_inputs(loaded.model)))
    x, h = token_rows(feeds)
    by_root = {w.roots[0].name: w for w in weights}
    assert set(by_root) == {"table", "wq", "wk", "wo"}
    for name, rows in (("wq", x), ("wk", x), ("wo", h)):
        (site,) = by_root[name].sites
        assert_moments(found.site(site.name), rows)
    counts = found.site(by_root["table"].sites[0].name).counts  # type: ignore[union-attr]
    assert counts.shape == (V,)
    assert counts.sum() == len(x)
    assert len(found) == 3


def test_the_level_can_depend_on_the_weight(tmp_path: Path) -> None:
    loaded = on_disk(token_model().model, tmp_path)
    requests = requests_for(find_weights(loaded.model).weights, lambda w: "none" if w.k == K else "diagonal")
    assert {r.level for r in requests} == {"none", "diagonal"}


@pytest.mark.parametrize(
    ("call", "x_shape", "w_shape"),
    [
        ("MatMul (t, w)", (7, K), (K, H)),
        ("MatMul (w, t)", (K, 7), (H, K)),
        ("Gemm (t, w)", (7, K), (K, H)),
        ("Gemm <transA = 1> (t, w)", (K, 7), (K, H)),
        ("Gemm (w, t)", (K, 7), (H, K)),
        ("Gemm <transB = 1> (w, t)", (7, K), (H, K)),
    ],
)
def test_k_is_found_on_either_side(
    call: str, x_shape: tuple[int, int], w_shape: tuple[int, int], tmp_path: Path
) -> None:
    text = f"m (float{list(x_shape)} x) => (float[A, B] y) {{ t = Neg (x) \n y = {call} }}"
    loaded = on_disk(parse(HEADER + text, w=weight("w", *w_shape)).model, tmp_path)
    x = np.random.default_rng(0).standard_normal(x_shape).astype(np.float32)
    requests = requests_for(find_weights(loaded.model).weights)
    found = collect(loaded, requests, open_data([{"x": x}], model_inputs(loaded.model)))
    assert_moments(found["t"], -x if x_shape[1] == K else -x.T)
