"""Cells of tables whose value may be absent: a dash, never a zero."""

from __future__ import annotations

from collections.abc import Callable

from snello.measure.interval import Interval
from snello.report import numbers


def optional(interval: Interval | None, write: Callable[[Interval], str]) -> str:
    return "-" if interval is None else write(interval)


def plain_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def optional_percent(value: float | None) -> str:
    return "-" if value is None else numbers.percent(value, 1)


def both(rates: tuple[float, float] | None) -> str:
    return "-" if rates is None else f"{optional_percent(rates[0])}, {optional_percent(rates[1])}"
