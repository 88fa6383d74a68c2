"""From labelled pairs to a certificate that a cache takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snello.errors import SnelloError
from snello.serve.caches.embed import NgramEmbedder
from snello.serve.caches.guard import Guard
from snello.serve.caches.labelled import Pair, certify_pairs, outcomes, read_pairs
from snello.serve.caches.similar import SimilarAnswers

WORDS = ["apple", "river", "stone", "cloud", "horse", "candle", "window", "garden", "copper", "violin"]


def pairs(count: int, wrong_every: int = 0) -> list[Pair]:
    """Questions in two wordings that the guard lets through; now and then labelled as different."""
    made = []
    for number in range(count):
        a, b, c = (WORDS[number // 10**place % 10] for place in range(3))
        same = not (wrong_every and number % wrong_every == 0)
        made.append(Pair(f"What is the {a} {b} {c}?", f"Please tell: what's a {a} {b} {c}", same))
    return made


def test_outcomes_are_a_caches() -> None:
    embedder, guard = NgramEmbedder(), Guard()
    near, right = outcomes(pairs(50, wrong_every=10), embedder, guard)
    assert near.shape == right.shape == (50,) and right.sum() == 45 and np.isfinite(near[right]).all()
    far = [*pairs(3), Pair("one thing", "quite another", True)]
    near, right = outcomes(far, embedder, guard)
    assert np.isneginf(near).sum() == 1 and right.sum() >= 3
    near, right = outcomes([Pair("same", "same", True)], embedder, guard)
    assert near.shape == (0,), "what is inserted is not asked"


def test_what_is_proved_serves() -> None:
    embedder, guard = NgramEmbedder(), Guard()
    found = certify_pairs(pairs(300), embedder, guard, epsilon=0.05)
    assert found is not None and found.wrong == 0 and found.hits >= 118
    similar = SimilarAnswers(embedder, guard, found)
    similar.keep(b"n", pairs(1)[0].one, b"k", finish_reason="stop")
    assert similar.find(b"n", pairs(1)[0].one) is not None
    assert certify_pairs(pairs(300, wrong_every=5), embedder, guard, epsilon=0.05) is None
    assert certify_pairs(pairs(300), embedder, guard, epsilon=0.001) is None


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", "[1]", "\x00"),
        [{"text_a": "a", "text_b": "b"}],
        [{"text_a": 1, "text_b": "b", "label": 1}],
        [{"text_a": "a", "text_b": "b", "label": 2}],
    ],
)
def test_files_that_hold_no_pairs(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SnelloError, match="no labelled pairs"):
        read_pairs(path)
    with pytest.raises(SnelloError, match="cannot be read"):
        read_pairs(tmp_path / "none.json")


def test_a_file_of_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{"text_a": "a", "text_b": "b", "label": 1, "more": 2}]))
    assert read_pairs(path) == [Pair("a", "b", True)]
