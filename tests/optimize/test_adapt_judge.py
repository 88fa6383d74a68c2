"""The bounds of what a task gains in accuracy: what few or no changes can prove, and examples that hang together."""

from __future__ import annotations

import numpy as np
import pytest

from snello.measure.proportions import Z, flips_interval
from snello.optimize.adapt_judge import accuracy_verdict


def answers(count: int, better: int, worse: int) -> tuple[np.ndarray, np.ndarray]:
    """(right, base): so many examples that only one of them has right, and the rest both."""
    right, base = np.ones(count, bool), np.ones(count, bool)
    base[:better], right[better : better + worse] = False, False
    return right, base


def test_no_change_does_not_prove_that_there_is_none() -> None:
    gain = accuracy_verdict(*answers(300, 0, 0), list(range(300)), 0).gain
    bound = Z * Z / (300 + Z * Z)
    assert (gain.low, gain.mid, gain.high) == pytest.approx((-bound, 0, bound))


def test_a_gain_is_bounded_as_a_loss_is() -> None:
    right, base = answers(200, 9, 3)
    gain = accuracy_verdict(right, base, list(range(200)), 0).gain
    loss = accuracy_verdict(base, right, list(range(200)), 0).gain
    assert gain == flips_interval(right.astype(float) - base.astype(float)) and gain.mid == pytest.approx(0.03)
    assert (gain.low, gain.high) == pytest.approx((-loss.high, -loss.low))


def test_a_lower_bound_holds_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    missed = 0
    for _ in range(400):  # in truth nothing is gained: 2% to the better, and 2% to the worse
        drawn = generator.random(100)
        right, base = drawn >= 0.02, (drawn < 0.02) | (drawn >= 0.04)
        missed += accuracy_verdict(right, base, list(range(100)), 0).gain.low > 0
    assert missed <= 0.08 * 400


def test_examples_of_one_family_are_not_independent() -> None:
    right, base = answers(200, 20, 0)  # one family of twenty, and 180 alone
    families = [0] * 20 + list(range(1, 181))
    alone = accuracy_verdict(right, base, list(range(200)), 0).gain
    together = accuracy_verdict(right, base, families, 0).gain
    assert alone.low > 0 >= together.low and together.high >= alone.high and together.mid == alone.mid
