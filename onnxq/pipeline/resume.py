"""Solved weights that an interrupted run leaves behind, so that the next one goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.formats.files import AnyEncoding, encoding_from_arrays, encoding_to_arrays

_KEY_FILE = "run.json"


class ResumeStore:
    """A folder beside the output with one file per solved weight.

    It belongs to one run: same source, recipe, seed, budget and calibration data. A folder of another run is emptied.

    Args:
        folder: where to keep the files; made when the first weight is saved.
        key: plain data that identifies the run.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder = folder
        self._key = json.dumps(key, sort_keys=True)
        self.found = 0
        if folder.is_dir():
            if self._stored_key() == self._key:
                self.found = len(list(folder.glob("*.npz")))
            else:
                self.discard()

    def _stored_key(self) -> str:
        try:
            return (self.folder / _KEY_FILE).read_text()
        except OSError:
            return ""

    def _file(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.npz"

    def load(self, name: str) -> AnyEncoding | None:
        """The encoding of a weight (or of one member of a stack), if an earlier run solved it."""
        file = self._file(name)
        if not self.found or not file.is_file():
            return None
        with np.load(file) as arrays:
            return encoding_from_arrays(arrays)

    def open(self) -> None:
        """Makes the folder, for what else a run keeps in its subfolders."""
        if not self.folder.is_dir():
            self.folder.mkdir()
            (self.folder / _KEY_FILE).write_text(self._key)

    def save(self, name: str, encoding: AnyEncoding) -> None:
        """Keeps a solved weight; complete or not at all."""
        self.open()
        arrays: dict[str, Any] = encoding_to_arrays(encoding)
        partial = self._file(name).with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, self._file(name))

    def discard(self) -> None:
        """Removes the folder: the run is finished, or can't be."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.found = 0


def file_identity(path: Path) -> dict[str, Any]:
    """What tells a file from its later versions without reading it."""
    status = path.stat()
    return {"path": str(path.resolve()), "bytes": status.st_size, "modified": status.st_mtime_ns}
