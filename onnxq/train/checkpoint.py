"""A retraining on disk: one ``.npz`` that is written whole or not at all, and is bound to what it was made by."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onnxq.errors import TrainingError
from onnxq.formats.binary import BinaryEncoding
from onnxq.train.phases import Phase, TrainSettings
from onnxq.train.targets import Target

_HEADER = "header"


@dataclasses.dataclass
class Best:
    """The projected model with the least validation loss of a phase so far.

    Attributes:
        loss: None where nothing validates.
        module: parameters and buffers by name.
        encodings: by parameter name.
        floats: what stood behind the codes, by parameter name.
    """

    loss: float | None
    module: dict[str, Tensor]
    encodings: dict[str, BinaryEncoding]
    floats: dict[str, Tensor]


@dataclasses.dataclass
class State:
    """Everything that training goes on from.

    Attributes:
        phase, step: number of the phase, and how many of its steps are done.
        module: parameters and buffers by name.
        leaves: what is trained, by name; empty before a phase's first step.
        optimizer: its tensors by leaf and key.
        known: encodings that the phase's student goes by.
        floats: what stood behind the codes when the phase began.
        best: of this phase; None before its first validation.
        history: validations so far, as plain values.
        losses: of training since the last validation: sum and number.
    """

    phase: int
    step: int
    module: dict[str, Tensor]
    leaves: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    known: dict[str, BinaryEncoding]
    floats: dict[str, Tensor]
    best: Best | None
    history: list[list[float]]
    losses: tuple[float, int]


def fingerprint(phases: Sequence[Phase], settings: TrainSettings) -> str:
    """Equal for the same training, in a form that people can compare."""
    described: list[dict[str, Any]] = []
    for phase in phases:
        fields = {field.name: getattr(phase, field.name) for field in dataclasses.fields(phase)}
        described.append({**fields, "targets": [_describe(target) for target in phase.targets]})
    plain = {**dataclasses.asdict(settings), "solver": settings.solver.value}
    plain.pop("checkpoint_every")
    return json.dumps({"phases": described, "settings": plain}, sort_keys=True)


def _describe(target: Target) -> dict[str, Any]:
    fields = {field.name: getattr(target, field.name) for field in dataclasses.fields(target)}
    if isinstance(target.planes, np.ndarray):
        fields["planes"] = hashlib.blake2b(target.planes.astype(np.int64).tobytes(), digest_size=8).hexdigest()
    return fields


def save(path: Path, state: State, identity: str) -> None:
    """Writes a checkpoint over the last one."""
    arrays: dict[str, Any] = {}
    _put_tensors(arrays, "module", state.module)
    _put_tensors(arrays, "leaves", state.leaves)
    _put_tensors(arrays, "floats", state.floats)
    _put_encodings(arrays, "known", state.known)
    for leaf, tensors in state.optimizer.items():
        _put_tensors(arrays, f"optimizer|{leaf}", tensors)
    if state.best is not None:
        _put_tensors(arrays, "best module", state.best.module)
        _put_tensors(arrays, "best floats", state.best.floats)
        _put_encodings(arrays, "best", state.best.encodings)
    header = {
        "identity": identity,
        "phase": state.phase,
        "step": state.step,
        "best": None if state.best is None else [state.best.loss],
        "history": state.history,
        "losses": state.losses,
    }
    arrays[_HEADER] = np.array(json.dumps(header))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(partial, path)


def load(path: Path, identity: str) -> State | None:
    """The checkpoint; None where there is none.

    Raises:
        TrainingError: it can't be read, or is of another training.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            header = json.loads(str(stored[_HEADER]))
            arrays = {name: stored[name] for name in stored.files if name != _HEADER}
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(f"{path} can't be read as a checkpoint: {error}. Remove it to start anew.") from error
    if header["identity"] != identity:
        raise TrainingError(
            f"{path} is a checkpoint of a training with other phases or settings: give these, or remove it to start "
            f"anew. Its own were {header['identity']}"
        )
    tree: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        branch, _, key = name.rpartition("|")
        tree.setdefault(branch, {})[key] = array
    best = None
    if header["best"] is not None:
        best = Best(
            header["best"][0],
            _tensors(tree.get("best module", {})),
            _encodings(tree, "best"),
            _tensors(tree.get("best floats", {})),
        )
    optimizer = {
        branch.partition("|")[2]: _tensors(found) for branch, found in tree.items() if branch.startswith("optimizer|")
    }
    return State(
        header["phase"],
        header["step"],
        _tensors(tree.get("module", {})),
        _tensors(tree.get("leaves", {})),
        optimizer,
        _encodings(tree, "known"),
        _tensors(tree.get("floats", {})),
        best,
        header["history"],
        tuple(header["losses"]),
    )


def _put_tensors(arrays: dict[str, Any], branch: str, tensors: Mapping[str, Tensor]) -> None:
    arrays.update({f"{branch}|{name}": tensor.detach().cpu().numpy() for name, tensor in tensors.items()})


def _put_encodings(arrays: dict[str, Any], branch: str, encodings: Mapping[str, BinaryEncoding]) -> None:
    for name, encoding in encodings.items():
        arrays.update({f"{branch}|{name}|{key}": array for key, array in encoding.to_arrays().items()})


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def _encodings(tree: Mapping[str, Mapping[str, np.ndarray]], branch: str) -> dict[str, BinaryEncoding]:
    start = f"{branch}|"
    return {
        name[len(start) :]: BinaryEncoding.from_arrays(arrays)
        for name, arrays in tree.items()
        if name.startswith(start)
    }
