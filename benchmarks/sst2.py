"""SST-2, cut anew so that no phrase of a sentence is trained on where another phrase of it judges.

SST-2's training rows are phrases of sentences, the sentences among them; any cut by row leaves most of what judges
inside of what was trained on. Here a *family* is a longest phrase with every phrase that stands in it word for word. A
twentieth of the families, chosen by a hash of the longest phrase, is `dev`, the rest `train`; a phrase that families of
both sides hold ("a film") belongs to neither, as do phrases that were given two labels, phrases of five and more words
that stand in a test sentence, and `dev` phrases that share eight words in a row with `train`. `test` is the file's own,
whole sentences that everybody reports; a benchmark reads it once, at its end. The cut has no seed: it never changes.

    from benchmarks.sst2 import read_sst2
    splits = read_sst2(Path("../shared/data/eval"))
    splits.train[0].text, splits.train[0].label
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from snello.errors import SnelloError

HELD_OUT = 13 / 256  # of the families
LONG = 5  # words: a shorter phrase stands in many sentences by chance
SHARED = 8  # words in a row that no dev phrase shares with train

Words = tuple[str, ...]


class Row(NamedTuple):
    """A phrase, and whether it is positive (1) or negative (0)."""

    text: str
    label: int


class Splits(NamedTuple):
    """Rows in the files' order. `dropped`: phrases that belong to neither side."""

    train: tuple[Row, ...]
    dev: tuple[Row, ...]
    test: tuple[Row, ...]
    dropped: int


def read_sst2(folder: Path) -> Splits:
    """The files' train and dev rows cut anew by family, and their test rows.

    Raises:
        SnelloError: the files are not there, or hold something else.
    """
    pool = [*_rows(folder / "sst2_train.tsv"), *_rows(folder / "sst2_dev.tsv")]
    return split(pool, _rows(folder / "sst2_test.tsv"))


def split(pool: Iterable[Row], test: Iterable[Row]) -> Splits:
    """`pool` cut by family; `test` as it is."""
    test, labels = tuple(test), dict[Words, set[int]]()
    for row in pool:
        labels.setdefault(words(row.text), set()).add(row.label)
    families, tested = _families(labels), {part for row in test for part in _parts(words(row.text))}
    train, dev = dict[Words, Row](), dict[Words, Row]()
    for phrase, given in labels.items():
        if len(given) > 1 or (len(phrase) >= LONG and phrase in tested):
            continue
        sides = {_is_held_out(longest) for longest in families[phrase]}
        if len(sides) == 1:
            (dev if sides.pop() else train)[phrase] = Row(" ".join(phrase), next(iter(given)))
    seen = {run for phrase in train for run in _runs(phrase)}
    kept = [row for phrase, row in dev.items() if seen.isdisjoint(_runs(phrase))]
    return Splits(tuple(train.values()), tuple(kept), test, len(labels) - len(train) - len(kept))


def words(text: str) -> Words:
    return tuple(text.split())


def _families(phrases: Iterable[Words]) -> dict[Words, list[Words]]:
    """For each phrase the longest phrases that hold it."""
    known, holders = set(phrases), dict[Words, list[Words]]()
    for phrase in sorted(known, key=lambda each: (-len(each), each)):
        if phrase in holders:  # stands in a longer one
            continue
        for part in set(_parts(phrase)) & known:
            holders.setdefault(part, []).append(phrase)
    return holders


def _is_held_out(longest: Words) -> bool:
    return hashlib.sha256(" ".join(longest).encode()).digest()[0] < HELD_OUT * 256


def _parts(phrase: Words) -> Iterator[Words]:
    """Every run of words in it, itself included."""
    for begin in range(len(phrase)):
        for end in range(begin + 1, len(phrase) + 1):
            yield phrase[begin:end]


def _runs(phrase: Words) -> Iterator[Words]:
    return (phrase[begin : begin + SHARED] for begin in range(len(phrase) - SHARED + 1))


def _rows(path: Path) -> list[Row]:
    hint = "give the folder that holds sst2_train.tsv, sst2_dev.tsv and sst2_test.tsv"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SnelloError(f"{path} cannot be read: {error.strerror}", hint) from error
    found = []
    for number, line in enumerate(lines[1:], 2):
        text, _, label = line.rpartition("\t")
        if label not in ("0", "1") or not text.strip():
            raise SnelloError(f"{path}: line {number} is not a sentence, a tab and 0 or 1", hint)
        found.append(Row(" ".join(text.split()), int(label)))
    return found
