"""CVXQ (Radio) as published, on real models: a measured reference beside our own mixed depths.

    python -m tools.tables.paper_cvxq minilm smollm2 --rates 3 4 [--ablation] [--group-size 512] [--iterations 20]

Every linear weight that no look-up reads is quantised, weights only; embeddings and tied heads stay in float. A group
is one input column of `group_size` output rows, of like variance and sensitivity. An iteration takes in the gradients
and input means of 16 more samples at the weights as quantised so far, sorts rows into groups anew, finds depths by dual
ascent, and quantises. The last one searches scales and locations.

Source: Young, CVXQ (arXiv 2409.02026) and Radio (arXiv 2505.03031); where they leave something open, the authors' code,
github.com/seannz/cvxq. Departures, beside those of `onnxq.sensitivity`, `onnxq.solvers.companding` and
`onnxq.allocation.dual_ascent`:

1. Squared gradients are kept for every row and column where rows are sorted into groups: in the code sums in float16
   stay with a group's number while the rows in it change.
2. Principal components are those of the iteration's own samples, at the weights as quantised so far; in the code those
   of the float model on all of them. Which component's turn it is goes on from one iteration to the next.
3. Input means, which the bias correction needs, are those of all tokens of the iteration's samples, padding left out.
   The correction is b - (Wq - W) x; the paper prints a plus. It stands in an Add of its own behind each product.
4. The model after the last iteration is measured; the code keeps the one that is best on data that it also reports.
5. Depths for equal steps, of the ablation, have searched steps in all iterations: the paper gives no textbook step.

A cell shows the metric and the true bits per weight: codes; 35 bits a group, location, scale and depth (32 where all
depths are one); log2 of the number of groups for each row; 16 bits for each bias that the model did not have. Results
are kept one file each in the cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

from onnxq.allocation.dual_ascent import dual_ascent
from onnxq.calibration import CalibrationData, InputStatistics, collect, open_data, requests_for
from onnxq.calibration.output_rows import LOGITS
from onnxq.graph import LoadedModel, Site, Weight, find_weights, load
from onnxq.graph.save import StreamingWriter
from onnxq.graph.tensors import is_bias
from onnxq.sensitivity import SensitivitySettings, WeightSensitivity, measure, runs_of_rows
from onnxq.solvers.companding import DEPTH_BITS, LAYOUT_BITS, CodedGroups, compand, spread, uniform
from tools.tables.results import cell_file, load_result, save_result, table_folder
from tools.tables.subjects import SUBJECTS, Subject, measure_with

STORE = "paper-cvxq-1"
"""Counted up when the method changes, so that older results are not taken up again."""

SAMPLES = 16
"""Sequences of an iteration."""

GROUP_SIZE, ITERATIONS = 512, 20


@dataclasses.dataclass(frozen=True)
class Switches:
    """Which parts of the method are on.

    Attributes:
        steps: "min-max": equal steps from the least to the largest weight of a group; "best": equal steps by search;
            "companded": the Laplace compander, by search at the end.
        mixed: a depth for each group; else the rate for all, and no gradients are needed.
        corrected: biases make up for what rounding does to the mean output.
    """

    steps: Literal["min-max", "best", "companded"] = "companded"
    mixed: bool = True
    corrected: bool = True


CVXQ, FULL = "+ bias correction (CVXQ)", Switches()
ABLATION = {
    "nearest, min-max steps": Switches("min-max", mixed=False, corrected=False),
    "+ steps of least error": Switches("best", mixed=False, corrected=False),
    "+ mixed depths": Switches("best", corrected=False),
    "+ companding": Switches(corrected=False),
    CVXQ: FULL,
}
"""The lines of the paper's ablation, each with one part more; there, biases are not told apart."""


@dataclasses.dataclass(frozen=True)
class Quantised:
    """A quantised model.

    Attributes:
        replaced: float32 initializers by name: weights, and corrections of `with_corrections`.
        bits: true bits per weight.
        depth: mean depth.
        pruned: share of the groups at depth 0.
        seconds: of each iteration.
    """

    replaced: dict[str, np.ndarray]
    bits: float
    depth: float
    pruned: float
    seconds: list[float]


