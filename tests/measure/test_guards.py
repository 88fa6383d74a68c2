"""Divergence is never negative, loops are found, ends are counted, strictness speaks in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from snello.measure import guards
from snello.measure.guards import Divergence, Habits, Strictness
from snello.measure.rulers import Reading
from snello.measure.text import Block


def test_kl_is_zero_for_the_same_and_positive_else() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (50, 200))
    assert not guards.kl(logits, logits + 7.0).max() > 1e-12
    other = logits + np.random.default_rng(1).normal(0, 0.1, logits.shape)
    assert (guards.kl(logits, other) > 0).all()


def test_kl_agrees_with_the_definition() -> None:
    a, b = np.log(np.array([[0.5, 0.25, 0.25]])), np.log(np.array([[0.25, 0.5, 0.25]]))
    assert guards.kl(a, b)[0] == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))


def test_padding_that_only_one_has_is_no_divergence() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (99, 50))
    block = Block(source="a", document="a", cluster=0, start=0, tokens=np.zeros(99, np.int32), scored_from=9)
    short, long = (SimpleNamespace(logits=lambda tokens, rows, n=n: logits[rows, :n]) for n in (48, 50))
    for pair in ((short, long), (long, short)):
        found: Divergence = guards.divergence(*pair, [block], seed=0)
        assert found.mean == 0 and found.positions == 64


def test_agreement() -> None:
    a = Reading((), (np.array([1, 2, 3, 4]),))
    b = Reading((), (np.array([1, 2, 9, 4]),))
    assert guards.agreement(a, b) == 0.75
    assert guards.agreement(Reading(()), b) is None


@pytest.mark.parametrize(
    ("answer", "loops"),
    [
        (list(range(100)), False),
        ([5] * 30, True),
        (list(range(50)) + [1, 2, 3] * 10, True),
        (list(range(50)) + [1, 2, 3] * 2, False),
        (list(range(30)) * 3, False),
        (list(range(20)) * 3, True),
        ([], False),
    ],
)
def test_loops(answer: list[int], loops: bool) -> None:
    assert guards.is_loop(answer) is loops


class Scripted:
    """A model that says what it was told to, then repeats itself."""

    def __init__(self, answers: dict[int, list[int]]) -> None:
        self.answers, self.spec, self.open = answers, SimpleNamespace(eos_tokens=(0,)), 0

    def session(self) -> Any:
        self.open += 1
        state = SimpleNamespace(at=0, first=0)

        def feed(tokens: Any) -> np.ndarray:
            state.first = tokens[0]
            return self.row(state)

        def close() -> None:
            self.open -= 1

        state.feed, state.close = feed, close
        return state

    def row(self, state: Any) -> np.ndarray:
        script = self.answers[state.first]
        row = np.zeros(100)
        row[script[min(state.at, len(script) - 1)]] = 1.0
        state.at += 1
        return row

    def step(self, sessions: Any, tokens: Any) -> np.ndarray:
        return np.stack([self.row(session) for session in sessions])


def test_habits() -> None:
    runner = Scripted({1: [4, 5, 0], 2: [7], 3: list(range(1, 99))})
    found = guards.habits(runner, [[1], [2], [3]], max_tokens=40)
    assert found.loops == (False, True, False)
    assert found.ends == (True, False, False)
    assert runner.open == 0


def test_mcnemar() -> None:
    assert guards.worse([False] * 5, [True] * 5) == pytest.approx(1 / 32)
    assert guards.worse([True, False], [True, False]) == 1.0


def test_strictness_in_words() -> None:
    fine = Divergence(0.001, 0.01, (), 1000)
    calm, looping = Habits((False,) * 8, (True,) * 8), Habits((True,) * 8, (True,) * 8)
    assert Strictness().failures(0.01, fine, 0.97, calm, calm) == ()
    failed = Strictness().failures(0.01, Divergence(0.2, 3.0, (), 1000), 0.5, calm, looping)
    assert len(failed) == 4
    assert failed[2] == "50% of next words the same, under 90%"
    assert failed[3] == "loops in 100% of answers, not 0%"


def test_neighbours() -> None:
    vectors = np.random.default_rng(0).normal(size=(60, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    same = Reading(tuple(vectors))
    assert guards.neighbours_kept(same, same) == 1.0
    other = Reading(tuple(np.random.default_rng(1).normal(size=(60, 16))))
    assert guards.neighbours_kept(same, other) < 0.5
