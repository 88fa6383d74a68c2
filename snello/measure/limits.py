"""A number beside its limit, in as many digits as tell on which side it lies.

A bound of 1.004% beside a budget of 1% must not read as "1% is over 1%". Limits are the user's own numbers, or ours,
and are written as they were given.
"""

from __future__ import annotations

import math


def percent(value: float, digits: int = 2) -> str:
    """Two significant digits: 0.0123 -> "1.2%"."""
    return f"{float(f'{100 * value:.{digits}g}'):g}%"


def exact(limit: float) -> str:
    """0.0125 -> "1.25%"."""
    return percent(limit, 6)


def above(value: float, limit: float) -> str:
    """A value over a limit: 0.01004 over 0.01 -> "1.004%"."""
    if not math.isfinite(value):
        return "no bound"
    written = (percent(value, digits) for digits in range(2, 6))
    return next(
        (text for text in written if _number(text) > _number(exact(limit))), f"a little more than {exact(limit)}"
    )


def below(value: float, limit: float) -> str:
    """A value under a limit: 0.0296 under 0.03 -> "2.96%"."""
    written = (percent(value, digits) for digits in range(2, 6))
    return next(
        (text for text in written if _number(text) < _number(exact(limit))), f"a little less than {exact(limit)}"
    )


def over(value: float, limit: float) -> str:
    """A plain value over a limit that was computed: 0.029863 over 0.029851 -> "0.02986 over 0.02985"."""
    written = ((f"{value:.{digits}g}", f"{limit:.{digits}g}") for digits in range(3, 10))
    return next(
        (f"{own} over {most}" for own, most in written if float(own) > float(most)), f"a little over {limit:.3g}"
    )


def _number(text: str) -> float:
    return float(text.removesuffix("%"))
