"""Translate with the two graphs of a folder made by `tools/marian.py`, float or quantised, and score the translations.

    python -m tools.translate FOLDER --source heldout.en --reference heldout.pt --beam 4 --threads 1

Greedy or beam search over onnxruntime sessions. Needs the extra `eval` of onnxq.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):  # run as a script: the folder above holds `onnxq` and `tools`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import onnxq
from onnxq.calibration.trace import Recorder, Trace
from onnxq.errors import OnnxqError
from tools.marian import DECODER, ENCODER

LENGTH_FACTOR = 2.5
"""Longest translation, in tokens of its source."""

LENGTH_PENALTY = 1.0
"""Finished hypotheses are compared by log probability over length to this power (Marian's `normalize`)."""

BEAM = 4


@dataclass(frozen=True)
class Scores:
    """Quality of translations against one reference each.

    Attributes:
        bleu, chrf: 0 to 100, of the whole text.
        bleu_signature, chrf_signature: sacrebleu's, which says how they were computed.
    """

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str


@dataclass
class Beams:
    """Unfinished hypotheses, those of one sentence next to each other.

    Attributes:
        owner: int64 [rows], sentence of each.
        tokens: int64 [rows, n], its tokens so far.
        scores: float64 [rows], sum of log probabilities.
        states: of the decoder, float32 [rows, hidden] each.
    """

    owner: np.ndarray
    tokens: np.ndarray
    scores: np.ndarray
    states: list[np.ndarray]


class Translator:
    """Two sessions and a vocabulary.

    Args:
        folder: Of `tools.marian.prepare`, or a quantised copy of it with its other files.
        library: Register the kernel library; float and stock models do without.
        threads: Inside one operator; None leaves the choice to ONNX Runtime.

    Raises:
        OnnxqError: A file is missing, a graph or the library cannot be loaded, or the package sentencepiece is missing.
    """

    def __init__(self, folder: str | Path, *, library: bool = True, threads: int | None = None) -> None:
        folder = Path(folder)
        for name in ("config.json", "vocab.spm"):
            if not (folder / name).is_file():
                raise OnnxqError(f"{folder} holds no {name}: copy it from the folder that tools/marian.py made")
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise OnnxqError("translation needs sentencepiece: run `pip install onnxq[eval]`") from error
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.hidden, self.layers = int(config["hidden"]), int(config["decoder_layers"])
        self.start, self.end, self.unknown = (
            int(config[f"{name}_token_id"]) for name in ("decoder_start", "eos", "unk")
        )
        self.vocabulary: Any = SentencePieceProcessor(model_file=str(folder / "vocab.spm"))
        self._encoder: Any = onnxq.session(folder / ENCODER, library=library, threads=threads)
        self._decoder: Any = onnxq.session(folder / DECODER, library=library, threads=threads)

    def translate(self, sentences: Sequence[str], beam: int = 1, batch: int = 8) -> list[str]:
        """Translations, in the order of `sentences`.

        Args:
            beam: Hypotheses kept; 1 is greedy search.
            batch: Sentences at a time; those of like length go together.
        """
        return [self.vocabulary.decode(tokens) for tokens in self.search(self.encode(sentences), beam, batch)]

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Token ids, the end token last."""
        return [[*ids, self.end] for ids in self.vocabulary.encode(list(sentences))]

    def search(self, sources: Sequence[Sequence[int]], beam: int = 1, batch: int = 8) -> list[list[int]]:
        """Token ids of translations, without the end token; see `translate`."""
        order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            found |= zip(part, self._search([sources[i] for i in part], beam), strict=True)
        return [found[i] for i in range(len(sources))]

    def record(self, sentences: Sequence[str], folder: str | Path) -> Trace:
        """Translate greedily, one sentence at a time, and keep all that both graphs were fed.

        Args:
            folder: A new one.

        Returns:
            The trace, which is calibration data for both graphs.
        """
        encoder, decoder = self._encoder, self._decoder
        try:
            with Recorder(folder) as recorder:
                self._encoder = recorder.wrap(encoder, ENCODER)
                self._decoder = recorder.wrap(decoder, DECODER)
                for source in self.encode(sentences):
                    recorder.next_sequence()
                    self._search([source], beam=1)
        finally:
            self._encoder, self._decoder = encoder, decoder
        return Trace(folder)

    def _search(self, sources: Sequence[Sequence[int]], beam: int) -> list[list[int]]:
        """Beam search as Marian does it: a hypothesis that ends leaves, and its beam is narrower from then on.

        A sentence is done when its beam is empty or its hypotheses are as long as is allowed.
        """
        ids, mask = _padded(sources)
        names = [output.name for output in self._encoder.get_outputs()]
        encoded = self._encoder.run(None, {"input_ids": ids, "attention_mask": mask})
        whole = {name: value for name, value in zip(names, encoded, strict=True) if name.startswith("cross_")}
        whole["encoder_attention_mask"] = mask
        limits = [math.ceil(LENGTH_FACTOR * len(source)) for source in sources]
        finished: list[list[tuple[float, list[int]]]] = [[] for _ in sources]
        count = len(sources)
        beams = Beams(
            owner=np.arange(count),
            tokens=np.zeros((count, 0), np.int64),
            scores=np.zeros(count),
            states=[np.zeros((count, self.hidden), np.float32) for _ in range(self.layers)],
        )
        last, read = np.full((count, 1), self.start), whole
        while len(beams.owner):
            position = beams.tokens.shape[1]
            feed = {"input_ids": last, "position": np.array([position]), **read}
            feed |= {f"state_{i}": state for i, state in enumerate(beams.states)}
            logits, *states = self._decoder.run(None, feed)
            logits = logits[:, 0]
            logits[:, self.unknown] = -np.inf
            kept: list[tuple[int, int, float]] = []
            for row, token, score in _best(logits, beams, [beam - len(done) for done in finished], beam == 1):
                sentence = beams.owner[row]
                hypothesis = [*beams.tokens[row].tolist(), token]
                if token == self.end or position + 1 == limits[sentence]:
                    finished[sentence].append((score / len(hypothesis) ** LENGTH_PENALTY, hypothesis))
                else:
                    kept.append((row, token, score))
            rows = np.array([row for row, _, _ in kept], np.int64)
            last = np.array([token for _, token, _ in kept], np.int64)[:, None]
            owner = beams.owner[rows]
            if not np.array_equal(owner, beams.owner):
                read = {name: value[owner] for name, value in whole.items()}
            beams = Beams(
                owner,
                np.concatenate([beams.tokens[rows], last], 1),
                np.array([score for _, _, score in kept]),
                [state[rows] for state in states],
            )
        return [[token for token in max(done)[1] if token != self.end] for done in finished]


def _best(logits: np.ndarray, beams: Beams, widths: Sequence[int], greedy: bool) -> list[tuple[int, int, float]]:
    """The best continuations (row, token, score) of each sentence, as many as its beam is wide; best first.

    Args:
        greedy: Take each row's largest logit, and leave scores at 0.
    """
    if greedy:
        return [(row, int(token), 0.0) for row, token in enumerate(logits.argmax(1))]
    best = []
    vocabulary = logits.shape[1]
    for sentence in np.unique(beams.owner):
        rows = np.flatnonzero(beams.owner == sentence)
        width = widths[sentence]
        scores = (beams.scores[rows, None] + _log_softmax(logits[rows])).reshape(-1)
        top = np.argpartition(-scores, width - 1)[:width]
        top = top[np.argsort(-scores[top], kind="stable")]
        best += [(int(rows[i // vocabulary]), int(i % vocabulary), float(scores[i])) for i in top]
    return best


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of rows, float64."""
    shifted = logits - logits.max(1, keepdims=True)
    logs: np.ndarray = shifted.astype(np.float64) - np.log(np.exp(shifted).sum(1, keepdims=True, dtype=np.float64))
    return logs


def _padded(sources: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask int64 [batch, source]; padding has id 0 and mask 0."""
    ids = np.zeros((len(sources), max(map(len, sources))), np.int64)
    mask = np.zeros_like(ids)
    for row, source in enumerate(sources):
        ids[row, : len(source)], mask[row, : len(source)] = source, 1
    return ids, mask


def score(hypotheses: Sequence[str], references: Sequence[str]) -> Scores:
    """BLEU and chrF of translations, by sacrebleu with its defaults.

    Raises:
        OnnxqError: sacrebleu is missing.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise OnnxqError("BLEU and chrF need sacrebleu: run `pip install onnxq[eval]`") from error
    bleu, chrf = BLEU(), CHRF()
    return Scores(
        float(bleu.corpus_score(list(hypotheses), [list(references)]).score),
        float(chrf.corpus_score(list(hypotheses), [list(references)]).score),
        str(bleu.get_signature()),
        str(chrf.get_signature()),
    )


def read_pairs(folder: Path, side: str, limit: int | None = None) -> list[tuple[str, str]]:
    """Pairs (English, Portuguese) of a side ("train", "dev", "heldout") of a fetched parallel text."""
    columns = [(folder / f"{side}.{language}").read_text(encoding="utf-8").splitlines() for language in ("en", "pt")]
    return list(zip(*columns, strict=True))[:limit]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path, required=True, help="sentences, one a line")
    parser.add_argument("--reference", type=Path, help="their translations; without it the translations are printed")
    parser.add_argument("--beam", type=int, default=1, help=f"1 is greedy; Marian's usual is {BEAM}")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, help="only the first so many lines")
    parser.add_argument("--stock", action="store_true", help="do without the kernel library")
    options = parser.parse_args(arguments)
    try:
        sources = options.source.read_text(encoding="utf-8").splitlines()[: options.limit]
        translator = Translator(options.folder, library=not options.stock, threads=options.threads)
        started = time.monotonic()
        translations = translator.translate(sources, options.beam, options.batch)
        seconds = time.monotonic() - started
        if options.reference is None:
            print("\n".join(translations))
            return 0
        references = options.reference.read_text(encoding="utf-8").splitlines()[: options.limit]
        found = score(translations, references)
    except OnnxqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"BLEU {found.bleu:.2f}  ({found.bleu_signature})")
    print(f"chrF {found.chrf:.2f}  ({found.chrf_signature})")
    print(f"{len(sources)} sentences in {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
