"""Turn packaged corpora into sentences and split them into calibration and held-out text.

Pure functions from file contents to file contents. The split is by document and by hash, so that it is the
same on every machine, does not depend on the order of files, and no sentence (nor its neighbours from the
same document) is on both sides.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tools.packages import FetchError, Files

SPLIT_SEED = "onnxq-1"
"""Changing it makes new splits; the pinned hashes of the derived files then change too."""

MIN_WORDS = 4
"""Shorter snippets ("Yay.", "@anonymous :-*") say little about an encoder and repeat often."""

REVIEW_SOURCES = {
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "editorial": "nytEditorialSnippets_GroundTruth.txt",
    "tweet": "tweets_GroundTruth.txt",
}


@dataclass(frozen=True)
class Sentence:
    """A sentence with where it comes from.

    Attributes:
        source: Corpus or genre ("movie", "news").
        document: Name of the document within the source; documents are never split.
        text: One line.
        rating: Mean human sentiment rating, -4 to 4; None where there is none.
    """

    source: str
    document: str
    text: str
    rating: float | None = None


def one_line(text: str) -> str:
    """Text with entities resolved and white space collapsed."""
    return re.sub(r"\s+", " ", html.unescape(text)).strip()


def key_of(text: str) -> str:
    """What makes two sentences the same: letters and digits, lower case."""
    return re.sub(r"[^0-9a-z]+", " ", text.lower()).strip()


def _hash(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\x1f".join((SPLIT_SEED, *parts)).encode()).digest()[:8], "big")


def split(sentences: Iterable[Sentence], min_words: int = MIN_WORDS) -> tuple[list[Sentence], list[Sentence]]:
    """Split into (calibration, held out), about half the documents each, both in a fixed random order.

    Equal sentences (letters and digits, ignoring case) are kept once. Any prefix of either list is a random
    sample of it.
    """
    unique: dict[str, Sentence] = {}
    for sentence in sentences:
        key = key_of(sentence.text)
        if len(key.split()) >= min_words:
            unique.setdefault(key, sentence)
    ordered = sorted(unique.values(), key=lambda s: _hash("order", s.source, s.text))
    in_calibration = [_is_calibration(s) for s in ordered]
    return (
        [s for s, inside in zip(ordered, in_calibration, strict=True) if inside],
        [s for s, inside in zip(ordered, in_calibration, strict=True) if not inside],
    )


def _is_calibration(sentence: Sentence) -> bool:
    return _hash("side", sentence.source, sentence.document) % 2 == 0


def as_files(sentences: Iterable[Sentence]) -> dict[str, bytes]:
    """Both sides as files.

    `.txt` holds one sentence a line, `.tsv` source, document, rating and text of the same lines.
    """
    files = {}
    for name, side in zip(("calibration", "heldout"), split(sentences), strict=True):
        rows = (f"{s.source}\t{s.document}\t{'' if s.rating is None else f'{s.rating:.6g}'}\t{s.text}" for s in side)
        files[f"{name}.txt"] = _lines(s.text for s in side)
        files[f"{name}.tsv"] = _lines(rows)
    return files


def as_documents(sentences: Iterable[Sentence]) -> dict[str, bytes]:
    """Both sides as running text: a document a line, its sentences as they come, documents in a fixed random order.

    For language models, which see one sentence after the other. Sides are those of `split`.
    """
    documents: dict[tuple[str, str], list[Sentence]] = {}
    for sentence in sentences:
        documents.setdefault((sentence.source, sentence.document), []).append(sentence)
    ordered = sorted(documents.items(), key=lambda item: _hash("document", *item[0]))
    sides: dict[bool, list[str]] = {True: [], False: []}
    for _, parts in ordered:
        sides[_is_calibration(parts[0])].append(" ".join(part.text for part in parts))
    return {"calibration.txt": _lines(sides[True]), "heldout.txt": _lines(sides[False])}


def _lines(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def review_sentences(files: Files) -> Iterator[Sentence]:
    """The rated snippets of Hutto and Gilbert (ICWSM 2014).

    Lines are `number<TAB>mean rating<TAB>text`. Numbers like `146_12` are sentence 12 of document 146; plain
    numbers stand for themselves.

    Raises:
        FetchError: A file is missing or a line has another form.
    """
    for source, name in REVIEW_SOURCES.items():
        if name not in files:
            raise FetchError(f"{name} is missing among the review snippets")
        for number, line in enumerate(files[name].decode().splitlines(), 1):
            fields = line.split("\t", 2)
            if len(fields) != 3:
                raise FetchError(f"{name}, line {number}: expected number, rating and text, got {line[:60]!r}")
            yield Sentence(source, fields[0].split("_")[0], one_line(fields[2]), float(fields[1]))


def brown_sentences(files: Files) -> Iterator[Sentence]:
    """Sentences of the Brown corpus: lines of `word/tag`, put back into running text. A document is one of
    the 500 files.

    Raises:
        FetchError: The table of genres is missing.
    """
    if "cats.txt" not in files:
        raise FetchError("cats.txt is missing in the Brown corpus")
    genres = dict(line.split() for line in files["cats.txt"].decode().splitlines() if line.strip())
    for document, genre in sorted(genres.items()):
        for line in files[document].decode("latin-1").splitlines():
            words = [token.rpartition("/")[0] for token in line.split()]
            if words:
                yield Sentence(genre, document, running_text(words))


def running_text(words: Iterable[str]) -> str:
    """Join tokens as they would be printed.

    No blank before punctuation, proper quotation marks, and Brown's doubled `?`, `!` and `;` once.
    """
    text = " ".join(words).replace("``", "\u201c").replace("''", "\u201d")
    text = re.sub(r"([?!;])(?: \1)+", r"\1", text)
    text = re.sub(r" ([,.;:?!)\]}\u201d])", r"\1", text)
    return one_line(re.sub(r"([(\[{\u201c]) ", r"\1", text))
