"""Quantising an exported model as users have it: a folder with graphs, tokenizer and configs."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from onnxq.errors import CalibrationError, ModelError, OutputExistsError
from onnxq.graph import load
from onnxq.pipeline.run import quantize
from onnxq.report.records import QuantizeReport


def quantize_folder(
    folder: str | Path, out_folder: str | Path, *, calibration: Any = None, force: bool = False, **options: Any
) -> dict[str, QuantizeReport]:
    """Quantises every graph of a folder; all other files are carried over.

    The output folder appears when everything is written, or not at all.

    Args:
        folder: holds one or more ``.onnx`` files.
        out_folder: a new folder; files keep their names.
        calibration: as in `quantize`; only for a folder with one graph, since graphs differ in their inputs.
        force: replace an existing output folder.
        options: the other options of `quantize`.

    Returns:
        The report of each graph, by file name.

    Raises:
        OnnxqError: see `quantize`.
    """
    source, target = Path(folder), Path(out_folder)
    graphs = sorted(source.glob("*.onnx"))
    if not graphs:
        raise ModelError(f"The folder {source} holds no .onnx file. Export a model into it: `onnxq export`.")
    if calibration is not None and len(graphs) > 1:
        names = ", ".join(graph.name for graph in graphs)
        raise CalibrationError(
            f"{source} holds {len(graphs)} graphs ({names}) with inputs of their own: calibration data fits one. "
            "Quantise them one by one, or without data."
        )
    if target.exists() and (target.resolve() == source.resolve() or not force):
        raise OutputExistsError(f"{target} exists already. Choose another output path, or replace it with --force.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        fresh = Path(temporary) / "new"
        fresh.mkdir()
        reports = {}
        weights: set[Path] = set()
        for graph in graphs:
            weights.update(load(graph).external_files)
            reports[graph.name] = quantize(graph, fresh / graph.name, calibration=calibration, **options)
        _carry(source, fresh, {*graphs, *weights})
        if target.exists():
            os.replace(target, Path(temporary) / "old")
        os.replace(fresh, target)
    return reports


def _carry(source: Path, target: Path, left_out: set[Path]) -> None:
    """Copies everything but the graphs and their external data."""
    done = {path.resolve() for path in left_out}
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.resolve() not in done:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
