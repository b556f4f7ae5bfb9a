"""What products are fed: roundings of activations, and the signal-to-noise ratio that products come out with.

One more pass over the calibration data, before anything is solved, shows how each tensor's values are spread and draws
a sample of its rows (`onnxq.calibration.ranges`). Scales follow from the spread; choices between kinds, and whether a
weight is left in float, from products of the sample.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxq.calibration import Collected, RangeStatistics, requests_for
from onnxq.calibration.clipping import (
    FLOAT8,
    ActivationScale,
    Kind,
    choose_clip,
    round_tokens,
    round_with,
)
from onnxq.errors import RecipeError
from onnxq.passes.activations import Rounding
from onnxq.passes.attention import AttentionProduct, RoundAttentionPass, attention_products, fused_attention
from onnxq.pipeline.plan import Planned
from onnxq.pipeline.solve import Solved
from onnxq.pipeline.stages import Stages
from onnxq.recipe import ActivationSpec, Recipe

_AUTO: tuple[Kind, ...] = ("e4m3fn", "uint8")


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """Of the products of one weight.

    Attributes:
        rounding: of its activations; None leaves them alone.
        seen: their spread and sample; None where nothing was asked for, or calibration saw no input of the weight.
        dynamic: products round their activations to 8-bit integers by themselves.
    """

    rounding: Rounding | None = None
    seen: RangeStatistics | None = None
    dynamic: bool = False

    @property
    def rounded(self) -> Literal["uint8", "dynamic", "float8"] | None:
        """What activations become, see `onnxq.passes.forms.choose_form`."""
        if self.dynamic:
            return "dynamic"
        if self.rounding is None:
            return None
        return "float8" if self.rounding.kind in FLOAT8 else "uint8"

    def snr(self, item: Planned, solved: Solved) -> float | None:
        """Signal-to-noise ratio of the products of the sampled rows, in dB; None without a sample.

        Peak memory: two copies of the weight in float32, and products [256, N].
        """
        if self.seen is None or not self.seen.count or item.weight.batch > 1:
            return None
        rows, weight = self.seen.rows, item.weight.rows(0, item.weight.n)
        wanted = rows @ weight.T
        # One batch's range is about that of all the data.
        rounding = Rounding("uint8", choose_clip(self.seen, "uint8")) if self.dynamic else self.rounding
        noise = np.square(_rounded(rows, rounding) @ solved.encodings[0].dequantize().T - wanted).sum()
        signal = np.square(wanted).sum()
        return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf


class InputPlans:
    """The inputs of every planned weight, and what rounding attention needs.

    Args:
        by_weight: inputs by the weight's name.
        attention: by site name, the roundings of attention's products.
        notes: what a report should say of attention.
    """

    def __init__(
        self, by_weight: Mapping[str, Inputs], attention: Mapping[str, Rounding], notes: Sequence[str] = ()
    ) -> None:
        self._by_weight = by_weight
        self._attention = attention
        self.notes = tuple(notes)

    @property
    def attention(self) -> int:
        """How many inputs of attention's products are rounded."""
        return len(self._attention)

    def of(self, item: Planned) -> Inputs:
        """What the products of a weight are fed."""
        return self._by_weight.get(item.weight.name, Inputs())

    def round_attention(self, model: ir.Model) -> None:
        """Puts the roundings of attention's products into a model that the sites' were put into."""
        if self._attention:
            RoundAttentionPass(self._attention)(model)


def plan_inputs(items: Sequence[Planned], recipe: Recipe, stages: Stages) -> InputPlans:
    """Roundings for all planned weights that products read.

    Peak memory: see `RangeAccumulator`, for every tensor that products read.

    Raises:
        RecipeError: static scales were asked for and there is no calibration data.
        ModelError: the model's opset is too old for what stands for them.
    """
    spec, stock = recipe.linear.inputs, recipe.target == "stock"
    linear = [item for item in items if "linear" in item.weight.kinds]
    if spec is None and recipe.linear.min_snr is None:
        return InputPlans({}, {})
    static = spec is not None and spec.scale == "static"
    if spec is not None and spec.kind != "int8":  # before the data is run
        kind = _AUTO[0] if spec.kind == "auto" else spec.kind
        scale = ActivationScale(kind, 1.0) if static else None
        Rounding(kind, scale, stock).check_opset(stages.loaded.opset)
    products = attention_products(stages.loaded.model) if spec is not None and spec.attention else []
    if stages.data is None:
        if static:
            raise RecipeError(
                "linear.inputs has static scales, which come from data: give some with --calibration, or take "
                'scale "token".'
            )
        by_weight = {item.weight.name: _inputs(spec, None, stock) for item in linear}
        return InputPlans(by_weight, *_attention(products, spec, None, stages, stock))
    requests = requests_for([item.weight for item in linear], "ranges")
    requests += [request for product in products for request in product.requests()]
    collected = stages.collect(requests)
    assert collected is not None
    seen = {item.weight.name: _seen(item, collected) for item in linear}
    kinds = _kinds(linear, seen, spec, collected)
    inputs = {name: _inputs(kinds[name], statistics, stock) for name, statistics in seen.items()}
    return InputPlans(inputs, *_attention(products, spec, collected, stages, stock))


