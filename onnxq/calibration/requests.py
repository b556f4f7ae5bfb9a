"""From the weights of a model to what calibration should look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from onnxq.calibration.statistics import Level
from onnxq.calibration.taps import Side, TapRequest
from onnxq.graph import Site, Weight


def requests_for(weights: Iterable[Weight], level: Level | Callable[[Weight], Level] = "full") -> list[TapRequest]:
    """One request per site of each weight.

    Args:
        weights: From `onnxq.graph.find_weights`.
        level: For all of them, or a function of the weight ("none" leaves it out).
    """
    wanted = []
    for weight in weights:
        chosen = level if isinstance(level, str) else level(weight)
        for site in weight.sites:
            extent = site.k if site.kind == "linear" else site.n
            wanted.append(TapRequest(site.name, site.input, chosen, site.kind, contracted_side(site), extent))
    return wanted


def contracted_side(site: Site) -> Side:
    """Where the input's K stands: "right" for the last axis, "left" for the one before it.

    A MatMul says it by the site's side; a Gemm may store the input transposed.
    """
    if site.kind == "table" or site.node.op_type != "Gemm":
        return site.side
    flag = "transA" if site.side == "right" else "transB"
    attribute = site.node.attributes.get(flag)
    transposed = attribute is not None and attribute.as_int() != 0
    return "left" if (site.side == "right") == transposed else "right"
