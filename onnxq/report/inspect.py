"""Reading a model: which weight holds the bytes, at how many bits, with what error.

Works on any ONNX model. Sizes come from the tensors in the file; a report that the model carries adds what
only the quantiser knew (errors, reasons) and is held against the file.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq.errors import ModelError
from onnxq.graph import SiteReport, Skipped, find_weights
from onnxq.graph.load import all_tensors, find_model_file
from onnxq.graph.tensors import WEIGHT_TYPES, data_identity
from onnxq.passes.forms.framed import ARRAY_PREFIX
from onnxq.passes.forms.planes import TABLE_PREFIX
from onnxq.report.records import REPORT_PROPERTY, KeptRecord, QuantizeReport
from onnxq.report.stored import Part, stored_parts
from onnxq.report.units import count, size
from onnxq.runtime.optimized import initializer, nodes_of, read_graph
from onnxq.solvers.loss import relative_error


@dataclasses.dataclass(frozen=True)
class InspectedWeight:
    """A weight as the file has it.

    Attributes:
        name: as the report, or the graph, names it.
        kinds: "linear", "table" or both.
        shape: (N, K).
        format: how it is stored, in words.
        form: the op types that read it.
        code_bits: of one code, or of a float; a mean where depths are mixed.
        bytes: of all its tensors in the file.
        relative_error: ||W - W'||^2 / ||W||^2; None where unknown.
        measured: whether the error was measured here, against a reference model, and not only reported.
        proxy_loss: expected relative output error on the calibration data; None where unknown.
        tensors: names of its initializers.
        nodes: names of the nodes that read it.
        outputs: names of what these nodes compute.
    """

    name: str
    kinds: tuple[str, ...]
    shape: tuple[int, int]
    format: str
    form: str
    code_bits: float
    bytes: int
    relative_error: float | None
    measured: bool
    proxy_loss: float | None
    tensors: tuple[str, ...]
    nodes: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        """True bits: all bytes in the file, over the weights."""
        return 8 * self.bytes / max(self.shape[0] * self.shape[1], 1)

    @property
    def layer(self) -> str:
        """The module it belongs to: its name up to the first number that counts layers."""
        return layer_of(self.name)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A model as it is on disk.

    Attributes:
        path: the .onnx file.
        file_bytes: of it and its data files.
        tensor_bytes: of all stored tensors; the rest is graph, names and padding.
        opset, ir_version, producer: as the file says.
        nodes: how many, functions left out.
        functions: names of model-local functions.
        weights: in the order of first use.
        kept: every other constant that `find_weights` lists, and why it is none.
        notes: about ties and stacks.
        mismatches: where the file and the report it carries differ.
        report: what the quantiser wrote; None for models of others.
        recipe: as YAML; empty for models of others.
    """

    path: str
    file_bytes: int
    tensor_bytes: int
    opset: int
    ir_version: int
    producer: str
    nodes: int
    functions: tuple[str, ...]
    weights: tuple[InspectedWeight, ...]
    kept: tuple[KeptRecord, ...]
    notes: tuple[str, ...]
    mismatches: tuple[str, ...]
    report: QuantizeReport | None
    recipe: str

    @property
    def weight_bits(self) -> float | None:
        """Mean true bits over all weights."""
        total = sum(w.shape[0] * w.shape[1] for w in self.weights)
        return 8 * sum(w.bytes for w in self.weights) / total if total else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = dataclasses.asdict(self)
        plain["report"] = None if self.report is None else self.report.to_dict()
        for record, weight in zip(plain["weights"], self.weights, strict=True):
            record["bits_per_weight"] = weight.bits_per_weight
        return {**plain, "weight_bits": self.weight_bits}


def layer_of(name: str) -> str:
    """The module that a weight belongs to: "encoder.layer.3" of "encoder.layer.3.attention.query.weight"."""
    pieces = name.replace("/", ".").strip(".").split(".")
    for index, piece in enumerate(pieces):
        if piece.isdigit():
            return ".".join(pieces[: index + 1])
    return ".".join(pieces[:-1]) or name


