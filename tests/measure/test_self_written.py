"""Text that a model writes itself: drawn from its own shares, the same however it is begun, and enough of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from snello.measure.self_written import answers_per_prompt, answers_wanted, draw, write

VOCABULARY, END = 12, 0


class Session:
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        self.tokens += tokens
        row = np.random.default_rng([*self.tokens[-3:]]).normal(0, 1, VOCABULARY).astype(np.float32)
        row[END] = -2.0
        return row

    def close(self) -> None:
        self.tokens = []


class Runner:
    """Its next word depends on the last three."""

    context = 64

    class spec:  # noqa: N801
        eos_tokens = (END,)

    def session(self) -> Session:
        return Session()

    def step(self, sessions: Sequence[Session], tokens: Sequence[int]) -> np.ndarray:
        return np.stack([session.feed([token]) for session, token in zip(sessions, tokens, strict=True)])


def said(**options: Any) -> list[tuple[int, ...]]:
    prompts = [[1, 2, number] for number in range(3, 9)]
    runner: Any = Runner()
    return [document.tokens for document in write(runner, prompts, seed=7, max_tokens=60, **options)]


def test_draws_follow_the_shares() -> None:
    logits = np.array([[0.0, 1.0, -np.inf, 2.0]] * 4_000, np.float32)
    drawn = draw(logits, [np.random.default_rng(number) for number in range(4_000)])
    shares = np.bincount(drawn, minlength=4) / 4_000
    expected = np.exp(logits[0]) / np.exp(logits[0]).sum()
    assert np.abs(shares - expected).max() < 0.025 and shares[2] == 0


def test_more_text_begins_with_the_same() -> None:
    """However many run at once."""
    first, whole = said(answers=12), said(answers=30, streams=5)
    assert whole[: len(first)] == first and len(whole) == 30 * 6 and len(set(whole)) > 150
    assert whole[len(first) :] == said(answers=30, begun=12)
    assert all(len(tokens) <= 3 + 60 for tokens in whole) and any(tokens[-1] == END for tokens in whole)


@pytest.mark.parametrize("parameters", [10_000_000, 1_000_000_000])
def test_as_much_as_proves_the_loss(parameters: int) -> None:
    first = answers_per_prompt(parameters)
    assert answers_wanted(parameters, 0.4) == answers_wanted(parameters, 1.0) == first
    assert first * 1.5 < answers_wanted(parameters, 1.5) <= first * 2
    most = answers_wanted(parameters, 1e9)
    assert most == answers_wanted(parameters, float("inf")) and first < most <= 4 * first
