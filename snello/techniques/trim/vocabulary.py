"""Which tokens stay, from the tokenizer's own table (tokenizer.json).

What stays is closed: with a BPE token stay all pieces that its merges go through. Then the trimmed merges make of a
word whose tokens stay exactly what they made before: every merge that was applied is still there, the ones that are
gone were not applied, so at each step the first in rank is the same. A word of which a token left stops earlier, at
pieces that stay; single bytes always do. WordPiece and Unigram choose among pieces, not by steps: single characters
staying is all they need.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from snello.errors import Unsupported

Pair = tuple[str, str]
SPACE = "\u2581"  # SentencePiece's
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
KINDS = ("BPE", "WordPiece", "Unigram")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's table, asked for what its tokens need."""

    table: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise Unsupported(f"trim: a {self.kind} tokenizer is not supported", f"supported: {', '.join(KINDS)}")
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if self.kind == "BPE" and self.model.get(key):
                raise Unsupported(f"trim: BPE with {key} is not supported", "byte-level and SentencePiece BPE are")

    @property
    def model(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.table["model"]
        return found

    @property
    def kind(self) -> str:
        return str(self.model.get("type"))

    @cached_property
    def ids(self) -> dict[str, int]:
        """Ids by token, without those that were added."""
        vocab = self.model["vocab"]
        return {piece: i for i, (piece, _) in enumerate(vocab)} if self.kind == "Unigram" else dict(vocab)

    @cached_property
    def tokens(self) -> dict[int, str]:
        return {number: token for token, number in self.ids.items()}

    @cached_property
    def ranks(self) -> dict[Pair, int]:
        """Merges by pair: the lower, the earlier."""
        return {pair: rank for rank, pair in enumerate(map(pair_of, self.model["merges"]))}

    @cached_property
    def added(self) -> set[int]:
        return {int(token["id"]) for token in self.table.get("added_tokens") or ()}

    def base(self) -> set[int]:
        """What any text can be written with."""
        single = {token for token in self.ids if len(self._plain(token)) == 1}
        unknown = self.model.get("unk_token")
        kept = {unknown} & self.ids.keys() if isinstance(unknown, str) else set[str]()
        if self.model.get("byte_fallback") and set(BYTES) <= self.ids.keys():
            single = {token for token in single if token.isascii() or token == SPACE} | set(BYTES)
        number = self.model.get("unk_id")
        return {self.ids[token] for token in single | kept} | ({number} if isinstance(number, int) else set())

    def needs(self, number: int) -> set[int]:
        """The token and the pieces that its merges go through."""
        token = self.tokens.get(number)
        if token is None or self.kind != "BPE" or number in self.added:
            return {number}
        return {number, *(self.ids[piece] for piece in self._steps(token) if piece in self.ids)}

    def _steps(self, token: str) -> Iterator[str]:
        """Every symbol on the way from single characters, by the merges in order of rank."""
        symbols = list(token)
        yield from symbols
        while len(symbols) > 1:
            pairs = [(self.ranks.get(pair, -1), i) for i, pair in enumerate(itertools.pairwise(symbols))]
            rank, place = min((pair for pair in pairs if pair[0] >= 0), default=(-1, -1))
            if rank < 0:
                return
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
            yield symbols[place]

    def _plain(self, token: str) -> str:
        prefix = self.model.get("continuing_subword_prefix") if self.kind == "WordPiece" else None
        return token.removeprefix(prefix) if prefix else token


def pair_of(merge: str | list[str]) -> Pair:
    """A merge is a text "left right", or a list of the two."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def choose(
    vocabulary: Vocabulary,
    counts: npt.NDArray[np.int64],
    count: int,
    min_count: int,
    needed: Collection[int],
    last: Collection[int],
) -> list[int]:
    """The `count` ids that stay, of as many as `counts` has: ascending, the `last` at the end.

    `counts` is how often the text holds each; `needed` are ids that configs name.

    Raises:
        Unsupported: what must stay is more than `count`.
    """
    kept = vocabulary.base() | vocabulary.added | set(needed) | set(last)
    for number in np.flatnonzero(counts >= min_count).tolist():
        kept |= vocabulary.needs(number)
    kept = {number for number in kept if number < len(counts)}
    if len(kept) > count:
        raise Unsupported(
            f"{count} tokens were to stay, but bytes, special tokens and the text's own are {len(kept)}",
            f"keep={len(kept)} holds them; min_count above {min_count} lets the rare ones go",
        )
    _fill(vocabulary, kept, _by_use(vocabulary, counts), count)
    return [*sorted(kept - set(last)), *sorted(last)]


def _by_use(vocabulary: Vocabulary, counts: npt.NDArray[np.int64]) -> list[int]:
    """Most frequent first, then in the order in which the tokenizer learned them; rows without a token last."""
    order = np.lexsort((np.arange(len(counts)), -counts)).tolist()
    known = [number for number in order if number in vocabulary.tokens]
    return known + [number for number in order if number not in vocabulary.tokens]


def _fill(vocabulary: Vocabulary, kept: set[int], order: Iterable[int], count: int) -> None:
    """Adds tokens with all they need while they fit; those that need nothing else always do."""
    waiting = [number for number in order if number not in kept]
    while len(kept) < count:
        before, left = len(kept), []
        for number in waiting:
            needed = vocabulary.needs(number) - kept
            if needed and len(kept) + len(needed) <= count:
                kept |= needed
            elif needed:
                left.append(number)
            if len(kept) == count:
                return
        waiting = left
        assert len(kept) > before, "a token whose parts are kept needs only itself"
