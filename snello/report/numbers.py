"""How numbers are written, everywhere: in the terminal, on the page, in Markdown.

Digits follow the uncertainty: an interval is shown to two digits of its half-width, never finer. Units are decimal
(1 GB is 1e9 bytes), a speed-up carries an x, a loss a percent sign. A bound that measuring could not give (JSON holds
it as the largest number there is) is "no bound".
"""

from __future__ import annotations

import math

from snello.measure.interval import Interval

BEYOND = 1e9  # no loss or speed-up is this large: there is no bound


def percent(value: float, digits: int = 2) -> str:
    """0.0052 -> "0.52%". A zero never carries a minus sign."""
    if abs(value) >= BEYOND:
        return "no bound"
    text = f"{100 * value:.{digits}f}%"
    return text[1:] if text.startswith("-") and not text.strip("-0.%") else text


def loss(interval: Interval) -> str:
    """ "0.52% (0.71%)": the loss and its one-sided 95% upper bound, to two digits of the distance between them. The
    bound is rounded up, so that over a budget it never reads as equal to it.
    """
    digits = _digits(100 * (interval.high - interval.mid))
    return f"{percent(interval.mid, digits)} ({percent(_up(interval.high, digits), digits)})"


def at_most(bound: float) -> str:
    """An upper bound rounded *up* to two significant digits: 0.00713 -> "0.72%"."""
    if bound <= 0 or bound >= BEYOND:
        return percent(max(bound, 0.0))
    digits = max(0, min(3, 1 - math.floor(math.log10(100 * bound))))
    return percent(_up(bound, digits), digits)


def times(value: float) -> str:
    """A ratio: "3.02x"; from ten on one digit less."""
    return f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def times_interval(interval: Interval) -> str:
    """ "3.3x (3.2-3.4)", to two digits of the half-width."""
    if interval.high >= BEYOND:
        return f"{times(interval.mid)} (no bound)"
    digits = min(2, _digits(interval.half_width))
    return f"{interval.mid:.{digits}f}x ({interval.low:.{digits}f}-{interval.high:.{digits}f})"


def task_gain(measure: str, gain: Interval) -> str:
    """ "+2.1 to +9.5 points": of accuracy, else nats a token."""
    scale, unit = (100, " points") if measure == "accuracy" else (1, " nats a token")
    return f"{scale * gain.low:+.3g} to {scale * gain.high:+.3g}{unit}"


def size(num_bytes: float) -> str:
    """1_190_000_000 -> "1.19 GB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            value = num_bytes / scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"


def count(value: float) -> str:
    """61204 -> "61,204"."""
    return f"{round(value):,}"


def parameters(value: float) -> str:
    """596_049_920 -> "596 M"."""
    return f"{value / 1e9:.3g} B" if value >= 1e9 else f"{value / 1e6:.3g} M"


def rate(tokens_per_second: float) -> str:
    """Three significant digits: 2439.7 -> "2,440"; 41.26 -> "41.3"."""
    if tokens_per_second >= 100:
        step = 10 ** max(0, math.floor(math.log10(tokens_per_second)) - 2)
        return f"{round(tokens_per_second / step) * step:,}"
    return f"{tokens_per_second:.3g}"


def seconds(value: float) -> str:
    """0.0123 -> "12 ms", 5.712 -> "5.71 s", 130 -> "2:10"."""
    if value < 1:
        return f"{value * 1000:.3g} ms"
    if value < 60:
        return f"{value:.3g} s"
    return clock(value)


def clock(value: float) -> str:
    """130 -> "2:10"; 4000 -> "1:06:40"."""
    whole = round(value)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _up(bound: float, digits: int) -> float:
    """Rounded up to so many decimals of a percent."""
    scale = 10 ** (digits + 2)
    return bound if abs(bound) >= BEYOND else math.ceil(bound * scale - 1e-9) / scale


def _digits(width: float) -> int:
    """Decimals that show two digits of `width`, at least one and at most three."""
    return 2 if width <= 0 or width >= BEYOND else max(1, min(3, 1 - math.floor(math.log10(width))))
