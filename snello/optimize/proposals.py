"""What the search may try, as one literal list of phases in their order: prune, quantize.

A phase offers steps. The search puts each behind the original, and behind the few chains that earlier phases left over.
The INT8 cache comes last, on top of what was kept. Nothing here trains: that takes minutes to hours and much text, so
it is for recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from snello.models.spec import BITS, Attention, Spec
from snello.optimize.recipe import Stage, Step
from snello.techniques.prune import shapes
from snello.techniques.table import TECHNIQUES

FFN = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2))
LAYERS = (Fraction(1, 8), Fraction(1, 4))
HEADS = (Fraction(1, 4), Fraction(1, 2))
NOTHING = {"ffn": 0.0, "heads": 0.0, "width": 0.0, "layers": 0.0}


@dataclass(frozen=True)
class Offer:
    """One step. `milder`: the label of the offer that does less of the same; where that lost too much, so will this."""

    label: str
    step: Step
    milder: str = ""


@dataclass(frozen=True)
class Subject:
    """What is made lean, and by which goal.

    `grid`: the group size of four-bit integers that the weights were read from (`Model.grid`); 0: none.
    """

    spec: Spec
    goal: str
    grid: int = 0


Offers = Callable[[Subject], tuple[Offer, ...]]


def prune_offers(subject: Subject) -> tuple[Offer, ...]:
    """Channels first: they cost least for what they save. Heads where keys and values count, which they shrink."""
    spec = subject.spec
    kinds: list[tuple[str, tuple[Fraction, ...]]] = [("ffn", FFN), ("layers", LAYERS)]
    if subject.goal != "latency" and spec.causal:
        kinds.append(("heads", HEADS))
    return tuple(offer for kind, fractions in kinds for offer in _fractions(spec, kind, fractions))


def _fractions(spec: Spec, kind: str, fractions: Sequence[Fraction]) -> list[Offer]:
    """Ascending; a fraction that would remove less than one is raised to one, and none comes to the same twice."""
    count = max(2, _count(spec, kind))
    chosen = sorted({Fraction(max(1, int(count * fraction)), count): fraction for fraction in fractions})
    offers: list[Offer] = []
    for fraction in chosen:
        step = Step("prune", {**NOTHING, kind: _upwards(fraction)})
        offers.append(Offer(f"{kind} {fraction}", step, offers[-1].label if offers else ""))
    return offers


def _count(spec: Spec, kind: str) -> int:
    """Of how many one goes at the least."""
    mixer = spec.layers[0].mixer
    if kind == "layers":
        return len(spec.layers)
    if kind == "heads" and isinstance(mixer, Attention):
        return max(mixer.num_kv_heads, mixer.num_heads // mixer.num_kv_heads)
    width = spec.layers[0].feed_forward.width
    return width // shapes.step(width)


def _upwards(fraction: Fraction) -> float:
    """As a float that is not below it: 1/6 of six layers must be one layer."""
    return -(-fraction.numerator * 10_000 // fraction.denominator) / 10_000


def quantize_offers(subject: Subject) -> tuple[Offer, ...]:
    """Cheap and sure first, then fewer bits with more effort.

    Three bits only by GPTQ: the other methods lose too much with them (docs/quantize.md).

    Rounding without another basis finds the integers of a grid again, which loses a third of what rounding anew does
    (docs/models.md).

    HQQ and SmoothQuant are for recipes: what they make runs as fast as what `rtn` makes, and on every model measured
    HQQ diverges more and SmoothQuant as much (docs/decisions.md), so a stage of theirs only takes time from others.
    """
    own = subject.spec.default_format.weights
    offers = [_quantize("bf16", weights="bf16")] if BITS[own] > 16 else []
    offers.append(_quantize("int8", weights="int8"))
    if subject.grid:
        found: dict[str, Any] = {"weights": "int4", "group_size": subject.grid, "rotate": False, "equalize": False}
        offers.append(_quantize("int4, the checkpoint's own grid", **found))
    offers += [_quantize(f"int4, {m}", weights="int4", method=m) for m in ("rtn", "gptq", "awq")]
    offers += [_quantize(f"mixed {b} bits", weights="mixed", budget=f"{b:g} bits", method="gptq") for b in (5.0, 6.0)]
    offers.append(_quantize("int3, gptq", milder="int4, gptq", weights="int3", method="gptq"))
    return tuple(offers)


def _quantize(label: str, *, milder: str = "", **options: object) -> Offer:
    return Offer(label, Step("quantize", options), milder)


PHASES: tuple[Offers, ...] = (prune_offers, quantize_offers)


def drafts(subject: Subject) -> tuple[Stage, ...]:
    """Who might guess for the original: few bits are quick and mostly right, and what they lose costs nothing."""
    few = [o for o in quantize_offers(subject) if o.step.options["weights"] in ("int4", "int3")]
    return tuple(stage_of((), "", offer) for offer in few if offer.step.options.get("method") in ("rtn", "gptq"))


def stage_of(base: Sequence[Step], base_name: str, offer: Offer) -> Stage:
    """The chain with one more step, as a stage that is applied to the original: "ffn 1/8 + int4, gptq"."""
    if not base:
        return Stage(f"{offer.step.use} {offer.label}", (offer.step,))
    first, _, rest = base_name.partition(" ")
    return Stage(f"{rest if first in TECHNIQUES else base_name} + {offer.label}", (*base, offer.step))


def cache_stage(spec: Spec, best: Sequence[Step]) -> Stage | None:
    """INT8 keys and values on top of the best chain; None where the cache is INT8 already or there is none."""
    if not spec.causal or any(step.options.get("cache") for step in best):
        return None
    steps = list(best)
    for number, step in enumerate(steps):
        if step.use == "quantize":
            steps[number] = Step("quantize", {**step.options, "cache": "int8"})
            return Stage("int8 kv cache", tuple(steps))
    own = spec.default_format.weights
    if own not in ("bf16", "fp16"):
        return None
    return Stage("int8 kv cache", (*steps, Step("quantize", {"weights": own, "cache": "int8"})))
