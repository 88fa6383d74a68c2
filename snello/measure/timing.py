"""Is one really faster? Two costs in turn, A B B A, until their ratio is known to 1.5% of A's cost or it is too noisy.

Where only a threshold decides, a ratio that lies far from it needs no more runs, however noisy the machine.

Machines drift (heat, neighbours), so nothing is compared across minutes: each quad of runs gives one ratio in which a
steady drift cancels, and the interval is Student's over the logarithms of those ratios.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from snello.measure.bootstrap import t_interval
from snello.measure.interval import Interval
from snello.measure.runner import Step, silent

HALF_WIDTH = 0.015
LEAST_QUADS = 3
MOST_QUADS = 12

Cost = Callable[[], float]


@dataclass(frozen=True)
class Ratio:
    """Cost of B over cost of A. `steady`: known to 1.5% of A's cost; else it is too noisy to say."""

    interval: Interval
    steady: bool
    pairs: tuple[tuple[float, float], ...]  # (A, B) in order of measurement

    @property
    def a(self) -> float:
        return float(np.median([pair[0] for pair in self.pairs]))

    @property
    def b(self) -> float:
        return float(np.median([pair[1] for pair in self.pairs]))

    def pays(self, gain: float = 0.97) -> bool:
        """The upper bound of the cost ratio is at most `gain`."""
        return len(self.pairs) > 2 and self.interval.high <= gain


def ratio(
    a: Cost,
    b: Cost,
    *,
    most_quads: int = MOST_QUADS,
    least_quads: int = LEAST_QUADS,
    half_width: float = HALF_WIDTH,
    threshold: float | None = None,
    step: Step = silent,
) -> Ratio:
    """Runs A B B A until the 95% half-width of the ratio B / A is at most `half_width`, or the tries are used up.

    Args:
        threshold: it also ends where the whole interval is farther from this than it is wide.
    """
    a(), b()  # caches, pages and clocks warm up
    pairs: list[tuple[float, float]] = []
    while len(pairs) < 2 * most_quads:
        first = a()
        pairs.append((first, b()))
        second = b()
        pairs.append((a(), second))
        step(len(pairs), 2 * most_quads)
        found = summarize(pairs, half_width)
        if len(pairs) < 2 * least_quads:
            continue
        if found.steady or hopeless(found, most_quads) or (threshold is not None and far(found.interval, threshold)):
            break
    step(2 * most_quads, 2 * most_quads)
    return summarize(pairs, half_width)


def summarize(pairs: list[tuple[float, float]], half_width: float = HALF_WIDTH) -> Ratio:
    if len(pairs) == 2:  # one quad bounds nothing: its two ratios, for what they are worth
        ratios = sorted(b / a for a, b in pairs)
        return Ratio(Interval(ratios[0], math.sqrt(ratios[0] * ratios[1]), ratios[1]), False, tuple(pairs))
    logs = np.array([math.log(b / a) for a, b in pairs])
    quads = logs.reshape(-1, 2).mean(axis=1)
    bounds = t_interval(quads)
    interval = Interval(*(math.exp(min(value, 700.0)) for value in (bounds.low, bounds.mid, bounds.high)))
    steady = math.isfinite(bounds.high) and interval.half_width <= half_width
    return Ratio(interval, steady, tuple(pairs))


def far(found: Interval, threshold: float) -> bool:
    """The whole interval is farther from a threshold than it is wide."""
    return max(found.low - threshold, threshold - found.high) >= found.high - found.low


def hopeless(found: Ratio, most_quads: int) -> bool:
    """Even all tries at this noise would not come near: stop early and say so."""
    quads = len(found.pairs) // 2
    return quads >= 6 and found.interval.half_width * math.sqrt(quads / most_quads) > 4 * HALF_WIDTH
