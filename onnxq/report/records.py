"""What was done to each constant of a model, as plain values.

The pipeline fills them, the written model carries them in its metadata, `onnxq inspect` reads them back, and the
command line renders them. One entry per constant: nothing is silent.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

REPORT_PROPERTY = "onnxq.report"
"""Metadata key of a written model that holds its report."""


@dataclasses.dataclass(frozen=True)
class WeightRecord:
    """A weight that was quantised.

    Attributes:
        name: the weight's name, prefix of its initializers in the written model.
        kinds: kinds of its sites, "linear" or "table" or both for a tied weight.
        sites: how many sites read it.
        shape: [batch * N, K].
        format: label of the format, such as "uniform 3-bit g64 midrise".
        form: how it stands in the graph, such as "LowBitMatMul" or "DequantizeLinear".
        solver: what chose the codes.
        source_bytes: its bytes in the source model.
        bytes: its bytes in the written model, all side data and padding counted.
        relative_error: ||W - W'||^2 / ||W||^2; None in a plan, where nothing was solved.
        proxy_loss: tr(dW H dW^T) / tr(W H W^T), the expected relative output error; None without calibration.
        note: what else the reader should know, such as why a stock form was not possible.
        seconds: time to solve it.
        snr: signal-to-noise ratio of its products on a sample of their inputs, in dB, with what is done to inputs;
            None where it was not measured.
    """

    name: str
    kinds: tuple[str, ...]
    sites: int
    shape: tuple[int, int]
    format: str
    form: str
    solver: str
    source_bytes: int
    bytes: int
    relative_error: float | None
    proxy_loss: float | None
    note: str
    seconds: float
    snr: float | None = None

    @property
    def bits_per_weight(self) -> float:
        """True bits: what the file holds, divided by the weights."""
        return 8 * self.bytes / (self.shape[0] * self.shape[1])


@dataclasses.dataclass(frozen=True)
class KeptRecord:
    """A constant that stayed as it was, and why."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    reason: str


@dataclasses.dataclass(frozen=True)
class OutputCheck:
    """The written model run beside the source on calibration data.

    Attributes:
        samples: how many samples were run.
        relative_errors: for each output ||y' - y|| / ||y||.
    """

    samples: int
    relative_errors: dict[str, float]


@dataclasses.dataclass(frozen=True)
class BudgetRecord:
    """A ceiling that the widths were chosen for.

    Attributes:
        what: "size" (bytes of the written files), "bits" (mean of products' weights), "table_bits", or "max_error"
            (expected of the outputs; got is an expectation too).
        asked: the ceiling.
        floor: the least that the allowed formats come to.
        got: what was written; in a plan, and in the report that a written model carries, an upper bound of it.
    """

    what: str
    asked: float
    floor: float = 0.0
    got: float = 0.0


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """One run of `onnxq.quantize`.

    Attributes:
        source, output: paths of the model that was read and the one that was written.
        source_bytes, bytes: their sizes on disk, external data counted. `bytes` is the planned size in a plan.
        version: of onnxq.
        recipe: the recipe as plain data, seed included.
        calibration: what was seen, in words; empty without calibration data.
        weights, kept: every constant of the model.
        notes: sentences that no single weight owns.
        seconds: time of the whole run.
        peak_memory: largest resident size of the process in bytes.
        check: the comparison with the source; None when there was no data to run.
        budget: the ceilings that widths were chosen for; empty for a fixed layout.
    """

    source: str
    output: str
    source_bytes: int
    bytes: int
    version: str
    recipe: dict[str, Any]
    calibration: str
    weights: tuple[WeightRecord, ...]
    kept: tuple[KeptRecord, ...]
    notes: tuple[str, ...]
    seconds: float
    peak_memory: int
    check: OutputCheck | None = None
    budget: tuple[BudgetRecord, ...] = ()

    @property
    def linear_bits(self) -> float | None:
        """Mean true bits over the weights that products read."""
        return _mean_bits([weight for weight in self.weights if "linear" in weight.kinds])

    @property
    def table_bits(self) -> float | None:
        """Mean true bits over the weights that only look-ups read."""
        return _mean_bits([weight for weight in self.weights if "linear" not in weight.kinds])

    def as_written(self, size: int) -> QuantizeReport:
        """With the size of the written files, and what the budgets came to."""
        exact = {"size": size, "bits": self.linear_bits, "table_bits": self.table_bits}
        budget = tuple(dataclasses.replace(item, got=exact.get(item.what) or item.got) for item in self.budget)
        return dataclasses.replace(self, bytes=size, budget=budget)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = dataclasses.asdict(self)
        for record, weight in zip(plain["weights"], self.weights, strict=True):
            record["bits_per_weight"] = weight.bits_per_weight
        return {**plain, "linear_bits": self.linear_bits, "table_bits": self.table_bits}

    def to_json(self) -> str:
        """The text that a written model carries."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> QuantizeReport:
        """Reads what `to_json` wrote, from this or an older version of onnxq."""
        plain = json.loads(text)
        report: QuantizeReport = _build(cls, {**plain, "check": None})
        check = plain.get("check")
        return dataclasses.replace(report, check=_build(OutputCheck, check)) if check else report


@dataclasses.dataclass(frozen=True)
class FolderReport(Mapping[str, QuantizeReport]):
    """What became of each graph, by file name, and of all of them.

    Attributes:
        graphs: the reports.
        budget: the ceilings of all graphs together.
        notes: sentences that no single graph owns.
    """

    graphs: dict[str, QuantizeReport]
    budget: tuple[BudgetRecord, ...] = ()
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> QuantizeReport:
        return self.graphs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.graphs)

    def __len__(self) -> int:
        return len(self.graphs)

    @property
    def bytes(self) -> int:
        """Of all graphs."""
        return sum(report.bytes for report in self.graphs.values())

    @property
    def source_bytes(self) -> int:
        """Of all graphs before."""
        return sum(report.source_bytes for report in self.graphs.values())


def _mean_bits(weights: list[WeightRecord]) -> float | None:
    count = sum(weight.shape[0] * weight.shape[1] for weight in weights)
    return 8 * sum(weight.bytes for weight in weights) / count if count else None


_INNER = {"weights": WeightRecord, "kept": KeptRecord, "budget": BudgetRecord}


def _build(cls: type, plain: dict[str, Any]) -> Any:
    """An instance from plain data: lists become the tuples that the records hold, unknown keys are left out."""
    known = {}
    for field in dataclasses.fields(cls):
        if field.name not in plain:
            continue
        value = plain[field.name]
        if isinstance(value, list):
            inner = _INNER.get(field.name) if cls is QuantizeReport else None
            value = tuple(_build(inner, item) for item in value) if inner else tuple(value)
        known[field.name] = value
    return cls(**known)
