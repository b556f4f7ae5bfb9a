"""A torch module to ONNX through torch's own exporter (`torch.export`, not tracing)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxq.errors import ExportError
from onnxq.export.finish import finish_graph
from onnxq.export.huggingface import quiet
from onnxq.export.result import ExportedGraph
from onnxq.export.source import ModuleSource
from onnxq.export.verify import Comparison, checked, compare_outputs, cpu_session

if TYPE_CHECKING:
    import torch

LOWEST_OPSET = 18


def export_module(
    source: ModuleSource, out: Path, opset: int, tolerance: float | None, tell: Callable[[str], None]
) -> ExportedGraph:
    """Export `source` as `<out>/<name>.onnx`.

    Raises:
        ExportError: torch cannot export the module, or the graph computes something else.
    """
    if opset < LOWEST_OPSET:
        raise ExportError(
            f"torch exports modules from opset {LOWEST_OPSET} on, not {opset}: choose a higher one, best 21"
        )
    module = source.module.eval()
    tell(f"exporting {type(module).__name__}")
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        program = _export(module, source, opset)
    parameters = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    path = out / f"{source.name}.onnx"
    tell(f"writing {path.name}")
    facts = finish_graph(program.model, path, opset, parameters)
    comparison = None
    if tolerance is not None:
        tell("comparing with torch")
        comparison = _compare(module, source.inputs, path)
    return checked(path, facts, comparison, tolerance)


def _export(module: torch.nn.Module, source: ModuleSource, opset: int) -> Any:
    import torch

    axes = source.dynamic_axes
    if axes is None:
        axes = {name: {0: "batch"} for name, value in source.inputs.items() if value.ndim > 0}
    unknown = sorted(set(axes) - set(source.inputs))
    if unknown:
        raise ExportError(
            f"dynamic_axes names {', '.join(unknown)}, which are no inputs; there are {', '.join(source.inputs)}"
        )
    sizes: dict[str, Any] = {}
    shapes = {
        name: {axis: sizes.setdefault(label, torch.export.Dim(label)) for axis, label in axes.get(name, {}).items()}
        for name in source.inputs
    }
    try:
        program = torch.onnx.export(
            module,
            args=(),
            kwargs=dict(source.inputs),
            dynamo=True,
            opset_version=opset,
            input_names=list(source.inputs),
            output_names=list(source.output_names) or None,
            dynamic_shapes=shapes,
            verbose=False,
        )
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ExportError(f"torch could not export {type(module).__name__}: {type(error).__name__}: {first}") from error
    return program


def _compare(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], path: Path) -> Comparison:
    import torch

    with torch.inference_mode():
        result = module(**inputs)
    tensors = (
        list(result.values())
        if isinstance(result, Mapping)
        else list(result)
        if isinstance(result, (tuple, list))
        else [result]
    )
    session = cpu_session(path)
    feeds = {i.name: inputs[i.name].numpy() for i in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]
    got = dict(zip(names, session.run(names, feeds), strict=True))
    if len(tensors) != len(names):
        raise ExportError(f"{path.name} has {len(names)} outputs, the module returns {len(tensors)}")
    comparison = Comparison()
    compare_outputs(comparison, {n: t.numpy() for n, t in zip(names, tensors, strict=True)}, got)
    return comparison