def inspect_model(path: str | Path, *, reference: str | Path | None = None) -> Inspection:
    """Reads a model. Weights are read only where a reference is given to measure errors against.

    Args:
        path: an .onnx file, or a folder that holds exactly one.
        reference: the float model it was made of.

    Raises:
        ModelError: a file can't be read, or the reference has none of the weights.
    """
    file = find_model_file(Path(path))
    model = read_graph(file)
    report, recipe, mismatches = _carried(model)
    parts: dict[str, list[Part]] = defaultdict(list)
    for part in stored_parts(model):
        parts[part.name].append(part)
    found = find_weights(model)
    quantised = {id(value) for group in parts.values() for part in group for value in part.tensors}
    records = {} if report is None else {record.name: record for record in report.weights}
    measured = {} if reference is None else _measure(parts, Path(reference))
    weights = []
    for name, group in parts.items():
        record = records.get(name)
        error = measured.get(name)
        weights.append(
            InspectedWeight(
                name=name,
                kinds=tuple(dict.fromkeys(kind for part in group for kind in part.kinds)),
                shape=(sum(part.n for part in group), group[0].k),
                format=record.format if record is not None else group[0].label,
                form=" + ".join(dict.fromkeys(node.op_type for part in group for node in part.nodes)),
                code_bits=group[0].bits,
                bytes=_bytes_of(tuple(value for part in group for value in part.tensors)),
                relative_error=error if error is not None else record.relative_error if record is not None else None,
                measured=error is not None,
                proxy_loss=record.proxy_loss if record is not None else None,
                tensors=tuple(value.name or "" for part in group for value in part.tensors),
                nodes=tuple(node.name or "" for part in group for node in part.nodes),
                outputs=tuple(_outputs(node) for part in group for node in part.nodes),
            )
        )
    weights += _float_weights(found, quantised)
    if report is not None:
        mismatches += _differences(weights, report)
    reasons = {} if report is None else {record.name: record.reason for record in report.kept}
    kept = tuple(
        KeptRecord(item.name, item.shape, item.dtype.name, item.bytes, reasons.get(item.name) or _reason(item))
        for item in found.skipped
        if not _is_part(model, item.name, quantised) and not item.name.startswith(TABLE_PREFIX)
    )
    tensors = list(all_tensors(model))
    data_files = {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    missing = [str(data) for data in data_files if not data.is_file()]
    if missing:
        raise ModelError(f"{file}: its data file {missing[0]} is missing. Put it beside the model, as it was written.")
    return Inspection(
        path=str(file),
        file_bytes=file.stat().st_size + sum(data.stat().st_size for data in data_files),
        tensor_bytes=sum({data_identity(tensor): tensor.nbytes for tensor in tensors}.values()),
        opset=model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx", 0)),
        ir_version=model.ir_version,
        producer=" ".join(text for text in (model.producer_name, model.producer_version) if text),
        nodes=sum(1 for _ in nodes_of(model)),
        functions=tuple(f"{key[0]}::{key[1]}" for key in model.functions),
        weights=tuple(weights),
        kept=kept,
        notes=tuple(found.notes),
        mismatches=tuple(mismatches),
        report=report,
        recipe=recipe,
    )


def _carried(model: ir.Model) -> tuple[QuantizeReport | None, str, list[str]]:
    """The report and recipe in a model's metadata, and what is wrong with them."""
    recipe = model.metadata_props.get("onnxq.recipe", "")
    text = model.metadata_props.get(REPORT_PROPERTY)
    if not text:
        return None, recipe, []
    try:
        return QuantizeReport.from_json(text), recipe, []
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return None, recipe, [f"the report that the model carries can't be read: {error}"]


def _reason(item: Skipped) -> str:
    """Why a constant is no weight; the bias that our ops take along is no quantised tensor."""
    if item.dtype in WEIGHT_TYPES and len(item.shape) == 1:
        return "rank 1: bias or norm parameter"
    return item.reason


def _outputs(node: ir.Node) -> str:
    """What a reader computes; for DequantizeLinear, what the product behind it does."""
    if node.op_type == "DequantizeLinear":
        users = [user for value in node.outputs for user in value.consumers()]
        node = users[0] if users else node
    return node.outputs[0].name or ""


def _bytes_of(values: tuple[ir.Value, ...]) -> int:
    """Bytes in the file, tensors that share their bytes counted once."""
    tensors = [tensor for value in values if (tensor := initializer(value)) is not None]
    return sum({data_identity(tensor): tensor.nbytes for tensor in tensors}.values())


def _is_part(model: ir.Model, name: str, quantised: set[int]) -> bool:
    return any(id(graph.initializers.get(name)) in quantised for graph in model.graphs() if name in graph.initializers)


def _float_weights(found: SiteReport, quantised: set[int]) -> list[InspectedWeight]:
    """Weights that are stored as floats; side data of quantised ones may stand in products too."""
    return [
        InspectedWeight(
            name=weight.name,
            kinds=weight.kinds,
            shape=(weight.batch * weight.n, weight.k),
            format="float32" if weight.dtype == ir.DataType.FLOAT else weight.dtype.name.lower(),
            form=" + ".join(dict.fromkeys(site.node.op_type for site in weight.sites)),
            code_bits=weight.dtype.bitwidth,
            bytes=weight.bytes,
            relative_error=None,
            measured=False,
            proxy_loss=None,
            tensors=tuple(root.name or "" for root in weight.roots),
            nodes=tuple(site.name for site in weight.sites),
            outputs=tuple(site.node.outputs[0].name or "" for site in weight.sites),
        )
        for weight in found.weights
        if not weight.name.startswith(ARRAY_PREFIX)  # transforms in standard ops
        and not any(id(root) in quantised for root in weight.roots)
    ]


def _differences(weights: list[InspectedWeight], report: QuantizeReport) -> list[str]:
    """Where the file is not what its report says."""
    by_name = {weight.name: weight for weight in weights}
    wrong = []
    for record in report.weights:
        weight = by_name.get(record.name)
        if weight is None:
            wrong.append(f"'{record.name}' is in the report and not in the file")
        elif weight.bytes != record.bytes:
            wrong.append(f"'{record.name}' takes {weight.bytes:,} bytes in the file, {record.bytes:,} in the report")
        elif weight.shape != tuple(record.shape):
            wrong.append(f"'{record.name}' is {list(weight.shape)} in the file, {list(record.shape)} in the report")
    if wrong:
        wrong.append("the model was changed after onnxq wrote it; the sizes here are those of the file")
    return wrong


def _measure(parts: dict[str, list[Part]], reference: Path) -> dict[str, float]:
    """||W - W'||^2 / ||W||^2 of every weight that the reference has too, by name or by its node.

    Peak memory: two copies of the largest weight in float32.
    """
    originals = find_weights(read_graph(reference)).weights
    by_name = {weight.name: weight for weight in originals}
    by_node = {site.name: weight for weight in originals for site in weight.sites}
    errors = {}
    for name, group in parts.items():
        nodes = [user.name for part in group for node in part.nodes for user in (node, *node.outputs[0].consumers())]
        weight = by_name.get(name) or next((by_node[node] for node in nodes if node in by_node), None)
        if weight is None or any(part.decode is None for part in group):
            continue
        decoded = np.concatenate([part.decode() for part in group if part.decode is not None])
        if decoded.shape == (weight.batch * weight.n, weight.k):
            errors[name] = relative_error(weight.matrix(), decoded)
    if parts and not errors:
        raise ModelError(
            f"None of {count(len(parts), 'quantised weight')} is in {reference} under the same name or node. "
            "Name the float model that this one was made of."
        )
    return errors


def summary(inspection: Inspection) -> str:
    """One line: "17.4 MB in 2 files ..., 75 weights at 4.13 bits"."""
    bits = inspection.weight_bits
    mean = "" if bits is None else f" at {bits:.2f} bits"
    return f"{size(inspection.file_bytes)}, {count(len(inspection.weights), 'weight')}{mean}"
