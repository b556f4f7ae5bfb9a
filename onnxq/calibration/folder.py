"""Calibration data of a folder of graphs that work together, each with inputs of its own.

Forms: a recorded trace (`onnxq.calibration.trace`); a text file, which the folder's own model then translates, sentence
by sentence, through optimum (`onnxq.calibration.generation`); a mapping from file names to data of any form that a
single graph takes; a folder of ``<graph>.npz``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxq.calibration.data import CalibrationData, FeedsSource
from onnxq.calibration.inputs import ModelInput
from onnxq.calibration.trace import Trace
from onnxq.errors import CalibrationError

Open = Callable[[Any, Sequence[ModelInput]], CalibrationData]
"""Opens data of a single graph."""


class FolderData:
    """What each graph of a folder is calibrated with.

    Args:
        source: see the module; None is no data.
        graphs: file names of the graphs.
        open_one: opens the data of a single graph.

    Raises:
        CalibrationError: data for graphs that are not there, or for one of several graphs without saying which.
    """

    def __init__(self, source: Any, graphs: Sequence[str], open_one: Open) -> None:
        self._open = open_one
        self.trace = _trace(source)
        self._sources: Mapping[str, Any] = {}
        if source is None or self.trace is not None:
            names: Sequence[str] = () if self.trace is None else self.trace.graphs
        elif isinstance(source, Mapping):
            self._sources, names = source, list(source)
        elif len(graphs) == 1:
            self._sources, names = {graphs[0]: source}, ()
        else:
            self._sources = _by_name(source, graphs)
            names = list(self._sources)
        unknown = [name for name in names if name not in graphs]
        if unknown:
            raise CalibrationError(
                f"There is calibration data for {', '.join(unknown)}, and the graphs are {', '.join(graphs)}."
            )

    def of(self, graph: str, inputs: Sequence[ModelInput]) -> CalibrationData | None:
        """The data of a graph with these inputs; None where there is none."""
        trace = self.trace
        if trace is not None:
            if graph not in trace.graphs:
                return None
            name = f"the trace {trace.folder.name}"
            return CalibrationData(FeedsSource(lambda: trace.feeds(graph), name, None), inputs)
        return self._open(self._sources[graph], inputs) if graph in self._sources else None

    @property
    def any(self) -> bool:
        """Whether there is data for a graph."""
        return self.trace is not None or bool(self._sources)


def _trace(source: Any) -> Trace | None:
    if isinstance(source, Trace):
        return source
    return Trace(source) if isinstance(source, (str, Path)) and Trace.is_in(Path(source)) else None


def _by_name(source: Any, graphs: Sequence[str]) -> dict[str, Path]:
    names = ", ".join(graphs)
    if not isinstance(source, (str, Path)):
        raise CalibrationError(
            f"There are {len(graphs)} graphs ({names}) with inputs of their own, and calibration data fits one. Give a "
            "mapping from file names to data, a recorded trace, or for a translation model a text file."
        )
    folder = Path(source)
    found = {graph: folder / f"{Path(graph).stem}.npz" for graph in graphs}
    found = {graph: file for graph, file in found.items() if file.is_file()}
    if not found:
        raise CalibrationError(
            f"{folder} has no data for the graphs {names}: name files by them, such as {Path(graphs[0]).stem}.npz, "
            "give a recorded trace, or for a translation model a text file."
        )
    return found
