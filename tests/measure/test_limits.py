"""A number beside its limit never reads as equal to it, wherever both are written."""

from __future__ import annotations

import re

import numpy as np
import pytest

from snello.measure.guards import Divergence, Habits, Strictness
from snello.measure.interval import Interval
from snello.measure.limits import above, below, exact, over
from snello.measure.quality import Power
from snello.measure.timing import Ratio
from snello.optimize.gate import PAYS, judge_cost, judge_quality
from snello.optimize.planner import hopeless
from snello.optimize.sentence import at_most
from snello.report import numbers

LIMITS = (0.01, 0.005, 0.0125, 0.02, 0.1, 0.00123)
OVER = (1.00004, 1.0004, 1.004, 1.04, 1.4)  # times the limit


def percents(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"([0-9.]+)%", text)]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("times", OVER)
def test_a_bound_over_its_limit_reads_as_over(limit: float, times: float) -> None:
    high, asked = limit * times, round(100 * limit, 6)
    dropped = judge_quality(Interval(0, 0.9 * limit, high), limit)
    metric = judge_quality(Interval(0, 0, 0), limit, metric=Interval(0, 0, high))
    assert dropped is not None and metric is not None
    power = Power({"text": high}, 1000, limit)
    lost = hopeless([object(), object()], lambda _: high / 2, limit)  # type: ignore[list-item]
    for text in (dropped.reason, dropped.margin, metric.reason, power.sentence, lost):
        *_, found, read = percents(text)
        assert read == asked and (found > read or "a little more than" in text), text
    for text in (numbers.at_most(high), at_most(high), numbers.loss(Interval(0, 0.9 * limit, high))):
        assert percents(text)[-1] > asked, text


def test_what_is_within_reads_as_within() -> None:
    for high in (0.00996, 0.009996, 0.01):
        assert judge_quality(Interval(0, 0.005, high), 0.01) is None
        assert percents(numbers.loss(Interval(0, 0.005, high)))[-1] <= 1
        assert percents(at_most(high))[-1] <= 1


@pytest.mark.parametrize("gain", [0.0296, 0.02996, 0.0299996])
def test_a_gain_below_what_pays_reads_as_below(gain: float) -> None:
    for mid in (1 - gain, 1 - gain - 1e-3):
        judged = judge_cost("latency", Ratio(Interval(mid - 0.01, mid, 1 - gain), True, ()), {})
        *_, surely, pays = percents(judged.reason)
        assert judged.verdict == "dropped" and pays == 3, judged.reason
        assert surely < pays or "a little less than" in judged.reason


@pytest.mark.parametrize("times", OVER)
def test_a_guard_that_does_not_pass_reads_as_that(times: float) -> None:
    calm, nats = Habits((False,), (True,)), float(np.log1p(0.01))
    found = Divergence(3 * nats * times, 60 * nats * times, (), 1000)
    mean, tail, same = Strictness().failures(0.01, found, 0.9 / times, calm, calm)
    for text in (mean, tail):
        value, limit = re.findall(r"([0-9.]+) over ([0-9.]+)$", text)[0]
        assert float(value) > float(limit), text
    assert percents(same)[0] < 90 and percents(same)[1] == 90, same


def test_digits_as_many_as_needed() -> None:
    assert [above(value, 0.01) for value in (0.012, 0.01004, 0.0100001, np.inf)] == [
        "1.2%",
        "1.004%",
        "a little more than 1%",
        "no bound",
    ]
    assert [below(value, 1 - PAYS) for value in (0.01, 0.0296, 0.0299999999)] == [
        "1%",
        "2.96%",
        "a little less than 3%",
    ]
    assert [over(value, 0.5) for value in (0.75, 0.50001, 0.5 + 1e-12)] == [
        "0.75 over 0.5",
        "0.50001 over 0.5",
        "a little over 0.5",
    ]
    assert [exact(limit) for limit in (0.01, 0.0125, 1 - PAYS)] == ["1%", "1.25%", "3%"]
