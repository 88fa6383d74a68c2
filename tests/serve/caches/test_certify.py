"""Bounds that hold: against the textbook's numbers, and against luck."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snello.errors import SnelloError
from snello.serve.caches.certify import THRESHOLDS, Certificate, Watch, certify, hits_needed, interval, upper_bound


@pytest.mark.parametrize(
    ("epsilon", "hits"),
    [
        (0.05, (59, 93, 124, 208)),
        (0.02, (149, 236, 313, 523)),
        (0.01, (299, 473, 628, 1049)),
        (0.001, (2995, 4742, 6294, 10511)),
    ],
)
def test_hits_that_prove_a_bound(epsilon: float, hits: tuple[int, ...]) -> None:
    """One-sided Clopper-Pearson at 95%, for 0, 1, 2 and 5 errors."""
    assert hits_needed(epsilon) == hits[0]
    for wrong, count in zip((0, 1, 2, 5), hits, strict=True):
        assert upper_bound(wrong, count) <= epsilon < upper_bound(wrong, count - 1)


def test_bounds_of_little_and_of_much() -> None:
    assert upper_bound(0, 0) == upper_bound(3, 3) == 1.0 and interval(0, 0) == (0.0, 1.0)
    low, high = interval(1, 10)
    assert low == pytest.approx(0.002529, abs=1e-5) and high == pytest.approx(0.445016, abs=1e-5)
    low, high = interval(50_000, 100_000)
    assert 0.4968 < low < 0.5 < high < 0.5032


def draw(source: np.random.Generator, count: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Questions whose nearest is wrong the more often the farther it is: (1 - similarity) * scale."""
    near = source.uniform(0.5, 1.0, count)
    return near, source.uniform(size=count) >= (1 - near) * scale


def true_share(threshold: float, scale: float) -> float:
    return (1 - threshold) / 2 * scale


def test_what_is_certified_is_true_but_for_one_time_in_twenty() -> None:
    source, epsilon, scale = np.random.default_rng(4), 0.05, 0.5
    names: dict[str, Any] = {"epsilon": epsilon, "embedder": "e", "guard": "g", "thresholds": THRESHOLDS[::3]}
    found = [certify(*draw(source, 2000, scale), **names) for _ in range(300)]
    certified = [each for each in found if each is not None]
    broken = sum(true_share(each.threshold, scale) > epsilon for each in certified)
    assert len(certified) > 200, "the test would prove nothing"
    assert broken <= 24, f"{broken} of 300 certificates are wrong: 15 are allowed, and some luck"


def test_the_laxest_that_passes_and_nothing_after_a_failure() -> None:
    near = np.array([0.9] * 130 + [0.8] * 100 + [0.7] * 2000)
    right = np.array([True] * 130 + [False] * 50 + [True] * 50 + [True] * 2000)
    found = certify(near, right, epsilon=0.05, embedder="e", guard="g", thresholds=(0.95, 0.9, 0.8, 0.7))
    assert found is not None and (found.threshold, found.hits, found.wrong) == (0.9, 130, 0)


def test_too_little_or_too_wrong_is_not_certified() -> None:
    few = np.full(58, 0.9), np.full(58, True)
    assert certify(*few, epsilon=0.05, embedder="e", guard="g") is None
    wrong = np.full(5000, 0.9), np.arange(5000) % 10 > 0
    assert certify(*wrong, epsilon=0.05, embedder="e", guard="g") is None
    refused = np.full(5000, -np.inf), np.full(5000, True)
    assert certify(*refused, epsilon=0.05, embedder="e", guard="g") is None


def test_numbers_that_cannot_be() -> None:
    for epsilon, confidence in ((0, 0.95), (1, 0.95), (0.1, 1.0)):
        with pytest.raises(SnelloError, match="epsilon"):
            certify([0.9], [True], epsilon=epsilon, confidence=confidence, embedder="e", guard="g")
    with pytest.raises(SnelloError, match="falling"):
        certify([0.9], [True], epsilon=0.1, embedder="e", guard="g", thresholds=(0.8, 0.9))


# ---- the watch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.01, 0.05])
def test_false_alarms_stay_under_five_percent_for_ever(epsilon: float) -> None:
    source = np.random.default_rng(6)
    alarms = 0
    for _ in range(200):
        watch = Watch(epsilon)
        alarms += any(watch.see(right=bool(x)) for x in source.uniform(size=1500) >= epsilon)
    assert alarms <= 18  # 10 expected at most, and some luck


@pytest.mark.parametrize(("share", "within"), [(0.5, 12), (0.2, 60), (0.1, 400)])
def test_a_broken_bound_is_noticed(share: float, within: int) -> None:
    source = np.random.default_rng(7)
    taken = []
    for _ in range(40):
        watch = Watch(0.02)
        while not watch.see(right=bool(source.uniform() >= share)):
            assert watch.audited < 5000
        taken.append(watch.audited)
    assert np.median(taken) <= within


def test_a_breach_does_not_heal() -> None:
    watch = Watch(0.05)
    for _ in range(10):
        watch.see(right=False)
    assert watch.breached
    for _ in range(2000):
        watch.see(right=True)
    assert watch.breached and watch.see(right=True)


# ---- certificates on disk -------------------------------------------------------------------------------------------


def test_a_certificate_is_kept_and_checked(tmp_path: Path) -> None:
    found = certify(np.full(100, 0.9), np.full(100, True), epsilon=0.05, embedder="e", guard="g")
    assert found is not None and found.bound <= 0.05
    found.save(tmp_path / "c.json")
    assert Certificate.load(tmp_path / "c.json") == found
    with pytest.raises(SnelloError, match="no certificate"):
        Certificate.load(tmp_path / "none.json")
    plain = json.loads((tmp_path / "c.json").read_text())
    for wrong in (
        {"hits": 10},
        {"wrong": 50},
        {"wrong": 101},
        {"epsilon": "x"},
        {"threshold": 7},
        {"confidence": 1.5},
        {"more": 1},
    ):
        (tmp_path / "c.json").write_text(json.dumps(plain | wrong))
        with pytest.raises(SnelloError, match="no sound certificate"):
            Certificate.load(tmp_path / "c.json")
    for text in ("", "[]", "{}", "\x00", '{"threshold": 1}'):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(SnelloError, match="no sound certificate"):
            Certificate.load(tmp_path / "c.json")
