"""`measure_gradients`: runs, backward passes, sums of squares."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from onnxq.backprop import TorchGraph, missing_ops
from onnxq.backprop.convert import from_numpy, torch_type, widened
from onnxq.backprop.plan import Operand
from onnxq.backprop.threads import torch_threads
from onnxq.calibration import CalibrationData
from onnxq.calibration.inputs import Feed
from onnxq.calibration.output_rows import LOGITS, OutputRows
from onnxq.distillation.weights import operand
from onnxq.errors import CalibrationError, ModelError
from onnxq.graph import LoadedModel, Weight, read_array
from onnxq.graph.ties import stored_tensor
from onnxq.progress import Progress
from onnxq.sensitivity.checkpoint import Checkpoint
from onnxq.sensitivity.probes import Probes, Survey
from onnxq.sensitivity.result import Sensitivities, WeightSensitivity
from onnxq.sensitivity.settings import SensitivitySettings

_CHUNK = 1 << 22
"""Elements of a gradient that are squared at a time."""


def measure_gradients(
    loaded: LoadedModel,
    weights: Sequence[Weight],
    data: CalibrationData,
    settings: SensitivitySettings,
    row_groups: Callable[[Weight], np.ndarray],
    checkpoint: Checkpoint,
    progress: Progress,
) -> Sensitivities:
    """See `onnxq.sensitivity.measure`, which says what is estimated."""
    started = time.monotonic()
    if missing := missing_ops(loaded.model):
        ops = ", ".join(f"{item.op} ('{item.nodes[0]}')" for item in missing)
        raise ModelError(f"{loaded.path.name}: no gradient is known for {ops}")
    with torch.device(settings.device), torch_threads(settings.threads):
        run = _Measurement(TorchGraph(loaded), weights, settings, row_groups, checkpoint, progress)
        run.go(data)
        return run.result(time.monotonic() - started)


class _Sums:
    """Sums of squared gradients of one weight, on the device, float32."""

    def __init__(self, weight: Weight, row_group: np.ndarray) -> None:
        rows = weight.batch * weight.n
        if row_group.shape != (rows,):
            raise ValueError(f"{weight.name}: {row_group.shape} row groups for {rows} rows")
        self.row_group = row_group
        self._index = torch.from_numpy(row_group.astype(np.int64)).to(torch.get_default_device())
        self.groups = torch.zeros(int(row_group.max()) + 1, weight.k)
        self.rows = torch.zeros(rows)
        self.reached = 0
        self.spoiled = 0

    def take(self, leaf: Tensor) -> None:
        """Adds the squares of the gradient that has come to a weight, and drops it."""
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        step = max(1, _CHUNK // gradient.shape[1])
        finite = True
        for start in range(0, len(gradient), step):
            squares = gradient[start : start + step].float().square()
            means = squares.mean(1)
            if not bool(torch.isfinite(means).all()):
                finite = False
                squares = torch.nan_to_num(squares, nan=0.0, posinf=0.0, neginf=0.0)
                means = squares.mean(1)
            self.groups.index_add_(0, self._index[start : start + step], squares)
            self.rows[start : start + step] += means
        self.reached += 1
        self.spoiled += not finite

    def finished(self, probed: int) -> WeightSensitivity:
        sizes = np.bincount(self.row_group, minlength=len(self.groups))
        share = (1.0 / (np.maximum(sizes, 1) * probed)).astype(np.float32)
        groups = self.groups.cpu().numpy() * share[:, None]
        return WeightSensitivity(groups, self.rows.cpu().numpy() / np.float32(probed), self.row_group, self.reached)


class _Measurement:
    def __init__(
        self,
        graph: TorchGraph,
        weights: Sequence[Weight],
        settings: SensitivitySettings,
        row_groups: Callable[[Weight], np.ndarray],
        checkpoint: Checkpoint,
        progress: Progress,
    ) -> None:
        self._graph, self._weights, self._settings = graph, weights, settings
        self._checkpoint, self._progress = checkpoint, progress
        self._rules = OutputRows(graph.model, settings.outputs)
        self.kind = settings.kind
        if self.kind == "auto":
            self.kind = "fisher" if self._rules.names == (LOGITS,) else "output"
        if self.kind == "fisher" and self._rules.names != (LOGITS,):
            raise ModelError(f"Log-likelihoods need the output '{LOGITS}'; there is {', '.join(graph.outputs)}.")
        self._sums = {weight.name: _Sums(weight, row_groups(weight)) for weight in weights}
        self._done = self._samples = self._rows = self._passes = 0

    def go(self, data: CalibrationData) -> None:
        stored = self._checkpoint.load()
        survey = None
        total = min(data.samples, self._settings.samples or data.samples)
        if self.kind == "output":
            survey = Survey(self._rules, self._settings)
            if stored is not None:
                survey.restore(stored)
            else:
                self._progress.start("looking at the outputs", total)
                for feed, samples in _parts(data, self._settings):
                    with torch.no_grad():
                        survey.add(self._run(feed, {}), feed)
                    self._progress.advance(samples)
                survey.finish()
        if stored is not None:
            self._restore(stored)
        arrays = {} if survey is None else survey.to_arrays()
        probes = Probes(self.kind, self._rules, survey, self._settings)
        operands = self._leaves()
        self._progress.start("measuring sensitivities", total)
        done = self._done
        for number, (feed, samples) in enumerate(_parts(data, self._settings)):
            if number >= done:
                self._backward(feed, samples, number, probes, operands)
                if self._checkpoint.due:
                    self._checkpoint.save({**arrays, **self._to_arrays()})
            self._progress.advance(samples)
        self._checkpoint.save({**arrays, **self._to_arrays()})
        if not self._rows:
            raise CalibrationError(f"{data.name}: no row of the outputs {', '.join(self._rules.names)} counts.")

    def _leaves(self) -> dict[Operand, Tensor]:
        """The weights as the starts of gradients, as each site reads them; they share the model's memory map."""
        operands = {}
        for weight in self._weights:
            stored = read_array(stored_tensor(weight.roots[0]))
            leaf = widened(from_numpy(weight.layout.apply(stored))).detach().requires_grad_()
            leaf.register_post_accumulate_grad_hook(self._sums[weight.name].take)  # type: ignore[no-untyped-call]
            for site in weight.sites:
                operands[site.node, site.weight_input] = operand(site, leaf).to(torch_type(site.dtype))
        return operands

    def _run(self, feed: Feed, operands: Mapping[Operand, Tensor]) -> dict[str, Tensor]:
        found = self._graph.run(feed, operands=operands, outputs=self._rules.names)
        floats = {name: found[name] for name in self._rules.names if found[name].is_floating_point()}
        if not floats:
            raise ModelError(f"None of the outputs {', '.join(self._rules.names)} is a float tensor.")
        return floats

    def _backward(
        self, feed: Feed, samples: int, number: int, probes: Probes, operands: Mapping[Operand, Tensor]
    ) -> None:
        found = self._run(feed, operands)
        picked = probes.picked(found, feed)
        for passing in range(self._settings.passes):
            sent = {}
            for name, output in found.items():
                first = self._settings.first + self._samples
                cotangent = probes.cotangent(name, output, picked[name], number, passing, first)
                if cotangent is not None and output.requires_grad:
                    sent[name] = cotangent
            if sent:
                # The views through which the sites read a leaf are part of every run's graph: it must be kept.
                torch.autograd.backward([found[name] for name in sent], list(sent.values()), retain_graph=True)
                self._passes += 1
        self._rows += len(picked[next(iter(found))].rows)
        self._samples += samples
        self._done = number + 1

    def _to_arrays(self) -> dict[str, np.ndarray]:
        arrays = {"done": np.array([self._done, self._samples, self._rows, self._passes])}
        for index, sums in enumerate(self._sums.values()):
            arrays[f"groups.{index}"] = sums.groups.cpu().numpy()
            arrays[f"rows.{index}"] = sums.rows.cpu().numpy()
            arrays[f"counts.{index}"] = np.array([sums.reached, sums.spoiled])
        return arrays

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._done, self._samples, self._rows, self._passes = (int(value) for value in arrays["done"])
        for index, sums in enumerate(self._sums.values()):
            sums.groups = from_numpy(arrays[f"groups.{index}"])
            sums.rows = from_numpy(arrays[f"rows.{index}"])
            sums.reached, sums.spoiled = (int(value) for value in arrays[f"counts.{index}"])

    def result(self, seconds: float) -> Sensitivities:
        notes = list(self._rules.notes)
        for what, names in (
            ("no gradient reached", [name for name, sums in self._sums.items() if not sums.reached]),
            ("gradients that are no numbers were taken as 0 in", [n for n, s in self._sums.items() if s.spoiled]),
        ):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                notes.append(f"{what} {', '.join(names[:5])}{more}")
        return Sensitivities(
            weights={name: sums.finished(self._rows) for name, sums in self._sums.items()},
            kind=self.kind,
            outputs=self._rules.names,
            samples=self._samples,
            rows=self._rows,
            passes=self._passes,
            notes=tuple(notes),
            seconds=seconds,
        )


