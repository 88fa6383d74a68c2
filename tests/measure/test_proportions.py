"""Bounds of paired proportions: a worked example, symmetry, and how often they miss the truth."""

from __future__ import annotations

import numpy as np
import pytest

from snello.measure.proportions import flips_interval


def flips(worse: int, better: int, count: int) -> np.ndarray:
    return np.repeat([1.0, -1.0, 0.0], [worse, better, count - worse - better])


def test_bounds_are_where_the_test_turns() -> None:
    """The score statistic at the upper bound is -1.645, its nuisance rate found by brute force."""
    worse, better, count = 12, 5, 400
    bound = flips_interval(flips(worse, better, count)).high
    rates = np.linspace(1e-6, 0.1, 200_001)  # of changes to the better; to the worse, the difference more
    likely = (
        worse * np.log(rates + bound) + better * np.log(rates) + (count - worse - better) * np.log1p(-2 * rates - bound)
    )
    rate = rates[np.argmax(likely)]
    score = (worse - better - count * bound) / np.sqrt(count * (2 * rate + bound * (1 - bound)))
    assert score == pytest.approx(-1.6449, abs=1e-3)


def test_better_is_worse_with_its_sign_turned() -> None:
    one, other = flips_interval(flips(9, 2, 150)), flips_interval(flips(2, 9, 150))
    assert (one.low, one.mid, one.high) == pytest.approx((-other.high, -other.mid, -other.low))
    assert one.low < one.mid < one.high


@pytest.mark.parametrize(
    ("count", "loss", "back"), [(100, 0.02, 0.0), (300, 0.01, 0.0), (300, 0.01, 0.02), (1000, 0.03, 0.01)]
)
def test_the_truth_is_missed_as_often_as_is_said(count: int, loss: float, back: float) -> None:
    drawn = np.random.default_rng(0).random((2_000, count))
    differences = (drawn < loss + back).astype(float) - (drawn > 1 - back)
    missed = np.mean([flips_interval(one).high < loss for one in differences])
    assert missed < 0.06
