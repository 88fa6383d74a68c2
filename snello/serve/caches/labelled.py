"""From pairs of questions that people have labelled to a certificate.

The pairs are used as a cache is: the first questions are inserted, the second ones asked, and each gets its nearest.
That is right only where somebody has said that these very two ask the same; a nearest without a label counts as wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from snello.errors import SnelloError
from snello.serve.caches.certify import Certificate, certify
from snello.serve.caches.embed import Embedder
from snello.serve.caches.guard import Guard
from snello.serve.caches.identity import digest

BLOCK = 1024  # questions that are compared at once
HINT = 'give a JSON list of {"text_a": ..., "text_b": ..., "label": 0 or 1}'


class Pair(NamedTuple):
    """Two questions, and whether one answer does for both."""

    one: str
    other: str
    same: bool


def read_pairs(path: Path) -> list[Pair]:
    """Raises:
    SnelloError: the file is not a list of labelled pairs.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        pairs = [Pair(row["text_a"], row["text_b"], {0: False, 1: True}[row["label"]]) for row in rows]
    except OSError as error:
        raise SnelloError(f"{path} cannot be read: {error.strerror}", HINT) from None
    except (ValueError, KeyError, TypeError):
        raise SnelloError(f"{path} holds no labelled pairs of questions", HINT) from None
    if not pairs or not all(isinstance(text, str) for pair in pairs for text in pair[:2]):
        raise SnelloError(f"{path} holds no labelled pairs of questions", HINT)
    return pairs


def outcomes(pairs: Sequence[Pair], embedder: Embedder, guard: Guard) -> tuple[np.ndarray, np.ndarray]:
    """Of every question that is asked: its similarity to the nearest, -inf where the guard refused, and whether that
    one's answer is right for it; both (questions,)."""
    same = {frozenset(pair[:2]) for pair in pairs if pair.same}
    inserted = list(dict.fromkeys(pair.one for pair in pairs))
    asked = sorted({pair.other for pair in pairs} - set(inserted))
    near, right = np.full(len(asked), -np.inf), np.zeros(len(asked), bool)
    known = embedder.embed(inserted)
    for start in range(0, len(asked), BLOCK):
        products = embedder.embed(asked[start : start + BLOCK]) @ known.T  # (block, inserted)
        for row, best in enumerate(products.argmax(axis=1), start):
            question, nearest = asked[row], inserted[int(best)]
            right[row] = frozenset((question, nearest)) in same
            if guard.refuses(question, nearest) is None:
                near[row] = products[row - start, best]
    return near, right


def certify_pairs(
    pairs: Sequence[Pair], embedder: Embedder, guard: Guard, *, epsilon: float, confidence: float = 0.95
) -> Certificate | None:
    """The laxest threshold that these pairs prove; None: none is, and the cache of similar questions stays off.

    They must be independent of one another, and like the questions that will come: leave out what the embedder was
    trained on where you can.
    """
    near, right = outcomes(pairs, embedder, guard)
    return certify(
        near,
        right,
        epsilon=epsilon,
        confidence=confidence,
        embedder=embedder.digest,
        guard=guard.digest,
        labels=digest(pairs),
    )
