"""`export`: the order of things, from a source to a finished folder."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from onnxq.errors import ExportError, OutputExistsError
from onnxq.export.result import ExportResult
from onnxq.export.source import ModuleSource

if TYPE_CHECKING:
    from onnxq.export.result import ExportedGraph

LOWEST_OPSET = 17
"""LayerNormalization came with opset 17: below it every layer norm is nine nodes."""

HIGHEST_OPSET = 25

TOLERANCE = 1e-3
"""Largest difference to torch, relative to the largest value of an output.

Sound float32 exports stay below 1e-5.
"""


def export(
    source: str | Path | ModuleSource,
    out_dir: str | Path,
    *,
    task: str | None = None,
    opset: int = 21,
    force: bool = False,
    verify: bool = True,
    tolerance: float = TOLERANCE,
    progress: Callable[[str], None] | None = None,
) -> ExportResult:
    """Export a model to ONNX, with its tokenizer and configs beside it, and compare it with torch.

    Weights are written as float32; tied weights are stored once; an encoder-decoder keeps its merged decoder
    and not the two it was merged from. `out_dir` appears
    when everything is finished and checked, or not at all.

    Args:
        source: A Hugging Face folder on disk (`config.json`, safetensors, tokenizer), or a torch module with
            example inputs.
        out_dir: A new folder.
        task: What the graphs shall compute, in optimum's words ("feature-extraction",
            "text-generation-with-past"). Where None, the model's own task, with past key values where it has
            any.
        opset: 17 to 25 (18 to 25 for a module).
        force: Replace `out_dir` where it exists.
        verify: Run both models on random inputs and compare.
        tolerance: Largest allowed difference, relative to the largest value of an output.
        progress: Called with a line at the start of each step.

    Raises:
        ExportError: The source cannot be exported, or the graphs do not compute what torch does.
        OutputExistsError: `out_dir` exists and is not empty.
    """
    if not LOWEST_OPSET <= opset <= HIGHEST_OPSET:
        raise ExportError(f"opset {opset} is outside {LOWEST_OPSET} to {HIGHEST_OPSET}: choose one of these, best 21")
    require_extra()
    started = time.perf_counter()
    target = Path(out_dir)
    origin = source if isinstance(source, ModuleSource) else Path(source)
    _refuse_taken(target, origin, force)
    tell = progress or (lambda _: None)

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        fresh = Path(temporary) / "new"
        fresh.mkdir()
        graphs: tuple[ExportedGraph, ...]
        carried: tuple[str, ...]
        if isinstance(origin, ModuleSource):
            from onnxq.export.module import export_module

            used_task, carried = "module", ()
            graphs = (export_module(origin, fresh, opset, tolerance if verify else None, tell),)
        else:
            from onnxq.export.huggingface import export_folder

            used_task, graphs, carried = export_folder(origin, fresh, task, opset, tolerance if verify else None, tell)
        _put_in_place(fresh, target, Path(temporary) / "old")
    return ExportResult(
        target, used_task, tuple(_moved(g, target) for g in graphs), carried, time.perf_counter() - started
    )


def require_extra() -> None:
    """Refuse with a cure where the packages of the extra `export` are missing."""
    missing = [name for name in ("torch", "transformers", "optimum") if importlib.util.find_spec(name) is None]
    if not missing and importlib.util.find_spec("optimum.exporters.onnx") is None:
        missing = ["optimum-onnx"]
    if missing:
        raise ExportError(f"export needs {', '.join(missing)}, not installed here: run `pip install onnxq[export]`")


def _refuse_taken(target: Path, origin: Path | ModuleSource, force: bool) -> None:
    if isinstance(origin, Path):
        inner, outer = origin.resolve(), target.resolve()
        if inner == outer or outer in inner.parents:
            raise ExportError(f"{target} is or holds the source {origin}: choose another output folder")
    if target.is_dir():
        if any(target.iterdir()) and not force:
            raise OutputExistsError(f"{target} exists and is not empty: choose another folder or force its replacement")
    elif target.exists():
        raise OutputExistsError(f"{target} is a file: choose another name for the output folder")


def _put_in_place(fresh: Path, target: Path, old: Path) -> None:
    """Make `fresh` the folder `target`; what was there is moved aside first and put back if that fails."""
    if not target.exists():
        fresh.rename(target)
        return
    target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _moved(graph: ExportedGraph, folder: Path) -> ExportedGraph:
    from dataclasses import replace

    return replace(graph, path=folder / graph.path.name)
