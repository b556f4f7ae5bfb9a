"""What can be exported besides a folder: a torch module with an example of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ModuleSource:
    """A torch module to export.

    Attributes:
        module: Called as `module(**inputs)`; it must return a tensor, or a tuple, list or mapping of tensors.
        inputs: Example tensors by parameter name of `forward`. Sizes of dynamic axes must be at least 2,
            because torch takes 0 and 1 for constants.
        output_names: Names of the outputs in order; torch's own where empty.
        dynamic_axes: By input, the axes whose size may change, with names for them. Where None, axis 0 of
            each input is "batch". Axes of the same name have the same size.
        name: Name of the ONNX file, without its ending.
    """

    module: torch.nn.Module
    inputs: Mapping[str, torch.Tensor]
    output_names: tuple[str, ...] = ()
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None
    name: str = field(default="model")
