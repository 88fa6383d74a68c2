"""The bound holds: about 95% coverage on skewed, correlated losses; a loss 10% over budget is rarely let through."""

from __future__ import annotations

import math

import numpy as np
import pytest

from snello.measure.bootstrap import Clusters, holm, mean_interval, relative, student, t_interval, two_sided_p
from snello.measure.interval import Interval


def realistic(generator: np.random.Generator, documents: int, mean: float) -> Clusters:
    """Differences per token as quantization makes them: heavy tails, skewed, correlated within a document."""
    pieces, names = [], []
    for document in range(documents):
        size = int(generator.integers(200, 1500))
        own = mean + generator.normal(0, 0.008)
        tails = 0.15 * generator.standard_t(3, size) + 0.1 * (generator.exponential(1, size) - 1)
        pieces.append(own + tails)
        names.append(document)
    return Clusters.of(pieces, names)


@pytest.mark.parametrize("documents", [12, 40])
def test_upper_bound_covers_the_truth_95_times_of_100(documents: int) -> None:
    generator = np.random.default_rng(1)
    misses = sum(
        mean_interval(realistic(generator, documents, 0.01), seed=i, draws=1000).high < 0.01 for i in range(300)
    )
    assert 0.02 <= misses / 300 <= 0.085


def test_a_loss_ten_percent_over_budget_is_kept_at_most_5_percent_of_the_time() -> None:
    budget = 0.01
    generator = np.random.default_rng(2)
    truth = math.log1p(1.1 * budget)
    kept = 0
    for i in range(200):
        bound = relative(mean_interval(realistic(generator, 40, truth), seed=i, draws=1000)).high
        kept += bound <= budget
    assert kept / 200 <= 0.05


def test_the_same_bits_twice_are_exactly_zero() -> None:
    same = Clusters.of([np.zeros(100)] * 20, list(range(20)))
    assert mean_interval(same, seed=0) == Interval.exact(0.0)


def test_few_clusters_bound_nothing() -> None:
    few = Clusters.of([np.ones(10), np.zeros(10)], [0, 1])
    found = mean_interval(few, seed=0)
    assert (found.low, found.mid, found.high) == (-math.inf, 0.5, math.inf)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_difference_that_is_not_finite_is_worse_than_any(value: float) -> None:
    found = mean_interval(Clusters.of([np.ones(10)] * 19 + [np.full(10, value)], list(range(20))), seed=0)
    assert (found.low, found.mid, found.high) == (-math.inf, math.inf, math.inf)


def test_seeded() -> None:
    clusters = realistic(np.random.default_rng(3), 20, 0.01)
    assert mean_interval(clusters, seed=5) == mean_interval(clusters, seed=5)
    assert mean_interval(clusters, seed=5) != mean_interval(clusters, seed=6)


def test_clusters_add_up_blocks_of_one_document() -> None:
    clusters = Clusters.of([np.ones(2), np.full(3, 2.0), np.zeros(4)], [7, 7, 9])
    assert clusters.sums.tolist() == [8.0, 0.0]
    assert clusters.counts.tolist() == [5, 4]


def test_many_clusters_are_gathered_without_losing_anything() -> None:
    generator = np.random.default_rng(0)
    many = Clusters(generator.normal(1, 3, 20_000), np.ones(20_000))
    few = many.gathered(512, 0)
    assert len(few.sums) == 512 and few.mean == pytest.approx(many.mean)
    found = mean_interval(many, seed=0)
    expected = 1.645 * many.sums.std() / math.sqrt(20_000)
    assert found.high - found.mid == pytest.approx(expected, rel=0.1)


def test_relative_survives_infinity() -> None:
    assert relative(Interval(-math.inf, 0.0, math.inf)) == Interval(-1.0, 0.0, math.inf)


def test_student() -> None:
    assert student(1) == 12.71
    assert student(30) == pytest.approx(2.042, abs=0.003)
    assert student(1000) == pytest.approx(1.962, abs=0.002)


def test_t_interval_covers() -> None:
    generator = np.random.default_rng(0)
    inside = sum(found.low <= 0 <= found.high for found in (t_interval(generator.normal(0, 1, 6)) for _ in range(1000)))
    assert 0.93 <= inside / 1000 <= 0.97


def test_chance_is_called_significant_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    found = [two_sided_p(realistic(generator, 24, 0.0), seed=i, draws=500) for i in range(300)]
    assert 0.02 <= np.mean(np.array(found) < 0.05) <= 0.09
    real = [two_sided_p(realistic(generator, 24, 0.02), seed=i, draws=500) for i in range(20)]
    assert max(real) < 0.01
    assert two_sided_p(Clusters(np.ones(7), np.ones(7)), seed=0) == 1.0
    assert two_sided_p(Clusters(np.zeros(20), np.ones(20)), seed=0) == 1.0


def test_holm_is_the_published_procedure() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([]) == []
