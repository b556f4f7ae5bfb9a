"""Solved weights that an interrupted run leaves behind, so that the next one goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from onnxq.formats.files import AnyEncoding
from onnxq.pipeline.bank import EncodingBank

_KEY_FILE = "run.json"


class ResumeStore:
    """A folder beside the output with one file for each solved weight, by what the weight holds.

    It belongs to one run: same sources, recipe, seed, budget and calibration data. A folder of another run is emptied.
    All graphs of a folder have one store, so that a weight which they share is solved once.

    Args:
        folder: where to keep the files; made when the first weight is saved.
        key: plain data that identifies the run.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder = folder
        self._key = json.dumps(key, sort_keys=True)
        self._bank = EncodingBank(folder)
        self.found = 0
        if folder.is_dir():
            if self._stored_key() == self._key:
                self.found = len(self._bank)
            else:
                self.discard()

    def _stored_key(self) -> str:
        try:
            return (self.folder / _KEY_FILE).read_text()
        except OSError:
            return ""

    def load(self, content: str) -> AnyEncoding | None:
        """The encoding of a weight (or of one member of a stack) with this content, if it was solved already."""
        return self._bank.find(content)

    def open(self) -> None:
        """Makes the folder, for what else a run keeps in its subfolders."""
        if not self.folder.is_dir():
            self.folder.mkdir()
            (self.folder / _KEY_FILE).write_text(self._key)

    def save(self, content: str, encoding: AnyEncoding) -> None:
        """Keeps a solved weight; complete or not at all."""
        self.open()
        self._bank.keep(content, encoding)

    def discard(self) -> None:
        """Removes the folder: the run is finished, or can't be."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.found = 0


def file_identity(path: Path) -> dict[str, Any]:
    """What tells a file from its later versions without reading it."""
    status = path.stat()
    return {"path": str(path.resolve()), "bytes": status.st_size, "modified": status.st_mtime_ns}
