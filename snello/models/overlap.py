"""Has this been seen? Blocks of text that share 13 tokens in a row with other text, found by hashes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np

NGRAM = 13


class HasTokens(Protocol):
    @property
    def tokens(self) -> np.ndarray: ...


T = TypeVar("T", bound=HasTokens)


def ngrams(tokens: np.ndarray) -> np.ndarray:
    """64-bit hashes of all 13 tokens in a row, (T - 12,)."""
    ids = np.asarray(tokens).astype(np.uint64)
    if len(ids) < NGRAM:
        return np.empty(0, np.uint64)
    length = len(ids) - NGRAM + 1
    hashes = np.zeros(length, np.uint64)
    for offset in range(NGRAM):
        hashes = (hashes ^ (ids[offset : offset + length] + np.uint64(1))) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return hashes


def seen_ngrams(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """Sorted hashes of all n-grams in these pieces."""
    return np.unique(np.concatenate([ngrams(piece) for piece in pieces] or [np.empty(0, np.uint64)]))


def without_overlap(blocks: Iterable[T], seen: np.ndarray) -> list[T]:
    """The blocks that hold nothing that was seen."""
    return [block for block in blocks if not np.isin(ngrams(block.tokens), seen).any()]
