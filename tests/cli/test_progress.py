"""Progress on a terminal and in a log file."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from onnxq.cli.progress import RichProgress
from onnxq.progress import NullProgress, Progress


def drive(progress: Progress) -> None:
    progress.start("reading", None)
    progress.start("solving", 2)
    progress.advance(1, "layer.[0].weight")
    progress.advance()
    progress.finish()
    progress.finish()


def test_a_log_file_gets_a_line_per_stage() -> None:
    stream = StringIO()
    with RichProgress(Console(file=stream)) as progress:
        drive(progress)
    assert stream.getvalue().splitlines() == ["reading", "solving (2)"]


def test_a_terminal_gets_bars() -> None:
    stream = StringIO()
    with RichProgress(Console(file=stream, force_terminal=True, width=120)) as progress:
        drive(progress)
    assert "reading" in stream.getvalue()
    assert "2/2" in stream.getvalue()


def test_nobody_is_told_nothing() -> None:
    drive(NullProgress())
