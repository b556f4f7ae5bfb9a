"""Which parameters of a torch module are stored in binary codes, and with how many planes."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from onnxq.errors import TrainingError
from onnxq.formats.binary import BinaryFormat


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A rule: parameters that a pattern matches, and their format. The first rule that matches a parameter holds.

    Attributes:
        pattern: over parameter names, as of `fnmatch`: ``decoder.*.fc?.weight`` takes ``decoder.layers.0.fc1.weight``.
            Only matrices are meant; vectors that it matches stay float. A tied parameter is matched by any of its
            names.
        planes: of every row, 1 to 6; or int [N], row by row; or None, which keeps the parameter float.
        group_size: inputs that share scales, a multiple of 32; None means the whole row.
        offset: whether groups have an offset.
        transposed: the parameter is stored [inputs, outputs], for ``x @ W``; else [outputs, inputs], as in
            `torch.nn.Linear`, or [words, width], as in `torch.nn.Embedding`.
    """

    pattern: str
    planes: int | np.ndarray | None
    group_size: int | None = None
    offset: bool = False
    transposed: bool = False

    def format(self, n: int) -> tuple[BinaryFormat, np.ndarray | None]:
        """The format of a matrix of N rows, and the order in which its rows are stored: int32 [N], or None.

        Raises:
            ValueError: there are other than N numbers of planes, or one is not 1 to 6.
        """
        assert self.planes is not None, "kept parameters have no format"
        planes = np.full(n, self.planes) if isinstance(self.planes, int) else np.asarray(self.planes)
        if planes.shape != (n,):
            raise ValueError(f"planes are {list(planes.shape)}, and there are {n} rows")
        return BinaryFormat.by_row(planes, self.group_size, offset=self.offset)


@dataclasses.dataclass(frozen=True, eq=False)
class Chosen:
    """A parameter that a rule takes.

    Attributes:
        name: the first of its names.
        parameter: float32, two-dimensional.
        target: the rule.
        format, order: of its matrix, see `Target.format`.
    """

    name: str
    parameter: nn.Parameter
    target: Target
    format: BinaryFormat
    order: np.ndarray | None

    def matrix(self) -> np.ndarray:
        """A copy of its values, float32 [N, K]."""
        values = self.parameter.detach().cpu().numpy()
        return np.array(values.T if self.target.transposed else values, order="C")

    def put(self, matrix: np.ndarray | torch.Tensor) -> None:
        """Overwrites its values with [N, K]."""
        tensor = torch.from_numpy(matrix) if isinstance(matrix, np.ndarray) else matrix
        with torch.no_grad():
            self.parameter.copy_(tensor.T if self.target.transposed else tensor)

    def oriented(self, values: torch.Tensor) -> torch.Tensor:
        """A tensor of the parameter's shape as one of the matrix's, and back."""
        return values.T if self.target.transposed else values


def choose(module: nn.Module, targets: Sequence[Target]) -> list[Chosen]:
    """The parameters that rules take, tied ones once, in the module's order.

    Raises:
        TrainingError: a rule matches no matrix, or does not suit one.
    """
    names: dict[int, list[str]] = defaultdict(list)
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
        parameters[id(parameter)] = parameter
    chosen: list[Chosen] = []
    used: set[int] = set()
    for key, parameter in parameters.items():
        if parameter.dim() != 2:
            continue
        # A rule that a former one hides is no mistake: "keep this one" comes before "all of them".
        matching = [target for target in targets if _matches(target, names[key])]
        used.update(map(id, matching))
        if matching and matching[0].planes is not None:
            chosen.append(_chosen(names[key][0], parameter, matching[0]))
    for target in targets:
        if id(target) not in used:
            raise TrainingError(
                f"No two-dimensional parameter has a name like {target.pattern!r}, so nothing would be stored by this "
                "rule. `module.named_parameters()` lists the names."
            )
    return chosen


def _matches(target: Target, names: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, target.pattern) for name in names)


def _chosen(name: str, parameter: nn.Parameter, target: Target) -> Chosen:
    if parameter.dtype != torch.float32:
        raise TrainingError(
            f"{name} is {parameter.dtype}: what codes stand for is float32, and another type would not hold it. "
            "Call module.float() first."
        )
    try:
        format, order = target.format(parameter.shape[1 if target.transposed else 0])
    except ValueError as error:
        raise TrainingError(
            f"The rule {target.pattern!r} does not suit {name} {list(parameter.shape)}: {error}."
        ) from error
    return Chosen(name, parameter, target, format, order)