@dataclasses.dataclass(frozen=True)
class Result:
    """What one cell shows."""

    bits: float
    depth: float
    metric: float
    pruned: float
    iteration_seconds: float
    seconds: float


def linear_weights(loaded: LoadedModel) -> list[Weight]:
    """What is quantised: weights that products alone read."""
    weights = [weight for weight in find_weights(loaded.model).weights if weight.kinds == ("linear",)]
    assert all(weight.batch == 1 and site.side == "right" for weight in weights for site in weight.sites)
    return weights


def with_corrections(subject: Subject, file: Path) -> Subject:
    """The subject with an Add of zeros, a float32 initializer, behind each product: where a bias can be corrected.

    The model is written once, its weights with it.
    """
    if not file.is_file():
        loaded = load(subject.model)
        graph = loaded.model.graph
        for weight in linear_weights(loaded):
            for site in weight.sites:
                zeros = ir.tensor(np.zeros(weight.n, np.float32), name=correction_name(site))
                value = ir.Value(
                    name=zeros.name, type=ir.TensorType(zeros.dtype), shape=ir.Shape([weight.n]), const_value=zeros
                )
                graph.register_initializer(value)
                product = site.node.outputs[0]
                total = ir.node("Add", [product, value], name=f"{site.name}.corrected")
                sum_ = total.outputs[0]
                sum_.name, sum_.type, sum_.shape = product.name, product.type, product.shape
                product.replace_all_uses_with(sum_, replace_graph_outputs=True)
                total.replace_input_with(0, product)  # it was one of the uses
                product.name = f"{product.name}.product"
                graph.insert_after(site.node, total)
        file.parent.mkdir(parents=True, exist_ok=True)
        with StreamingWriter(file, source=loaded) as writer:
            writer.finish(loaded.model)
    return dataclasses.replace(subject, model=file)


def correction_name(site: Site) -> str:
    return f"{site.name}.correction"


def paper_cvxq(
    subject: Subject,
    rate: float,
    group_size: int = GROUP_SIZE,
    iterations: int = ITERATIONS,
    samples: int = SAMPLES,
    switches: Switches = FULL,
    report: Callable[[str], None] = print,
) -> Quantised:
    """Quantise a model.

    Memory: the float32 weights and as much again for their gradients at a time, and once more for those kept of
    matrices that have several groups of rows; beside what `onnxq.sensitivity.measure` states.

    Args:
        subject: from `with_corrections`.
        rate: mean bits of the codes.
        group_size: rows of a group; a matrix of fewer has one group.
        iterations: of gradients, dual ascent and quantisation.
        samples: for each, in turn through the calibration data.
        switches: parts that are on.
        report: takes a sentence after each iteration.
    """
    source, current = load(subject.model), load(subject.model)
    layers = [
        _Layer(weight, target, group_size)
        for weight, target in zip(linear_weights(source), linear_weights(current), strict=True)
    ]
    data = subject.calibration()
    feeds = [{n: a[i : i + 1] for n, a in feed.items()} for feed in data for i in range(len(next(iter(feed.values()))))]

    def taken(start: int, count: int) -> CalibrationData:
        return open_data([feeds[i % len(feeds)] for i in range(start, start + count)], data.inputs)

    states, multiplier, seconds = _final_states(current, layers), None, []
    rows = 0
    for number in range(iterations if switches.mixed else 0):
        started = time.monotonic()
        part, last = taken(number * samples, samples), number == iterations - 1
        if switches.corrected:
            _learn_inputs(current, layers, part, 1 / (number + 1))
        settings = dataclasses.replace(
            SensitivitySettings.paper(seed=number), first=number * samples, outputs=states, kind="output"
        )
        targets = [layer.target for layer in layers]
        found = measure(current, targets, part, settings, row_groups=functools.partial(_kept_rows, size=group_size))
        rows += found.rows
        for layer in layers:
            layer.learn(found.weights[layer.target.name], found.rows / rows)
            layer.regroup()
        found_spreads = [layer.spreads() for layer in layers]
        gradients, variances, sizes = (np.concatenate(parts) for parts in zip(*found_spreads, strict=True))
        ascent = dual_ascent(gradients, variances, sizes, rate, multiplier=multiplier)
        multiplier = ascent.multiplier
        ends = np.cumsum([layer.groups for layer in layers])[:-1]
        for layer, depths in zip(layers, np.split(ascent.depths, ends), strict=True):
            layer.quantise(depths, switches, search=last or switches.steps == "best")
        seconds.append(time.monotonic() - started)
        report(
            f"iteration {number + 1}: {ascent.rate:.4f} bits, {np.mean(ascent.depths == 0):.1%} of the groups at 0, "
            f"multiplier {ascent.multiplier:.2f}, {seconds[-1]:.0f} s"
        )
    if not switches.mixed:
        if rate != int(rate):
            raise ValueError(f"one depth for all is a whole number, not {rate}")
        if switches.corrected:
            _learn_inputs(current, layers, taken(0, iterations * samples), 1)
        for layer in layers:
            layer.quantise(np.full(layer.groups, int(rate)), switches, search=switches.steps != "min-max")
    elements = sum(layer.target.n * layer.target.k for layer in layers)
    depths = np.concatenate([coded.depths for layer in layers for coded in layer.coded])
    return Quantised(
        {name: array for layer in layers for name, array in layer.replaced.items()},
        sum(layer.cost_bits(switches) for layer in layers) / elements,
        sum(coded.code_bits() for layer in layers for coded in layer.coded) / elements,
        float(np.mean(depths == 0)),
        seconds,
    )


