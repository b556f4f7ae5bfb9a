"""What an interrupted measurement leaves behind."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_KEY = "key"


class Checkpoint:
    """A file of arrays, written whole or not at all.

    Args:
        path: where; its folder must exist by the time of the first save. None keeps nothing.
        key: plain data that identifies the measurement; a file of another one is not read.
        interval: seconds between saves.
    """

    def __init__(self, path: Path | None, key: Mapping[str, Any], interval: float = 30.0) -> None:
        self._path, self._interval = path, interval
        self._key = json.dumps(key, sort_keys=True)
        self._saved = time.monotonic()

    def load(self) -> dict[str, np.ndarray] | None:
        """What the last save held; None where there is none, or of another measurement."""
        if self._path is None or not self._path.is_file():
            return None
        with np.load(self._path, allow_pickle=False) as stored:
            if str(stored[_KEY]) != self._key:
                return None
            return {name: stored[name] for name in stored.files if name != _KEY}

    @property
    def due(self) -> bool:
        """Whether it is time for a save."""
        return self._path is not None and time.monotonic() - self._saved >= self._interval

    def save(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replaces what was saved before."""
        if self._path is None:
            return
        partial = self._path.with_suffix(".partial")
        named: dict[str, Any] = {**arrays, _KEY: np.array(self._key)}
        with partial.open("wb") as file:
            np.savez(file, **named)
        os.replace(partial, self._path)
        self._saved = time.monotonic()
