"""Turn packaged translations into pairs of lines, and split them into train, dev and heldout.

Pure functions from file contents to file contents. A pair's side depends on a hash of its source alone, so that it is
the same on every machine, and a source of text that changes with time moves few lines.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tools.packages import FetchError, Files
from tools.text import one_line

SPLIT_SEED = "onnxq-pairs-1"
"""Changing it makes new splits."""

DEV, HELDOUT = 500, 500
"""Pairs on these sides; all others are for training."""

HELDOUT_WORDS = range(8, 41)
"""Words of a source line in dev and heldout: whole sentences, and none so long that it outweighs the others."""

SHINGLE = 5
"""Words of the runs by which near copies are told."""

ENGLISH, PORTUGUESE = "4", "a"
"""World English Bible and Almeida in the table of verses."""

Pair = tuple[str, str]
"""Source line and target line."""


def shape_of(text: str) -> str:
    """What makes two source lines the same: letters, lower case; versions and counts do not."""
    return " ".join(re.findall(r"[^\W\d_]+", text.lower()))


def split_pairs(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    """The sides "train", "dev" and "heldout", each in a fixed random order.

    Pairs with equal sides and pairs whose source was there before are dropped. A training pair of which more than half
    the runs of five words stand in a dev or heldout source too is dropped as well: package descriptions repeat each
    other.
    """
    unique: dict[str, Pair] = {}
    for source, target in sorted({(one_line(source), one_line(target)) for source, target in pairs}):
        key = shape_of(source)
        if key and target and source != target:
            unique.setdefault(key, (source, target))
    ordered = sorted(unique.values(), key=lambda pair: _hash(pair[0]))
    eligible = [pair for pair in ordered if len(pair[0].split()) in HELDOUT_WORDS]
    heldout, dev = eligible[:HELDOUT], eligible[HELDOUT : HELDOUT + DEV]
    kept = {pair[0] for pair in (*heldout, *dev)}
    seen = {run for source in kept for run in _shingles(source)}
    train = [pair for pair in ordered if pair[0] not in kept and not _is_copy(pair[0], seen)]
    return {"train": train, "dev": dev, "heldout": heldout}


def _hash(source: str) -> bytes:
    return hashlib.sha256(f"{SPLIT_SEED}\x1f{source}".encode()).digest()


def _shingles(source: str) -> set[str]:
    words = shape_of(source).split()
    return {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}


def _is_copy(source: str, seen: set[str]) -> bool:
    runs = _shingles(source)
    return 2 * len(runs & seen) > len(runs)


def as_files(pairs: Iterable[Pair], source: str, target: str) -> dict[str, bytes]:
    """The three sides as `SIDE.LANGUAGE`, one line a pair.

    Args:
        source, target: Languages, for the names of files.

    Raises:
        FetchError: Too few pairs for dev and heldout.
    """
    sides = split_pairs(pairs)
    if len(sides["dev"]) < DEV or not sides["train"]:
        raise FetchError(
            f"only {sum(map(len, sides.values()))} pairs of {source} and {target}: the source of the text is not laid "
            "out as it was"
        )
    files = {}
    for side, chosen in sides.items():
        for column, language in enumerate((source, target)):
            files[f"{side}.{language}"] = "".join(f"{pair[column]}\n" for pair in chosen).encode()
    return files


def description_pairs(files: Files, target: str) -> Iterator[Pair]:
    """Paragraphs of package descriptions in English and `target` ("pt_BR"), from Debian's Translation indices.

    Descriptions are matched on package and hash of the English text; those that are not cut into equally many
    paragraphs in both languages are left out, and so are paragraphs that wait for their translation (`<trans>`).

    Args:
        files: Indices by name, which ends in `Translation-LANGUAGE`.

    Raises:
        FetchError: There is no index of one of the languages.
    """
    english, other = (_descriptions(files, language) for language in ("en", target))
    for key in sorted(english.keys() & other.keys()):
        if len(english[key]) == len(other[key]):
            for pair in zip(english[key], other[key], strict=True):
                if not any("<trans>" in text for text in pair):
                    yield pair


def _descriptions(files: Files, language: str) -> dict[tuple[str, str], list[str]]:
    # apt writes the underscore of pt_BR as %5f in file names.
    names = [name for name in files if name.replace("%5f", "_").endswith(f"Translation-{language}")]
    if not names:
        raise FetchError(f"no Translation-{language} among the indices ({', '.join(sorted(files)) or 'none came'})")
    found = {}
    for name in sorted(names):
        for stanza in files[name].decode("utf-8").split("\n\n"):
            fields = _fields(stanza)
            if text := fields.get(f"Description-{language}"):
                found[fields.get("Package", ""), fields.get("Description-md5", "")] = _paragraphs(text)
    return found


def _fields(stanza: str) -> dict[str, str]:
    """Fields of a stanza of an index (deb822(5)); lines after the first keep their leading blank."""
    fields: dict[str, str] = {}
    last = ""
    for line in stanza.splitlines():
        if line.startswith(" "):
            fields[last] = f"{fields.get(last, '')}\n{line}"
        else:
            last, _, value = line.partition(":")
            fields[last] = value.strip()
    return fields


def _paragraphs(description: str) -> list[str]:
    """The short description, then the paragraphs of the long one, which lines holding only `.` part."""
    short, _, long = description.partition("\n")
    return [short, *(one_line(part) for part in re.split(r"^ \.\s*$", long, flags=re.MULTILINE) if part.strip())]


def verse_pairs(database: bytes) -> Iterator[Pair]:
    """Verses of the World English Bible and of Almeida's, from a SQLite database with a table `bible`.

    Raises:
        FetchError: Not such a database.
    """
    with tempfile.TemporaryDirectory(prefix="onnxq-verses-") as temporary:
        path = Path(temporary) / "bible.db"
        path.write_bytes(database)
        connection = sqlite3.connect(path)
        try:
            rows = connection.execute(
                "SELECT english.vText, other.vText FROM bible AS english JOIN bible AS other "
                "USING (bNumber, cNumber, vNumber) WHERE english.bbName = ? AND other.bbName = ? "
                "ORDER BY bNumber, cNumber, vNumber",
                (ENGLISH, PORTUGUESE),
            ).fetchall()
        except sqlite3.Error as error:
            raise FetchError(f"the table of verses cannot be read ({error}): it is not laid out as it was") from error
        finally:
            connection.close()
    for english, other in rows:
        # The file writes apostrophes and inner quotation marks as grave accents.
        yield english.replace("`", "'"), other
