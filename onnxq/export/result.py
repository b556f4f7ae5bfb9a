"""What an export reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class OutputDifference:
    """How far one ONNX output is from torch's, over all inputs tried.

    Attributes:
        max_abs: Largest absolute difference.
        relative: `max_abs` over the largest absolute value of torch's output (0 where both are 0).
    """

    name: str
    max_abs: float
    relative: float


@dataclass(frozen=True)
class ExportedGraph:
    """One ONNX file of an export.

    Attributes:
        path: The `.onnx` file.
        opset: Version of the standard operator set.
        nodes: Number of nodes, those of subgraphs counted.
        operators: Number of nodes by operator type, most frequent first.
        bytes: Of the file and its external data.
        shared: Weights that are stored once and used under several names, as `kept <- other names`.
        differences: By output, against torch; empty where nothing was compared.
        unverified: Why nothing was compared; empty where something was.
    """

    path: Path
    opset: int
    nodes: int
    operators: Mapping[str, int]
    bytes: int
    shared: tuple[str, ...]
    differences: tuple[OutputDifference, ...]
    unverified: str = ""

    @property
    def max_abs(self) -> float:
        """Largest absolute difference over all outputs; NaN where nothing was compared."""
        return max((d.max_abs for d in self.differences), default=float("nan"))


@dataclass(frozen=True)
class ExportResult:
    """A finished export.

    Attributes:
        folder: Where everything is.
        task: What the graphs compute ("feature-extraction", "text2text-generation-with-past", "module").
        carried: Files beside the graphs (tokenizer, configs), relative to `folder`.
        seconds: Wall-clock time.
    """

    folder: Path
    task: str
    graphs: tuple[ExportedGraph, ...]
    carried: tuple[str, ...]
    seconds: float
