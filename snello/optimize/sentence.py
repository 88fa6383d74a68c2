"""The one sentence at the end, that a sceptic can check: how much faster, how much smaller, how much worse at most."""

from __future__ import annotations

import math

from snello.measure.answers import Sameness
from snello.measure.interval import Interval

FASTER = {"latency": "faster", "throughput": "more tokens a second", "memory": "less memory"}


def speedup(goal: str, found: Interval, *, sequences: bool = False) -> str:
    """ "1.9x faster (1.8-2.0)"; an encoder has `sequences` a second, not tokens."""
    digits = 1 if found.half_width >= 0.01 or found.mid >= 10 else 2
    what = "more sequences a second" if sequences and goal == "throughput" else FASTER[goal]
    return f"{found.mid:.{digits}f}x {what} ({found.low:.{digits}f}-{found.high:.{digits}f})"


def at_most(loss: float) -> str:
    """An upper bound, rounded up to one digit after the point (two under 0.1%)."""
    if loss <= 0:
        return "0.0%"
    digits = 1 if loss >= 0.001 else 2
    return f"{math.ceil(100 * loss * 10**digits - 1e-9) / 10**digits:.{digits}f}%"


def proved(
    *,
    goal: str,
    found: Interval,
    size_ratio: float,
    loss: Interval,
    measure: str,
    agreement: float | None,
    answers: str = "next words",
    neighbours: float | None = None,
    tokens: int,
    unit: str,
    self_written: bool,
    sequences: bool = False,
) -> str:
    """The sentence of a run that was proved."""
    text = "text that the model wrote itself" if self_written else "your text"
    parts = [f"{speedup(goal, found, sequences=sequences)}, {size_ratio:.1f}x smaller"]
    worse = f"on {text} at most {at_most(loss.high)} {_worse(measure)} (95%)"
    parts += [worse, *_same(agreement, answers, neighbours), f"proved on {tokens:,} unseen {unit}"]
    return "; ".join(parts)


def checked(
    head: str,
    *,
    loss: Interval,
    measure: str,
    agreement: float | None,
    answers: str,
    neighbours: float | None,
    read: str,
) -> str:
    """The sentence on what was made elsewhere. `head`: within the budget or not."""
    worse = f"at most {at_most(loss.high)} {_worse(measure)} (95%)"
    return "; ".join([head, worse, *_same(agreement, answers, neighbours), f"judged on {read}"])


def _same(agreement: float | None, answers: str, neighbours: float | None) -> list[str]:
    parts = [] if agreement is None else [f"{_share(agreement)} of {answers} the same"]
    return parts if neighbours is None else [*parts, f"{_share(neighbours)} of nearest neighbours the same"]


def lossless(*, goal: str, found: Interval, same: Sameness, weights: float) -> str:
    """The sentence of an original with a draft. `weights`: bytes of both over the original's."""
    parts = [
        f"{speedup(goal, found)}, with the original's own answers",
        f"loss 0 by construction: {same.answers:,} answers of {same.tokens:,} tokens, half greedy and half drawn, all "
        "the same",
        f"holds both models: {weights:.1f}x the weights in memory",
    ]
    return "; ".join(parts)


def _worse(measure: str) -> str:
    return {"loss": "worse", "accuracy points": "less accurate", "AUC points": "less AUC"}.get(
        measure, "away by cosine"
    )


def _share(value: float) -> str:
    """0.969 -> "97%", but never "100%" for less than all."""
    rounded = round(100 * value)
    return f"{100 * value:.2f}%" if rounded == 100 and value < 1 else f"{rounded}%"
