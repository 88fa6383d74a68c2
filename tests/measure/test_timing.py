"""A B B A: drift cancels, a real gain pays, noise is confessed."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from snello.measure.interval import Interval
from snello.measure.timing import far, ratio, summarize


class Costs:
    """Two costs on one machine that drifts and jitters."""

    def __init__(self, b: float, noise: float, drift: float = 0.0) -> None:
        self.generator, self.noise, self.drift, self.b, self.runs = np.random.default_rng(0), noise, drift, b, 0

    def cost(self, level: float) -> Callable[[], float]:
        def run() -> float:
            self.runs += 1
            jitter = math.exp(self.noise * self.generator.standard_normal())
            return level * jitter * (1 + self.drift * self.runs)

        return run

    def pair(self) -> tuple[Callable[[], float], Callable[[], float]]:
        return self.cost(1.0), self.cost(self.b)


def test_a_clear_gain_pays_quickly() -> None:
    costs = Costs(0.5, 0.005)
    found = ratio(*costs.pair())
    assert found.steady and found.pays()
    assert found.interval.low <= 0.5 <= found.interval.high
    assert costs.runs <= 16


def test_no_gain_does_not_pay() -> None:
    found = ratio(*Costs(1.0, 0.003).pair())
    assert found.steady and not found.pays()


def test_two_percent_is_not_enough() -> None:
    found = ratio(*Costs(0.98, 0.003).pair())
    assert found.steady and not found.pays()


def test_a_steady_drift_cancels() -> None:
    found = ratio(*Costs(0.9, 0.001, drift=0.01).pair())
    assert found.interval.mid == pytest.approx(0.9, abs=0.003)


def test_noise_is_confessed() -> None:
    found = ratio(*Costs(0.9, 0.5).pair())
    assert not found.steady and not found.pays()
    assert len(found.pairs) <= 24


def test_what_is_far_from_the_threshold_needs_no_more_runs() -> None:
    noisy = 0.1
    whole, short = (ratio(*Costs(0.4, noisy).pair(), threshold=threshold) for threshold in (None, 0.97))
    assert len(short.pairs) < len(whole.pairs)
    assert short.pays() and not short.steady
    near = ratio(*Costs(0.95, noisy).pair(), threshold=0.97)
    assert len(near.pairs) == 24


@pytest.mark.parametrize(
    ("low", "high", "is_far"), [(0.4, 0.6, True), (0.6, 0.8, False), (1.2, 1.4, True), (0.9, 1.1, False)]
)
def test_far_is_as_far_as_the_interval_is_wide(low: float, high: float, is_far: bool) -> None:
    assert far(Interval(low, (low + high) / 2, high), 0.97) == is_far


def test_progress_ends_at_its_total() -> None:
    told: list[tuple[int, int]] = []
    ratio(*Costs(0.5, 0.001).pair(), step=lambda done, total: told.append((done, total)))
    assert told[-1] == (24, 24)
    assert told == sorted(told)


def test_intervals_cover() -> None:
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(500):
        pairs = [(math.exp(0.02 * a), 0.9 * math.exp(0.02 * b)) for a, b in generator.standard_normal((12, 2))]
        found = summarize(pairs).interval
        inside += found.low <= 0.9 <= found.high
    assert 0.92 <= inside / 500 <= 0.98
