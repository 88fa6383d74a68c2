"""Guesses from what was said before: in the same text, and in earlier answers.

The newest tokens are looked for in the text so far (prompt lookup: Saxena 2023) and, if wanted, in past answers of this
process (SuffixDecoding: Oliaro et al. 2024, arXiv 2411.04975). The place that agrees with most of them counts; where
several agree with as many, what followed most often. Tokens lie in plain arrays that are compared whole: 65,536 of them
take some 15 microseconds and four bytes each, less than an index would take to keep. A filter of eight to sixteen bytes
a token says beforehand whether the two newest ever stood beside each other.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from snello.engine.governor import MOST, Governor, Source
from snello.engine.speculate import Ask

DEPTH = 16  # newest tokens that are compared
SHORTEST = 2  # of them must agree
MOST_PLACES = 32  # that are looked at, the latest ones
MOST_VOTES = 8  # of those that agree with most
NOTHING = -1  # stands between answers, and where no token is yet
CAPACITY = 65536  # tokens of past answers, of all salts together
PAIR_BYTES, FEWEST_PAIRS = 8, 4096  # of the filter: for each token, and at first
Number = TypeVar("Number", int, npt.NDArray[np.int64])
BACK = np.arange(DEPTH)
AHEAD = np.arange(1, MOST + 1)
# By the bits of a length: 2 and 3 tokens that agree, 4 to 7, 8 to 15, 16. Longer ones are right more often.
SOURCES = {bits: Source(f"{2 ** (bits - 1)} tokens agree", 1 - 0.5 ** (bits - 1)) for bits in range(2, 6)}


class Lookup:
    """A drafter that has no model.

    Args:
        past: also look in answers that have ended. Those of another salt are never looked at.
        capacity: tokens of past answers that are kept; the salt that was used longest ago goes first, then the oldest.
    """

    num_matchers = 0

    def __init__(self, *, past: bool, capacity: int = CAPACITY) -> None:
        assert capacity >= 2 * DEPTH
        self.name = "suffix" if past else "prompt-lookup"
        self._looks_back, self._capacity = past, capacity
        self._texts: dict[int, Text] = {}
        self._past: OrderedDict[str, Text] = OrderedDict()  # by salt, used longest ago first

    @property
    def memory_bytes(self) -> int:
        return sum(text.memory_bytes for text in (*self._texts.values(), *self._past.values()))

    def draft(self, asks: Sequence[Ask], governor: Governor) -> Mapping[int, Sequence[int]]:
        """For each sequence what followed the best match; none where nothing agrees or nothing pays."""
        guesses: dict[int, Sequence[int]] = {}
        for ask in asks:
            match = self._best(ask) if ask.most > 0 else None
            if match is None:
                continue
            text, length, places = match
            most = min(ask.most, MOST)
            count = governor.worth(ask.id, SOURCES[length.bit_length()], most)
            if count:
                guesses[ask.id] = text.following(places, count)
        return guesses

    def _best(self, ask: Ask) -> tuple[Text, int, np.ndarray] | None:
        """Where, how many tokens agree, and the places of the last of them."""
        own = self._texts.setdefault(ask.id, Text())
        own.catch_up(ask.tokens)
        past = self._past.get(ask.salt)
        pair = own.newest_pair()
        texts = [text for text in (own, past) if text is not None and text.may_have(pair)]
        if not texts:
            return None
        newest = own.newest()
        best = max(((text, *text.places(newest)) for text in texts), key=lambda each: each[1])  # of equals: its own
        return best if best[1] >= SHORTEST else None

    def finished(self, id: int, tokens: Sequence[int], num_prompt: int, salt: str) -> None:
        """Remembers an answer, with the end of its prompt before it."""
        if not self._looks_back:
            return
        said = array("i", tokens[max(0, num_prompt - DEPTH) :])[-self._capacity // 2 :]
        text = self._past.setdefault(salt, Text())
        self._past.move_to_end(salt)
        text.append(array("i", [NOTHING]))
        text.append(said)
        while self._num_past > self._capacity and len(self._past) > 1:
            self._past.popitem(last=False)
        if self._num_past > self._capacity:
            text.drop_oldest(self._capacity // 2)

    @property
    def _num_past(self) -> int:
        return sum(len(text) for text in self._past.values())

    def forget(self, id: int) -> None:
        self._texts.pop(id, None)

    def close(self) -> None:
        self._texts.clear()
        self._past.clear()


class Text:
    """Tokens that grow, and where in them others occur.

    NOTHING lies on both sides, so that looking back `DEPTH` tokens or ahead `MOST` stays inside. The filter of pairs
    is that of Bloom (1970) with one hash: it may say yes for no, never no for yes.
    """

    def __init__(self) -> None:
        self._ids = np.full(DEPTH + 256, NOTHING, np.int32)
        self._end = DEPTH
        self._pairs = bytearray(FEWEST_PAIRS)
        self._paired = DEPTH + 1  # pairs that end before it are in the filter

    def __len__(self) -> int:
        return self._end - DEPTH

    @property
    def memory_bytes(self) -> int:
        return self._ids.nbytes + len(self._pairs)

    def catch_up(self, tokens: array[int]) -> None:
        """What was known is the beginning of `tokens`."""
        if len(tokens) > len(self):
            self.append(tokens[len(self) :])

    def append(self, tokens: array[int]) -> None:
        end = self._end + len(tokens)
        if end + MOST > len(self._ids):
            larger = np.full(2 * end + MOST, NOTHING, np.int32)
            larger[: self._end] = self._ids[: self._end]
            self._ids = larger
        self._ids[self._end : end] = tokens
        self._end = end

    def drop_oldest(self, keep: int) -> None:
        """Only the newest `keep` tokens stay."""
        kept = self._ids[self._end - keep : self._end].copy()
        self._ids[DEPTH:] = NOTHING
        self._ids[DEPTH : DEPTH + keep] = kept
        self._end = DEPTH + keep
        self._pairs, self._paired = bytearray(len(self._pairs)), DEPTH + 1

    def newest_pair(self) -> tuple[int, int]:
        """The last token but one, and the last; NOTHING where there is none."""
        first, second = self._ids[self._end - 2 : self._end].tolist()
        return first, second

    def may_have(self, pair: tuple[int, int]) -> bool:
        """False if these two never stood beside each other with something behind them."""
        if self._paired < self._end - 1:
            self._pair_up()
        return bool(self._pairs[_hashed(*pair) % len(self._pairs)])

    def _pair_up(self) -> None:
        """Those that ended since, but for the newest."""
        if len(self) * PAIR_BYTES > len(self._pairs):
            self._pairs, self._paired = bytearray(2 * len(self) * PAIR_BYTES), DEPTH + 1
        if self._paired == self._end - 2:  # one more token, as most of the time
            self._pairs[_hashed(*self._ids[self._paired - 1 : self._end - 1].tolist()) % len(self._pairs)] = 1
        else:
            ids = self._ids[self._paired - 1 : self._end - 1].astype(np.int64)
            np.frombuffer(self._pairs, np.uint8)[_hashed(ids[:-1], ids[1:]) % len(self._pairs)] = 1
        self._paired = self._end - 1

    def newest(self) -> np.ndarray:
        """The last `DEPTH` tokens, the newest first."""
        return self._ids[self._end - DEPTH : self._end][::-1]

    def places(self, newest: np.ndarray) -> tuple[int, np.ndarray]:
        """(how many of the newest tokens agree at most, the places where the newest lies then)."""
        ids = self._ids[: self._end - 1]  # a place must be followed by something
        places = np.flatnonzero(ids == newest[0])
        places = places[ids[places - 1] == newest[1]][-MOST_PLACES:]
        if not len(places) or newest[1] == NOTHING:
            return 0, places
        agrees = ids[places[:, None] - BACK] == newest
        agrees &= newest != NOTHING
        lengths = np.logical_and.accumulate(agrees, axis=1).sum(axis=1)
        longest = int(lengths.max())
        return longest, places[lengths == longest]

    def following(self, places: np.ndarray, count: int) -> list[int]:
        """What followed most often, token after token; where equally often, the latest."""
        ahead = self._ids[places[-MOST_VOTES:, None] + AHEAD[:count]]
        if (ahead == ahead[-1]).all() and (ahead[-1] != NOTHING).all():
            return list(ahead[-1].tolist())
        return _voted(ahead[::-1].tolist())


def _hashed(first: Number, second: Number) -> Number:
    """Of a pair of tokens, or of arrays of them: not below 0."""
    return (first * 0x9E3779B1 + second * 0x85EBCA6B >> 7) & 0x7FFFFFFF


def _voted(paths: list[list[int]]) -> list[int]:
    """Token after token what most paths have that have agreed so far; of equals, what the first has."""
    said: list[int] = []
    for place in range(len(paths[0])):
        votes = Counter(path[place] for path in paths)
        del votes[NOTHING]
        if not votes:
            break
        said.append(votes.most_common(1)[0][0])
        paths = [path for path in paths if path[place] == said[-1]]
    return said
