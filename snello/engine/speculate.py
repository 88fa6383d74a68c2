"""Guesses of what comes next: what a drafter is asked, and what it answers.

A guess is verified in the step that follows: its row draws what it would have drawn anyway, so a right guess saves a
step and a wrong one costs a row (speculative decoding: Leviathan et al. 2023, arXiv 2211.17192). The verifier draws the
model's own token, so greedy and sampled answers keep their bits whoever guesses: `lookup.py` from what was said before,
`draft_model.py` from a smaller model. How many guesses are worth their time is `governor.py`'s affair.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from snello.engine.governor import Governor
from snello.errors import SnelloError

LOOKUPS = ("prompt-lookup", "suffix")
OFF = "off"  # not even the draft that a folder brings with it


class Ask(NamedTuple):
    """A sequence that waits for its next token.

    Attributes:
        tokens: prompt and answer so far; not to be changed.
        salt: what one salt said is never shown to another, not even by being faster.
        most: guesses that can be used.
        remaining: tokens that the answer may still get.
        ends: tokens after which nothing follows.
        draw: (logits, guesses before them) -> what the answer's own settings and noise draw from these logits.
    """

    id: int
    tokens: array[int]
    salt: str
    most: int
    remaining: int
    ends: frozenset[int]
    draw: Callable[[np.ndarray, Sequence[int]], int]


class Drafter(Protocol):
    """Guesses for all that wait, at once. It asks the governor how many are worth it."""

    @property
    def name(self) -> str: ...
    @property
    def memory_bytes(self) -> int: ...  # that guessing holds now
    @property
    def num_matchers(self) -> int: ...  # of its own, for an answer with a grammar
    def draft(self, asks: Sequence[Ask], governor: Governor) -> Mapping[int, Sequence[int]]: ...
    def finished(self, id: int, tokens: Sequence[int], num_prompt: int, salt: str) -> None: ...  # said to its end
    def forget(self, id: int) -> None: ...  # ended, in whatever way; after `finished`
    def close(self) -> None: ...


def check_way(speculate: object) -> None:
    """Whether this names a lookup or can name a model.

    Raises:
        SnelloError: neither.
    """
    if not isinstance(speculate, str) or speculate in (*LOOKUPS, OFF, "demo"):
        return
    if "/" not in speculate and not Path(speculate).exists():
        hint = (
            f"choose {', '.join(LOOKUPS)} or {OFF}, or name a draft model: a folder, or a name such as Qwen/Qwen3-0.6B"
        )
        raise SnelloError(f"no way to guess is named {speculate!r}", hint)