def _attention(
    products: Sequence[AttentionProduct],
    spec: ActivationSpec | None,
    collected: Collected | None,
    stages: Stages,
    stock: bool,
) -> tuple[dict[str, Rounding], list[str]]:
    """Roundings of attention's products by site name, and what is to be said of those that there are not.

    collected: statistics of the products' inputs; None without data.
    """
    if spec is None or not spec.attention:
        return {}, []
    # Without a weight to try kinds on, the one that takes any spread.
    plain = dataclasses.replace(spec, kind="e4m3fn") if spec.kind == "auto" else spec
    roundings, unseen = {}, []
    for request in (request for product in products for request in product.requests()):
        found = None if collected is None else collected.site(request.site_name)
        statistics = found if isinstance(found, RangeStatistics) and found.count else None
        rounding = _rounding(plain, statistics, stock)
        if rounding is None:
            unseen.append(request.site_name)
        else:
            roundings[request.site_name] = rounding
    notes = []
    if roundings:
        notes.append(f"{len(roundings)} inputs of attention's products are rounded")
    if unseen:
        notes.append(
            f"calibration saw no values of {len(unseen)} inputs of attention's products ({unseen[0]} among them); they "
            "stay in float"
        )
    fused = fused_attention(stages.loaded.model)
    if fused:
        nodes = ", ".join(f"{count} {kind}" for kind, count in sorted(fused.items()))
        notes.append(
            f"attention inside fused nodes ({nodes}) stays in float: nothing can be rounded there. Export the model "
            "with attention in MatMul and Softmax (eager attention)."
        )
    elif not products:
        notes.append("attention was to be rounded, and the model has no products of attention")
    return roundings, notes


def _seen(item: Planned, collected: Collected) -> RangeStatistics | None:
    """The statistics of all inputs of a weight's products together."""
    keys = {collected.sites.get(site.name) for site in item.weight.sites if site.kind == "linear"}
    merged: RangeStatistics | None = None
    for key in sorted(key for key in keys if key is not None):
        found = collected.statistics.get(key)
        if isinstance(found, RangeStatistics):
            merged = found if merged is None else merged.merge(found)
    return merged if merged is not None and merged.count else None


def _kinds(
    items: Sequence[Planned],
    seen: Mapping[str, RangeStatistics | None],
    spec: ActivationSpec | None,
    collected: Collected,
) -> dict[str, ActivationSpec | None]:
    """The specification of each weight's inputs with its kind decided: alike for weights that read one tensor."""
    if spec is None or spec.kind != "auto":
        return dict.fromkeys(seen, spec)
    readers: dict[tuple[str, ...], list[Planned]] = {}
    for item in items:
        keys = {collected.sites.get(site.name) or "" for site in item.weight.sites if site.kind == "linear"}
        readers.setdefault(tuple(sorted(keys)), []).append(item)
    decided: dict[str, ActivationSpec | None] = {}
    for group in readers.values():
        statistics = seen[group[0].weight.name]
        kind: Kind = "e4m3fn"
        if statistics is not None:
            kind = min(_AUTO, key=functools.partial(_moved, group, statistics, spec))
        chosen = dataclasses.replace(spec, kind="int8" if kind == "uint8" else "e4m3fn")
        decided |= {item.weight.name: chosen for item in group}
    return decided


def _moved(group: Sequence[Planned], statistics: RangeStatistics, spec: ActivationSpec, kind: Kind) -> float:
    """How far a rounding moves the products of the sampled rows, relative to them, summed over weights."""
    rows = statistics.rows
    error = round_with(rows, _clip(spec, kind, statistics)) - rows
    total = 0.0
    for item in group:
        weight = item.weight.rows(0, item.weight.batch * item.weight.n)
        signal = float(np.square(rows @ weight.T).sum())
        total += float(np.square(error @ weight.T).sum()) / signal if signal else 0.0
    return total


def _inputs(spec: ActivationSpec | None, statistics: RangeStatistics | None, stock: bool) -> Inputs:
    return Inputs(_rounding(spec, statistics, stock), statistics, spec is not None and spec.scale == "dynamic")


def _rounding(spec: ActivationSpec | None, statistics: RangeStatistics | None, stock: bool) -> Rounding | None:
    if spec is None or spec.scale == "dynamic":  # a form of the product's own
        return None
    if spec.scale == "token":
        assert spec.kind in ("e4m3fn", "e5m2"), "recipes take no other kind by token"
        return Rounding(spec.kind, None, stock)
    if statistics is None:  # never seen: nothing to choose a scale by
        return None
    scale = _scale(spec, statistics)
    return Rounding(scale.kind, scale, stock)


def _scale(spec: ActivationSpec, statistics: RangeStatistics) -> ActivationScale:
    kind: Kind = "uint8" if spec.kind == "int8" else "e5m2" if spec.kind == "e5m2" else "e4m3fn"
    return _clip(spec, kind, statistics)


def _clip(spec: ActivationSpec, kind: Kind, statistics: RangeStatistics) -> ActivationScale:
    return choose_clip(
        statistics, kind, spec.clip, percentile=spec.percentile, powers_of_two=spec.powers_of_two and kind in FLOAT8
    )


def _rounded(rows: np.ndarray, rounding: Rounding | None) -> np.ndarray:
    if rounding is None:
        return rows
    return round_tokens(rows, rounding.kind) if rounding.static is None else round_with(rows, rounding.static)