def _parts(data: CalibrationData, settings: SensitivitySettings) -> Iterator[tuple[Feed, int]]:
    """Feeds and their numbers of samples: some of the batches, in parts that are small enough."""
    wanted = min(data.samples, settings.samples or data.samples)
    # As many batches as hold so many samples on average; the last may give more than are left.
    count = min(max(round(data.batches * wanted / data.samples), 1), data.batches)
    chosen = set(np.linspace(0, data.batches - 1, count).astype(int).tolist())
    # One flag for all samples, as merged decoders take it, is no axis of samples.
    fixed = any(item.shape and isinstance(item.shape[0], int) and tuple(item.shape) != (1,) for item in data.inputs)
    left = wanted
    for number, feed in enumerate(data):
        if number not in chosen or left <= 0:
            continue
        carried = {name: array for name, array in feed.items() if array.shape not in ((), (1,))}
        sizes = {array.shape[0] for array in carried.values()}
        samples = next((array.shape[0] for array in carried.values()), 1)
        if fixed or len(sizes) != 1:  # what belongs to which sample is not known
            yield feed, samples
            left -= samples
            continue
        tokens = max((a.size for a in feed.values() if a.ndim == 2 and a.dtype.kind in "iub"), default=samples)
        step = max(1, settings.tokens_at_once * samples // max(tokens, 1))
        for start in range(0, samples, step):
            stop = min(start + step, samples, start + left)
            if stop > start:
                yield {name: a[start:stop] if name in carried else a for name, a in feed.items()}, stop - start
                left -= stop - start
