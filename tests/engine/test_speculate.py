"""Guessing: what is found in the text, how many guesses pay, and that answers keep every token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from snello.engine.llm import LLM
from snello.engine.speculate import Governor, PromptLookup
from snello.errors import SnelloError

REPEATED = "def add(a, b):\n    return a + b\n\n" * 6


def test_the_latest_occurrence_of_the_most_tokens_is_continued() -> None:
    lookup = PromptLookup(longest=3, shortest=2, most=2)
    assert list(lookup([1, 2, 3, 7, 8, 9, 5, 2, 3, 6, 1, 2, 3])) == [7, 8]  # three agree, though two did later
    assert list(lookup([5, 2, 3, 6, 4, 2, 3, 9, 2, 3])) == [9, 2]
    assert list(lookup([1, 2, 3, 4])) == []
    assert list(lookup([1])) == []


def test_bytes_that_look_alike_between_two_items_are_no_occurrence() -> None:
    lookup = PromptLookup(longest=1, shortest=1, most=1)
    assert list(lookup([0x01000000, 0x00000002, 0x00000001, 9, 0x02000000 >> 24])) == [1]
    assert list(lookup([0x0100, 0x0200, 1 << 24])) == []


def test_lookup_agrees_with_a_plain_search() -> None:
    random = np.random.default_rng(0)
    lookup = PromptLookup(longest=3, shortest=1, most=4)
    for _ in range(300):
        text = random.integers(0, 4, random.integers(1, 30)).tolist()
        assert list(lookup(text)) == _plain(text, 3, 1, 4)


def _plain(text: list[int], longest: int, shortest: int, most: int) -> list[int]:
    for length in range(longest, shortest - 1, -1):
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == text[len(text) - length :]:
                return text[start + length : start + length + most]
    return []


def flat(rows: int, reads: int) -> float:
    return 10.0 + 0.1 * rows


def steep(rows: int, reads: int) -> float:
    return 10.0 * rows


def test_guesses_that_are_right_grow_and_wrong_ones_stop() -> None:
    governor = Governor()
    for _ in range(30):
        governor.observe(1, 4, 4)
        governor.observe(2, 4, 0)
    assert governor.choose(1, 8, 1, 100, flat) == 8
    assert governor.choose(2, 8, 1, 100, flat) <= 1
    assert governor.accepted == 120 and governor.proposed == 240


def test_rows_that_cost_a_whole_step_are_not_guessed_but_tried_again_in_time() -> None:
    governor = Governor()
    chosen = [governor.choose(1, 8, 1, 100, steep) for _ in range(60)]
    assert chosen[0] == 0 and 1 in chosen


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_are_the_same_with_and_without(temperature: float) -> None:
    names: dict[str, Any] = {"max_tokens": 96, "temperature": temperature, "seed": 5}
    with LLM("demo") as plain, LLM("demo", speculate="prompt-lookup") as guessing:
        for prompt in (REPEATED, "import os\n", REPEATED + "class A:\n"):
            one, other = plain.generate(prompt, **names), guessing.generate(prompt, **names)
            assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert guessing.engine.governor.accepted > 0


def test_an_unknown_way_to_guess_is_named() -> None:
    with pytest.raises(SnelloError, match="magic"):
        LLM("demo", speculate="magic")
