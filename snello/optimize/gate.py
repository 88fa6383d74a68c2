"""The gate: from measurements to a verdict and a reason. Pure functions; everything measured comes in as numbers.

A stage is kept only if the upper bound of its loss is within the budget, the upper bound of its cost ratio over the
best until then is at most 0.97, and no other goal became over 10% worse than the original's. "cannot tell" is a verdict
too: a ratio that is still not known to 1.5% when the tries are used up, and whose interval includes 0.97, is neither
kept nor called slow. A stage of the same formats as the best costs the same, so there only the loss is left to differ:
it takes the best's place if it loses measurably less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from snello.measure.interval import Interval
from snello.measure.limits import above, below, exact, percent
from snello.measure.timing import Ratio
from snello.optimize.events import Verdict

PAYS = 0.97
WORSE = 1.10


@dataclass(frozen=True)
class Judgement:
    """`margin`: how near the decision was, in words."""

    verdict: Verdict
    reason: str
    margin: str = ""


def judge_quality(
    loss: Interval,
    max_loss: float,
    *,
    strict_failures: Sequence[str] = (),
    metric: Interval | None = None,
) -> Judgement | None:
    """A judgement where quality alone decides; None where the stage may stay as far as quality goes."""
    high = above(loss.high, max_loss) if loss.high > max_loss else percent(loss.high)
    margin = f"loss at most {high}, budget {exact(max_loss)}"
    if not math.isfinite(loss.mid):
        return Judgement("dropped", "its loss is not finite", margin)
    if not math.isfinite(loss.high):
        return Judgement("cannot tell", "too few documents to bound the loss", margin)
    if loss.high > max_loss:
        if loss.mid <= max_loss:
            return Judgement("dropped", f"at most {high} is over {exact(max_loss)}", margin)
        return Judgement("dropped", f"over {exact(max_loss)}", margin)
    if metric is not None and metric.high > max_loss:
        most = above(metric.high, max_loss)
        return Judgement("dropped", f"your metric loses up to {most}, over {exact(max_loss)}", margin)
    if strict_failures:
        return Judgement("dropped", f"strict: {strict_failures[0]}", margin)
    return None


def judge_cost(goal: str, gain: Ratio, others: Mapping[str, float]) -> Judgement:
    """`gain`: cost over the best until then, by the goal; `others`: cost ratios over the original, by other goals."""
    ratio = gain.interval
    margin = f"{goal} ratio {ratio.mid:.3f} ({ratio.low:.3f}-{ratio.high:.3f}), pays at {PAYS}"
    if not gain.steady and ratio.low <= PAYS < ratio.high:
        return Judgement("cannot tell", f"{goal}: too noisy to say", margin)
    if ratio.low > 1:
        return Judgement("dropped", f"{goal} is {percent(ratio.mid - 1)} worse", margin)
    if ratio.high > PAYS:
        surely = below(max(0.0, 1 - ratio.high), 1 - PAYS)
        if ratio.mid <= PAYS:
            found = f"gains {percent(1 - ratio.mid)}, surely {surely}"
        else:
            found = f"gains {below(max(0.0, 1 - ratio.mid), 1 - PAYS)}"
        return Judgement("dropped", f"{found}, needs {exact(1 - PAYS)}", margin)
    for name, other in others.items():
        if other > WORSE:
            return Judgement("dropped", f"{name} is {percent(other - 1)} worse", margin)
    return Judgement("kept", "", margin)


def judge_equal(best: str, change: Interval) -> Judgement:
    """A stage that costs exactly what the best does. `change`: its loss minus the best's, one-sided 95% bounds."""
    margin = f"loss {change.mid:+.2%} over {best}'s, at most {change.high:+.2%}; taken below 0"
    if change.high < 0:
        return Judgement("kept", "loses less at the same cost", margin)
    return Judgement("dropped", f"costs the same as {best} and does not lose measurably less", margin)
