"""Encodings in a folder, filed by the values of the weights that they stand for.

Two uses. A run keeps what it solved, so that an interrupted one goes on (`onnxq.pipeline.resume`), and so that a weight
which several graphs of a folder hold is solved once. And a weight that was trained to what an encoding decodes to
(`onnxq.train`) takes it as it is, without a second rounding.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.errors import ModelError
from onnxq.formats.files import AnyEncoding, encoding_from_arrays, encoding_to_arrays


class EncodingBank:
    """One ``.npz`` for each encoding, named by a content (`onnxq.graph.shared.content_of`).

    Args:
        folder: where they are; made when the first is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def existing(cls, folder: str | Path) -> EncodingBank:
        """A bank to be read.

        Raises:
            ModelError: no folder, or no encoding in it.
        """
        bank = cls(Path(folder))
        if not len(bank):
            raise ModelError(f"{folder} holds no encodings. `onnxq.train.save_encodings` writes them.")
        return bank

    def find(self, content: str) -> AnyEncoding | None:
        """The encoding of a weight with this content."""
        file = self._file(content)
        if not file.is_file():
            return None
        with np.load(file) as arrays:
            return encoding_from_arrays(arrays)

    def find_all(self, contents: Sequence[str]) -> tuple[AnyEncoding, ...] | None:
        """Those of all members of a stack; None if one is missing."""
        found = [encoding for content in contents if (encoding := self.find(content)) is not None]
        return tuple(found) if len(found) == len(contents) else None

    def keep(self, content: str, encoding: AnyEncoding) -> None:
        """Files an encoding, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = encoding_to_arrays(encoding)
        partial = self._file(content).with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, self._file(content))

    def __len__(self) -> int:
        return len(list(self.folder.glob("*.npz")))

    def _file(self, content: str) -> Path:
        return self.folder / f"{content}.npz"