def _final_states(current: LoadedModel, layers: Sequence[_Layer]) -> tuple[str, ...] | None:
    """What distortion is measured on: the states before the vocabulary head, if that is no weight to be quantised."""
    logits = next((value for value in current.model.graph.outputs if value.name == LOGITS), None)
    head = None if logits is None else logits.producer()
    if head is None or any(site.node is head for layer in layers for site in layer.target.sites):
        return None
    states = head.inputs[0]
    assert states is not None
    current.model.graph.outputs.append(states)
    return (str(states.name),)


def _learn_inputs(current: LoadedModel, layers: Sequence[_Layer], part: CalibrationData, share: float) -> None:
    """Running means of all layers' inputs, of the model as it is."""
    collected = collect(current, requests_for([layer.target for layer in layers], "diagonal"), part)
    for layer in layers:
        for site in layer.target.sites:
            found = collected.site(site.name)
            assert isinstance(found, InputStatistics), f"calibration reached no input of {site.name}"
            before = layer.inputs.get(site.name, np.zeros((), np.float32))
            layer.inputs[site.name] = before + np.float32(share) * (found.mean - before)


def _row_groups(weight: Weight, size: int) -> int:
    return max(weight.n // size, 1)


def _kept_rows(weight: Weight, size: int) -> np.ndarray:
    """What gradients are kept for: rows that may change groups each for itself."""
    return runs_of_rows(weight, weight.n if _row_groups(weight, size) == 1 else 1)


class _Layer:
    """A weight under way.

    Attributes:
        target: the weight in the model that is being quantised.
        groups: M row groups times K columns.
        coded: one for each row group.
        inputs: by site, mean input float32 [K].
        replaced: initializers as they are now.
    """

    def __init__(self, weight: Weight, target: Weight, group_size: int) -> None:
        self._weight, self.target = weight, target
        self._parts = np.array_split(np.arange(weight.n), _row_groups(weight, group_size))
        self._gradients, self._rows = np.zeros((), np.float32), np.zeros((), np.float32)
        self._kept = _kept_rows(target, group_size)
        self.groups = len(self._parts) * weight.k
        self.coded: list[CodedGroups] = []
        self.inputs: dict[str, np.ndarray] = {}
        self.replaced: dict[str, np.ndarray] = {}

    def learn(self, found: WeightSensitivity, share: float) -> None:
        """Running means of squared gradients."""
        self._gradients = self._gradients + np.float32(share) * (found.groups - self._gradients)
        self._rows = self._rows + np.float32(share) * (found.rows - self._rows)

    def regroup(self) -> None:
        """Rows of like variance times sensitivity into one group, in their own order there."""
        scores = self._weight.matrix().var(axis=1) * self._rows
        order = np.argsort(scores, kind="stable")
        self._parts = [np.sort(part) for part in np.array_split(order, len(self._parts))]

    def spreads(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """G**2, S**2 and sizes, each [M * K]."""
        matrix = self._weight.matrix()
        gradients = [self._gradients[self._kept[part]].mean(axis=0) for part in self._parts]
        variances = [spread(matrix[part].T)[1] for part in self._parts]
        sizes = np.repeat([len(part) for part in self._parts], self._weight.k)
        return np.concatenate(gradients), np.concatenate(variances), sizes

    def quantise(self, depths: np.ndarray, switches: Switches, *, search: bool) -> None:
        """From the float weight, with depths int [M * K], and into the model."""
        matrix = self._weight.matrix()
        quantised, self.coded = np.empty_like(matrix), []
        solve = compand if switches.steps == "companded" else uniform
        for part, own in zip(self._parts, depths.reshape(len(self._parts), -1), strict=True):
            self.coded.append(solve(np.ascontiguousarray(matrix[part].T), own, search=search))
            quantised[part] = self.coded[-1].decode().T
        for site in self.target.sites:
            self._replace(site.root, np.ascontiguousarray(site.layout.undo(quantised)))
            if switches.corrected:
                graph = site.node.graph
                assert isinstance(graph, ir.Graph)
                bias = (matrix - quantised) @ self.inputs[site.name]
                self._replace(graph.initializers[correction_name(site)], bias)

    def _replace(self, value: ir.Value, array: np.ndarray) -> None:
        value.const_value = ir.tensor(array, name=value.name)
        self.replaced[str(value.name)] = array

    def cost_bits(self, switches: Switches) -> int:
        """True bits."""
        bits = sum(coded.code_bits() for coded in self.coded) + LAYOUT_BITS * self.groups
        if switches.mixed:
            bits += DEPTH_BITS * self.groups + self.target.n * math.ceil(math.log2(len(self._parts)))
        if switches.corrected:
            bits += 16 * self.target.n * sum(not _has_bias(site) for site in self.target.sites)
        return bits


def _has_bias(site: Site) -> bool:
    """Whether a bias follows the product, or the sum with its correction."""
    if site.node.op_type == "Gemm" and len(site.node.inputs) == 3:
        return True
    (correction,) = (use.node for use in site.node.outputs[0].uses())
    uses = [use.node for use in correction.outputs[0].uses()]
    return any(node.op_type == "Add" and any(is_bias(value, site.n) for value in node.inputs) for node in uses)


def fill(name: str, line: str, file: Path, rate: float, group_size: int, iterations: int, console: Console) -> Result:
    if (known := load_result(file, Result)) is not None:
        return known
    started = time.monotonic()
    subject = with_corrections(SUBJECTS[name](), table_folder(STORE) / f"{name}.onnx")
    switches = ABLATION[line]
    console.print(f"{name} {line} {rate:g}")
    found = paper_cvxq(subject, rate, group_size, iterations, switches=switches, report=console.print)
    metric = measure_with(subject, found.replaced)
    mean = float(np.mean(found.seconds or 0))
    result = Result(found.bits, found.depth, metric, found.pruned, mean, time.monotonic() - started)
    save_result(file, result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("subjects", nargs="+", choices=("minilm", "smollm2"))
    parser.add_argument("--rates", nargs="+", type=float, default=[3.0, 4.0], help="mean bits of the codes")
    parser.add_argument("--ablation", action="store_true", help="also what the parts of the method are worth")
    parser.add_argument("--group-size", type=int, default=GROUP_SIZE, help="rows of a group")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help=f"of {SAMPLES} samples each")
    arguments = parser.parse_args()
    console = Console(width=160)
    group_size, iterations = arguments.group_size, arguments.iterations
    for name in arguments.subjects:
        table = Table("method", *(f"{rate:g} bits" for rate in arguments.rates), title=name)
        for line in ABLATION if arguments.ablation else (CVXQ,):
            cells = []
            for rate in arguments.rates:
                file = cell_file(STORE, name, f"{line} g{group_size} i{iterations}", rate)
                result = fill(name, line, file, rate, group_size, iterations, console)
                cells.append(f"{result.metric:.4f} ({result.bits:.3f}; {result.pruned:.1%}; {result.seconds:.0f} s)")
            table.add_row(line, *cells)
        console.print(table, "metric (true bits; groups at depth 0; time)")


if __name__ == "__main__":
    main()
