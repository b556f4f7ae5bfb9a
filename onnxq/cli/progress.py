"""Progress bars on the terminal's error stream, so that standard output stays clean."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)


class RichProgress:
    """`onnxq.progress.Progress` as one line per stage. A ``with`` block restores the terminal.

    Where the error stream is no terminal, each stage is one plain line instead.

    Args:
        console: writes to the error stream.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._task: TaskID | None = None
        self._total: int | None = None
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[detail]}[/]"),
            console=console,
            disable=not console.is_terminal,
        )

    def start(self, stage: str, total: int | None) -> None:
        """See `onnxq.progress.Progress.start`."""
        self._end_stage()
        self._total = total
        if self._console.is_terminal:
            self._task = self._bars.add_task(stage, total=total, detail="")
        else:
            self._console.print(stage if total is None else f"{stage} ({total})", highlight=False, markup=False)

    def advance(self, count: int = 1, detail: str = "") -> None:
        """See `onnxq.progress.Progress.advance`."""
        if self._task is not None:
            # Escaped: weight names may hold brackets, which rich would read as markup.
            self._bars.update(self._task, advance=count, detail=detail[-48:].replace("[", r"\["))

    def finish(self) -> None:
        """See `onnxq.progress.Progress.finish`."""
        self._end_stage()

    def _end_stage(self) -> None:
        if self._task is not None:
            done = self._bars.tasks[self._bars.task_ids.index(self._task)].completed
            self._bars.update(
                self._task,
                total=self._total or max(done, 1),
                completed=self._total or max(done, 1),
                detail="",
            )
            self._task = None

    def __enter__(self) -> RichProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._end_stage()
        self._bars.stop()
