"""How much more often one of two is wrong on the same examples, with bounds that hold where hardly any answer changes.

Redraws of the examples cannot show a change that none of them has: a candidate without a single other answer would be
bounded by exactly nothing, whatever the number of examples. The score test asks instead which differences would have
made what was seen unlikely: without a change in n examples, all above z^2 / (n + z^2), about 2.7 / n.

Paper: Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample design,
Statistics in Medicine 17 (1998).
"""

from __future__ import annotations

import math

import numpy as np

from snello.measure.interval import Interval

Z = 1.6448536269514722  # one-sided 95%
HALVINGS = 60


def flips_interval(differences: np.ndarray) -> Interval:
    """The mean of differences (n,), each -1, 0 or 1, with its two one-sided 95% bounds by the score test."""
    count = len(differences)
    worse, better = int(np.count_nonzero(differences > 0)), int(np.count_nonzero(differences < 0))
    mean = (worse - better) / count
    return Interval(-_upper(better, worse, count), mean, _upper(worse, better, count))


def _upper(worse: int, better: int, count: int) -> float:
    """The largest difference that the test does not refuse."""
    low, high = (worse - better) / count, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _score(worse, better, count, middle) > -Z else (low, middle)
    return high


def _score(worse: int, better: int, count: int, difference: float) -> float:
    """How many standard errors what was seen lies above `difference`, if that is the truth. The rate of changes to the
    better has its most likely value under it.
    """
    linear = (2 * count - worse + better) * difference - worse - better
    constant = -better * difference * (1 - difference)
    rate = (math.sqrt(max(0.0, linear * linear - 8 * count * constant)) - linear) / (4 * count)
    variance = count * (2 * rate + difference * (1 - difference))
    return (worse - better - count * difference) / math.sqrt(variance) if variance > 0 else -math.inf
