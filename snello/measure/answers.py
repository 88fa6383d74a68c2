"""Whole answers to prompts of real text, timed and kept: how a model with a draft is compared with itself alone.

Random tokens will not do here: how often a draft is right depends on the text. Call number k of two sides answers the
same prompts under the same settings, so a pair of calls differs in nothing but the guessing. Every second call is
greedy, the others draw at temperature 1. Nothing computed is carried over, so every prompt is read anew.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from snello.engine.engine import Engine, EngineOptions
from snello.engine.native import NativeExecutor
from snello.engine.request import SamplingParams
from snello.engine.speculate import Drafter
from snello.measure.text import Block
from snello.models.tokenizer import Tokenizer

Prompt = list[int]
SHORT = 32  # tokens of a prompt where many are answered at once


def prompts_of(blocks: Sequence[Block], length: int, count: int) -> list[Prompt]:
    """`count` beginnings of this length, spread over the text; the same one again only where the text is too short."""
    found: list[Prompt] = []
    fitting = [block.tokens for block in blocks if len(block.tokens) >= length] or [
        max((block.tokens for block in blocks), key=len)
    ]
    turn = 0
    while len(found) < count:
        for tokens in fitting:
            room = len(tokens) - length
            start = turn * length // 2 % (room + 1) if room > 0 else 0
            found.append(np.asarray(tokens[start : start + length]).tolist())
        turn += 1
    return found[:count]


@dataclass(eq=False)
class Answering:
    """One side: an engine over an executor, with or without somebody who guesses.

    `groups`: the prompts of each call, one after the other, begun again at the end. `said` is kept for comparison.
    """

    executor: NativeExecutor
    tokenizer: Tokenizer
    groups: Sequence[Sequence[Prompt]]
    max_tokens: int
    drafter: Drafter | None = None
    said: list[tuple[tuple[int, ...], ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        most = max(map(len, self.groups))
        self.engine = Engine(self.executor, self.tokenizer, EngineOptions(max_num_seqs=most), self.drafter)

    def seconds(self) -> float:
        """Of the next call: all its answers, together."""
        number = len(self.said)
        params = SamplingParams(temperature=float(number % 2), seed=number, max_tokens=self.max_tokens, ignore_eos=True)
        self.engine.clear_cache()
        begin = time.perf_counter()
        gathered = self.engine.gather(self.groups[number % len(self.groups)], params)
        spent = time.perf_counter() - begin
        answers = (tuple(c.token_id for c in chunks if c.token_id is not None) for chunks in gathered)
        self.said.append(tuple(answers))
        return spent


@dataclass(frozen=True)
class Sameness:
    """Of answers given twice: how many, how many tokens the first side said in them, and how many differ."""

    answers: int
    tokens: int
    different: int


def sameness(one: Answering, other: Answering) -> Sameness:
    pairs = [pair for both in zip(one.said, other.said, strict=True) for pair in zip(*both, strict=True)]
    return Sameness(len(pairs), sum(len(a) for a, _ in pairs), sum(a != b for a, b in pairs))
