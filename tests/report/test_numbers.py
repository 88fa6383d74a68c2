"""Digits follow the uncertainty, bounds are rounded up, units are decimal."""

from __future__ import annotations

import pytest

from snello.measure.interval import Interval
from snello.report import numbers


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(0.004, 0.0052, 0.0071), "0.52% (0.71%)"),
        (Interval(-0.0003, -0.00001, 0.0003), "-0.001% (0.030%)"),
        (Interval(0.0, 0.0, 0.0), "0.00% (0.00%)"),
        (Interval(0.02, 0.0231, 0.0531), "2.3% (5.4%)"),  # a bound is rounded up
        (Interval(0.009, 0.0095, 0.010001), "0.950% (1.001%)"),
    ],
)
def test_losses(interval: Interval, text: str) -> None:
    assert numbers.loss(interval) == text


@pytest.mark.parametrize(("bound", "text"), [(0.00713, "0.72%"), (0.0071, "0.71%"), (0.052, "5.2%"), (0.0, "0.00%")])
def test_bounds_are_rounded_up(bound: float, text: str) -> None:
    assert numbers.at_most(bound) == text


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (numbers.percent(-0.000001), "0.00%"),
        (numbers.size(1_190_000_000), "1.19 GB"),
        (numbers.size(352_400_000), "352 MB"),
        (numbers.size(12), "12 bytes"),
        (numbers.count(61204), "61,204"),
        (numbers.parameters(596_049_920), "596 M"),
        (numbers.parameters(1_100_048_384), "1.1 B"),
        (numbers.rate(2439.7), "2,440"),
        (numbers.rate(41.26), "41.3"),
        (numbers.seconds(0.0123), "12.3 ms"),
        (numbers.seconds(130), "2:10"),
        (numbers.clock(4000), "1:06:40"),
        (numbers.times_interval(Interval(3.2, 3.3, 3.4)), "3.30x (3.20-3.40)"),
        (numbers.times(12.34), "12.3x"),
    ],
)
def test_units(written: str, text: str) -> None:
    assert written == text
