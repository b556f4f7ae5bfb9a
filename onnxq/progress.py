"""How long work tells whoever waits for it where it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Follows one run, stage after stage. Calls come from one thread."""

    def start(self, stage: str, total: int | None) -> None:
        """A stage begins, and the one before it ends.

        Args:
            stage: a phrase for the reader, such as "calibrating".
            total: how many `advance` counts it takes; None when that is not known.
        """
        ...

    def advance(self, count: int = 1, detail: str = "") -> None:
        """Work of the stage is done; `detail` names what comes next or was just done."""
        ...

    def finish(self) -> None:
        """The last stage ends. Safe to call without one."""
        ...


class NullProgress:
    """Tells nobody."""

    def start(self, stage: str, total: int | None) -> None:
        """See `Progress.start`."""

    def advance(self, count: int = 1, detail: str = "") -> None:
        """See `Progress.advance`."""

    def finish(self) -> None:
        """See `Progress.finish`."""
