"""Mixed bits under a budget: what a budget says, the widths that a unit can have, and which are chosen.

Linears that share an input form a unit and always have one format, since the input is prepared once for all of them.
A unit has three, four or eight bits, or keeps the model's own type. From the divergence that each width costs, units
move up where a byte saves most. Only widths on the lower convex hull of (bytes, divergence) are taken, so the steps of
all units stand in one order, and what is chosen is the best there is at its own number of bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from snello.errors import SnelloError, Unsupported
from snello.models import packed
from snello.models.sizes import packed_bytes
from snello.models.spec import Format, Spec, WeightFormat, linear_shape
from snello.techniques.units import Unit, body_linears, units

Ladder: TypeAlias = Sequence[Format]  # from few bits to many
Divergence: TypeAlias = Mapping[str, Mapping[WeightFormat, float]]  # by input of a unit, by width; nats a token

UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*(bits|%|%\s*loss|[kmg]i?b)", re.IGNORECASE)
EXAMPLES = "budget='5 bits' (a weight, on average), '40%' (of the original's bytes), '300MB' (in all) or '1% loss'"


@dataclass(frozen=True)
class Budget:
    """`value`: stored bits a weight, bytes of the whole model, their share of the original's, nats a token."""

    kind: Literal["bits", "bytes", "share", "loss"]
    value: float


def parse_budget(text: object) -> Budget:
    match = PATTERN.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or float(match[1]) == 0:
        raise SnelloError(f"budget={text!r} is no budget", EXAMPLES)
    value, unit = float(match[1]), match[2].lower()
    if unit.endswith("loss"):
        return Budget("loss", math.log1p(value / 100))
    if unit == "%" and value >= 100:
        raise SnelloError(f"budget={text!r} is no less than the original", EXAMPLES)
    if unit in ("bits", "%"):
        return Budget("bits", value) if unit == "bits" else Budget("share", value / 100)
    return Budget("bytes", value * UNITS[unit])


def plan_budget(original: Spec, narrow: Spec, ladder: Ladder, budget: Budget) -> Spec:
    """One way to spend it, in the order of computation; `narrow`: the plan whose blocks have the fewest bits.

    A loss says nothing about bytes before it is measured: eight bits are the most that it may take.
    """
    order = units(narrow, body_linears(narrow))
    if budget.kind == "loss":
        eight = next(format for format in ladder if format.weights == "int8")
        return narrow.with_formats(dict.fromkeys(body_linears(narrow), eight))
    limit = body_limit(original, narrow, budget)
    for wider in ladder[1:]:
        narrow = widen(narrow, wider, order, limit)
    return narrow


def body_limit(original: Spec, narrow: Spec, budget: Budget) -> int:
    """Bytes of the blocks' linears. Raises `Unsupported` where the fewest bits are too many already."""
    body = body_linears(narrow)
    least, rest = stored_bytes(narrow, body), packed.packed_bytes(narrow) - stored_bytes(narrow, body)
    if budget.kind == "bits":
        limit = int(num_weights(narrow, body) * budget.value / 8)
        smallest = f"budget='{math.ceil(10 * average_bits(narrow, body) + 1) / 10:g} bits'"
    else:
        whole = budget.value * (packed.packed_bytes(original) if budget.kind == "share" else 1)
        limit = int(whole) - rest
        smallest = f"budget='{math.ceil((least + rest) / 1e5) / 10:g}MB'"
    if limit < least:
        raise Unsupported(
            f"the budget is below what three bits take in this model, {average_bits(narrow, body):.2f} bits a weight "
            f"with scales and padding, {(least + rest) / 1e6:.1f} MB in all",
            f"{smallest} or more, or a larger group size",
        )
    return limit


def distribute(planned: Spec, ladder: Ladder, divergence: Divergence, budget: Budget) -> Spec:
    """The planned bytes spent anew, or as few as the loss allows: steps up, first where they save most per byte."""
    body = body_linears(planned)
    spec = planned.with_formats(dict.fromkeys(body, ladder[0]))
    grouped = units(spec, body)
    steps = [step for unit in grouped for step in hull_steps(spec, unit, ladder, divergence[unit.input])]
    lost = sum(divergence[unit.input][ladder[0].weights] for unit in grouped)
    left = stored_bytes(planned, body) - stored_bytes(spec, body)
    chosen, stuck = dict[str, Format](), set[Unit]()
    for step in sorted(steps, key=lambda step: step.gain / step.extra, reverse=True):
        if budget.kind == "loss" and lost <= budget.value:
            break
        if step.extra > left or step.unit in stuck:
            stuck.add(step.unit)
            continue
        left, lost = left - step.extra, lost - step.gain
        chosen |= dict.fromkeys(step.unit.linears, step.to)
    if budget.kind == "loss" and lost > budget.value:
        expected, allowed = math.expm1(lost), math.expm1(budget.value)
        raise Unsupported(
            f"eight bits everywhere are expected to lose {expected:.2%}, more than {allowed:.2%}",
            "allow more, or keep the model as it is",
        )
    return spec.with_formats(chosen)


@dataclass(frozen=True)
class StepUp:
    unit: Unit
    to: Format
    extra: int  # bytes
    gain: float  # nats


def hull_steps(spec: Spec, unit: Unit, ladder: Ladder, divergence: Mapping[WeightFormat, float]) -> list[StepUp]:
    """Steps along the lower convex hull, so that each gains less per byte than the one before."""
    shapes = [linear_shape(spec, linear) for linear in unit.linears]
    sizes = [sum(packed_bytes(format, *shape) for shape in shapes) for format in ladder]
    steps, at = list[StepUp](), 0
    while at + 1 < len(ladder):
        here = divergence[ladder[at].weights]
        ahead = [
            StepUp(unit, ladder[i], sizes[i] - sizes[at], here - divergence[ladder[i].weights])
            for i in range(at + 1, len(ladder))
        ]
        best = max(ahead, key=lambda step: step.gain / step.extra)
        if best.gain <= 0:
            break
        steps.append(best)
        at = ladder.index(best.to)
    return steps


def stored_bytes(spec: Spec, linears: Sequence[str]) -> int:
    return sum(packed_bytes(spec.format(linear), *linear_shape(spec, linear)) for linear in linears)


def num_weights(spec: Spec, linears: Sequence[str]) -> int:
    return sum(math.prod(linear_shape(spec, linear)) for linear in linears)


def average_bits(spec: Spec, linears: Sequence[str]) -> float:
    """Stored bits, scales and padding included, per true weight."""
    return 8 * stored_bytes(spec, linears) / num_weights(spec, linears)


def widen(spec: Spec, wider: Format, order: Sequence[Unit], limit: int) -> Spec:
    """Units in this order get the wider format where the blocks' bytes stay within the limit."""
    used, chosen = stored_bytes(spec, body_linears(spec)), dict[str, Format]()
    for unit in order:
        widened = spec.with_formats(dict.fromkeys(unit.linears, wider))
        extra = stored_bytes(widened, unit.linears) - stored_bytes(spec, unit.linears)
        if used + extra <= limit:
            used += extra
            chosen |= dict.fromkeys(unit.linears, wider)
    return spec.with_formats(chosen)
