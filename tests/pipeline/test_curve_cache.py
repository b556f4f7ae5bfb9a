from __future__ import annotations

from pathlib import Path

import numpy as np

from onnxq.graph import find_weights, load
from onnxq.pipeline.curve_cache import CurveCache, Curves
from onnxq.pipeline.curves import measure_curves
from onnxq.pipeline.plan import Planned, make_plan
from onnxq.pipeline.stages import Stages
from onnxq.progress import NullProgress
from onnxq.recipe import Recipe
from tests.graph import models
from tests.pipeline.test_quantize import stack


def test_shares_are_kept_beside_each_other(tmp_path: Path) -> None:
    loaded = load(models.save(stack(3), tmp_path / "m.onnx"))
    found = find_weights(loaded.model)
    plan = make_plan(found, Recipe("small", min_elements=64), calibrated=False)
    stages = Stages(loaded, None, 1, NullProgress())
    points = measure_curves(plan.planned, stages, None, NullProgress())
    cache = CurveCache(tmp_path / "curves", {"model": 1})

    def losses(items: tuple[Planned, ...]) -> list[list[float]] | None:
        known = CurveCache(tmp_path / "curves", {"model": 1}).load(items)
        return None if known is None else [[p.loss for p in known.points[item.weight.name]] for item in items]

    first, rest = plan.planned[:1], plan.planned[1:]
    for items in (first, rest):
        cache.save(items, Curves({item.weight.name: points[item.weight.name] for item in items}, "layer", ()))
    expected = [[point.loss for point in points[item.weight.name]] for item in plan.planned]
    np.testing.assert_allclose(losses(plan.planned), expected)  # type: ignore[arg-type]
    np.testing.assert_allclose(losses(first), expected[:1])  # type: ignore[arg-type]
    # Losses of another kind are in another unit.
    cache.save(first, Curves({first[0].weight.name: points[first[0].weight.name]}, "output", ()))
    assert losses(rest) is None
    assert CurveCache(tmp_path / "curves", {"model": 2}).load(first) is None
    assert len(list((tmp_path / "curves").iterdir())) == 1
