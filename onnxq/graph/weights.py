"""Group the sites of one matrix into one weight, and account for every constant of the model."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq.graph.layout import Layout
from onnxq.graph.naming import make_unique, weight_name
from onnxq.graph.parts import part_of
from onnxq.graph.sites import Constant, Site, find_constants
from onnxq.graph.tensors import WEIGHT_TYPES, check_finite, read_array
from onnxq.graph.ties import stored_tensor, tied_groups

_REPORTED_BYTES = 1024  # constants of other types (shapes, masks) are listed from this size on


@dataclass(frozen=True, eq=False)
class Weight:
    """One matrix, wherever the model stores and uses it.

    Attributes:
        name: unique in the model, stable between runs.
        sites: its uses, in walking order. All see the same [batch * n, k] matrix.
        batch: number of stacked matrices (1 unless the constant has leading axes longer than 1).
        n: outputs, or rows of a table.
        k: inputs, or row width.
        shape: shape of the preferred stored copy.
        dtype: its stored element type.
        roots: the stored copies, the preferred one first (a table's, because its rows are contiguous).
        bytes: what all stored copies take in the source model.
        other_uses: why the float copy has to stay beside the encoding; empty when it can go.
        part: of the transformer, such as "decoder.cross" (`onnxq.graph.parts`).
        elsewhere: kinds of sites that other graphs of the same folder have of it (`onnxq.graph.shared`).
    """

    name: str
    sites: tuple[Site, ...]
    batch: int
    n: int
    k: int
    shape: tuple[int, ...]
    dtype: ir.DataType
    roots: tuple[ir.Value, ...]
    bytes: int
    other_uses: tuple[str, ...]
    layout: Layout = field(repr=False)
    part: str = ""
    elsewhere: tuple[str, ...] = ()

    def matrix(self) -> np.ndarray:
        """The matrix, float32 [batch * n, k], contiguous, read anew from the model; the caller owns it.

        Raises:
            ModelError: unreadable, or NaN or infinity inside.
        """
        return self.rows(0, self.batch * self.n)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` of `matrix`, for work in bounded memory."""
        with np.errstate(over="ignore"):  # a double too large for float32 is reported by check_finite
            view = self.layout.apply(read_array(stored_tensor(self.roots[0])))
            rows = np.array(view[start:stop], dtype=np.float32, order="C")
        check_finite(rows, self.name)
        return rows

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which kinds of site it has, here or elsewhere: ("table", "linear") for a tied embedding."""
        return tuple(dict.fromkeys([*self.own_kinds, *self.elsewhere]))

    @property
    def own_kinds(self) -> tuple[str, ...]:
        """Which kinds of site it has in its own graph."""
        return tuple(dict.fromkeys(site.kind for site in self.sites))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "name": self.name,
            "kinds": list(self.kinds),
            "batch": self.batch,
            "n": self.n,
            "k": self.k,
            "shape": list(self.shape),
            "dtype": self.dtype.name,
            "bytes": self.bytes,
            "initializers": [root.name for root in self.roots],
            "sites": [_site_to_dict(site) for site in self.sites],
            "other_uses": list(self.other_uses),
        }


@dataclass(frozen=True)
class Skipped:
    """A constant that stays as it is, and why."""

    name: str
    shape: tuple[int, ...]
    dtype: ir.DataType
    bytes: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype.name,
            "bytes": self.bytes,
            "reason": self.reason,
        }


@dataclass(frozen=True, eq=False)
class SiteReport:
    """Every constant of a model, in ``weights`` or in ``skipped``.

    Attributes:
        weights: in the order of their first use.
        skipped: in the order they are stored: all float constants of two elements or more that are no weight,
            and those of other types that are already quantised or take 1 KB or more.
        notes: what a reader should know about ties, batches and types, in sentences.
    """

    weights: list[Weight]
    skipped: list[Skipped]
    notes: list[str]

    @property
    def weight_bytes(self) -> int:
        """What the weights take in the source model, every stored copy counted once."""
        roots = {root for weight in self.weights for root in weight.roots}
        return sum(stored_tensor(root).nbytes for root in roots)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "weights": [weight.to_dict() for weight in self.weights],
            "skipped": [skipped.to_dict() for skipped in self.skipped],
            "notes": list(self.notes),
        }


def find_weights(model: ir.Model, graph: str = "") -> SiteReport:
    """Group the sites of a model into weights, and say of every other constant why it is none.

    1. Sites that see one and the same matrix are one weight (`onnxq.graph.ties`): an embedding and the output
       head tied to it, the two branches of a merged decoder.
    2. Sites of one stored tensor that need different matrices (W in one place, W transposed in another) are
       two weights: groups run along K, which differs. A note says so.
    3. A weight's matrix is read from a table's copy where there is one.
    4. A stored tensor that something else reads as well keeps its float copy; ``Weight.other_uses`` says what
       reads it.

    Args:
        model: the model.
        graph: its file's name, without suffix; tells encoders from decoders where names of nodes don't.

    Raises:
        ModelError: a tensor can't be read.
    """
    constants = find_constants(model)
    by_root = {constant.value: constant for constant in constants}
    groups = tied_groups(site for constant in constants for site in constant.sites)  # rules 1 and 2
    weights = [_weight(group, by_root) for group in groups]
    names = make_unique([weight.name for weight in weights])
    weights = [
        replace(weight, name=name, part=_part(weight, name, graph)) for weight, name in zip(weights, names, strict=True)
    ]
    skipped = [s for c in constants if not c.sites and (s := _try_skip(c)) is not None]
    return SiteReport(weights, skipped, _notes(weights))


def _part(weight: Weight, name: str, graph: str) -> str:
    names = [name, *(site.name for site in weight.sites)]
    return part_of(names, graph, look_ups="table" in weight.kinds)


def _weight(group: list[Site], by_root: dict[ir.Value, Constant]) -> Weight:
    first = next((s for s in group if s.kind == "table"), group[0])  # rule 3
    roots = tuple(dict.fromkeys([first.root, *(s.root for s in group)]))
    tensor = stored_tensor(first.root)
    return Weight(
        name=weight_name(list(roots), [s.node for s in group]),
        sites=tuple(group),
        batch=first.batch,
        n=first.n,
        k=first.k,
        shape=tuple(tensor.shape.numpy()),
        dtype=tensor.dtype,
        roots=roots,
        bytes=sum(stored_tensor(root).nbytes for root in roots),
        other_uses=_other_uses([by_root[root] for root in roots]),  # rule 4
        layout=first.layout,
    )


def _other_uses(stored: list[Constant]) -> tuple[str, ...]:
    return tuple(
        dict.fromkeys(
            refusal.reason if len(stored) == 1 else f"{constant.value.name}: {refusal.reason}"
            for constant in stored
            for refusal in constant.refusals
        )
    )


def _try_skip(constant: Constant) -> Skipped | None:
    """The entry of a constant without sites; None for scalars, strings and small integers."""
    tensor, refusals = constant.tensor, constant.refusals
    quantised = any(refusal.quantised for refusal in refusals)
    large = tensor.nbytes >= _REPORTED_BYTES
    if tensor.size < 2 or tensor.dtype == ir.DataType.STRING:
        return None
    if tensor.dtype in WEIGHT_TYPES or quantised:
        reason = _reason(constant)
    elif large or tensor.dtype.is_floating_point():
        reason = f"{tensor.dtype.name}: not a float weight ({_reason(constant)})"
    else:
        return None
    return Skipped(constant.value.name or "", tuple(tensor.shape.numpy()), tensor.dtype, tensor.nbytes, reason)


def _reason(constant: Constant) -> str:
    reasons = list(dict.fromkeys(refusal.reason for refusal in constant.refusals))
    if not reasons:
        return "unused: nothing reads it"
    if len(constant.tensor.shape) < 2 and all(refusal.generic for refusal in constant.refusals):
        return f"rank {len(constant.tensor.shape)}: bias or norm parameter"
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return "; ".join(reasons[:3]) + more


def _notes(weights: list[Weight]) -> list[str]:
    notes = []
    by_root: dict[ir.Value, list[str]] = defaultdict(list)
    for weight in weights:
        for root in weight.roots:
            by_root[root].append(weight.name)
        if len(weight.roots) > 1:
            copies = ", ".join(str(root.name) for root in weight.roots)
            notes.append(f"'{weight.name}' is stored {len(weight.roots)} times ({copies}): one encoding serves all.")
        if weight.batch > 1:
            notes.append(f"'{weight.name}' is a stack of {weight.batch} matrices [{weight.n}, {weight.k}].")
        if weight.dtype == ir.DataType.DOUBLE:
            notes.append(f"'{weight.name}' is stored in double and encoded from its float32 rounding.")
        if weight.other_uses:
            uses = "; ".join(weight.other_uses)
            notes.append(f"'{weight.name}' keeps its float copy beside the encoding, for it has other uses: {uses}.")
    for root, names in by_root.items():
        if len(names) > 1:
            notes.append(
                f"'{root.name}' is needed in {len(names)} arrangements ({', '.join(names)}): "
                "groups run along K, which differs, so each has an encoding of its own."
            )
    return notes


def _site_to_dict(site: Site) -> dict[str, Any]:
    return {
        "name": site.name,
        "op": site.node.op_type,
        "kind": site.kind,
        "side": site.side,
        "scope": site.scope,
        "initializer": site.root.name,
        "chain": [node.op_type for node in site.chain],
        "dtype": site.dtype.name,
    }
