"""What two questions must have in common, word by word, before a similar one may answer for the other.

Embeddings hardly see a "not", a changed number or another name; words do. So beside numbers, negations, names and
opposites, the words that carry meaning are compared in their order: what is left after articles, auxiliaries and
courtesies. English; a question in another language simply finds fewer words to forgive. After the gates of GPTCache's
issue 694 (polarity flips) and of Hydra's content-token gate.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from snello.serve.caches.guard_words import FUNCTION_WORDS, NEGATIONS, NUMBERS, OF_THE_MOMENT, OPPOSITES, PREFIXES

WORD = re.compile(r"[^\W_]+(?:['.,:/-][^\W_]+)*[+#%]*|[$€£%+<>=≤≥*/^-]+(?=\s*\d)", re.UNICODE)
RIGHT_QUOTE = "\u2019"
CONTRACTIONS = [
    (re.compile(pattern, re.IGNORECASE), spelt)
    for pattern, spelt in (
        (r"\bcan(?:'?t|not)\b", "can not"),
        (r"\bwon't\b", "will not"),
        (r"n't\b", " not"),
        (r"'ll\b", " will"),
        (r"'d\b", " would"),
        (r"'(?:s|re|ve|m)\b", ""),
    )
]


@dataclass(frozen=True, kw_only=True)
class Guard:
    """How far the words of two questions may differ.

    Attributes:
        max_edits: words that carry meaning and may be replaced, added or left out. 0: none.
    """

    max_edits: int = 0

    def refuses(self, one: str, other: str) -> str | None:
        """Why neither may answer for the other, in a word; None where nothing stands against it."""
        a, b = words_of(one), words_of(other)
        if a.numbers != b.numbers:
            return "numbers"
        if a.negations != b.negations:
            return "negation"
        if not (a.names <= set(b.all) and b.names <= set(a.all)):
            return "names"
        if _turned(a, b):
            return "opposites"
        if _edits(a.content, b.content, self.max_edits) > self.max_edits:
            return "content"
        return None

    @property
    def digest(self) -> str:
        """Of the rules: a certificate holds for these alone."""
        return f"words-1-edits-{self.max_edits}"


@dataclass(frozen=True)
class Words:
    """A question as the guard sees it, in lower case; `content` in order."""

    all: tuple[str, ...]
    content: tuple[str, ...]
    numbers: tuple[str, ...]
    negations: int
    names: frozenset[str]


@lru_cache(maxsize=4096)
def words_of(text: str) -> Words:
    """The words of a question."""
    plain = unicodedata.normalize("NFKC", text).replace(RIGHT_QUOTE, "'")
    for pattern, spelt in CONTRACTIONS:
        plain = pattern.sub(spelt, plain)
    found = WORD.findall(plain)
    lower = [word.lower() for word in found]
    stems = tuple(_stem(NUMBERS.get(word, word)) for word in lower)
    names = {_stem(word.lower()) for place, word in enumerate(found) if _is_name(word, place)}
    numbers = tuple(NUMBERS.get(word, word) for word in lower if word in NUMBERS or _has_digit(word))
    content = tuple(stem for word, stem in zip(lower, stems, strict=True) if word not in FUNCTION_WORDS)
    return Words(stems, content, numbers, sum(word in NEGATIONS for word in lower), frozenset(names - FUNCTION_WORDS))


def of_the_moment(text: str) -> bool:
    """Whether a question asks for what changes with time: its answer is not kept for another."""
    return not OF_THE_MOMENT.isdisjoint(words_of(text).all)


def _is_name(word: str, place: int) -> bool:
    """A capital that does not stand for the beginning, or a code (`GPT4`, `NASA`, `C++`)."""
    if word[0].isdigit() or not word[0].isalpha():
        return False
    return (word[0].isupper() and place > 0) or sum(map(str.isupper, word)) > 1 or _has_digit(word) or word[-1] in "+#"


def _has_digit(word: str) -> bool:
    return any(map(str.isdecimal, word)) or any(mark in word for mark in "<>=≤≥$€£%^*")


def _stem(word: str) -> str:
    """Without the s of a plural."""
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def _turned(a: Words, b: Words) -> bool:
    """Whether a word of one has its opposite, or itself behind a prefix, in the other instead."""
    only_a, only_b = set(a.all) - set(b.all), set(b.all) - set(a.all)
    return any(
        frozenset((x, y)) in _STEMMED or any(x == prefix + y or y == prefix + x for prefix in PREFIXES)
        for x in only_a
        for y in only_b
    )


_STEMMED = frozenset(frozenset(map(_stem, pair)) for pair in OPPOSITES)


def _edits(a: Sequence[str], b: Sequence[str], most: int) -> int:
    """Levenshtein's distance between words, or more than `most`."""
    if abs(len(a) - len(b)) > most:
        return most + 1
    if most == 0:
        return int(a != b)
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]
