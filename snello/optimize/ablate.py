"""What each part of the final chain is worth: the chain without it is made, read, and timed beside the chain itself.
And whether the chain was worth it: it is timed in turn beside each single step whose own speed-up comes near.

Only for chains of two parts or more, after the proof and within what is left of the time budget; what does not fit is
named as not measured. An INT8 cache that was added to a quantized model is a part of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from snello.errors import Unsupported
from snello.measure import quality
from snello.measure.timing import Ratio
from snello.models.spec import Spec
from snello.optimize.candidate import Candidate, within_budget
from snello.optimize.events import Event, StageStarted
from snello.optimize.make import make
from snello.optimize.receipts import Ablation, Duel
from snello.optimize.recipe import Stage, Step, describe
from snello.techniques.base import Trains

if TYPE_CHECKING:
    from snello.optimize.climb import Climb

Run: TypeAlias = Generator[Event, None, Any]
QUADS = 4


@dataclass(frozen=True)
class Ablated:
    """`missing`: parts and single steps that were not measured, with the reason."""

    rows: tuple[Ablation, ...] = ()
    duels: tuple[Duel, ...] = ()
    missing: tuple[str, ...] = ()


def parts_of(steps: Sequence[Step], original: Spec) -> list[tuple[str, tuple[Step, ...]]]:
    """Each part's name and the chain without it; none for a chain of one part. What heals the chain's beginning goes
    with it: without that there is nothing to heal.
    """
    own = original.default_format.weights
    found: list[tuple[str, tuple[Step, ...]]] = []
    for number, step in enumerate(steps):
        rest = (*steps[:number], *steps[number + 1 :])
        if number == 0 and rest and isinstance(rest[0].technique, Trains):
            found += [(f"{describe(step)}, {describe(rest[0])}", rest[1:])] if rest[1:] else []
            continue
        cache = step.options.get("cache") if step.options.get("weights", own) != own else None
        bare = Step(step.use, {key: value for key, value in step.options.items() if key != "cache"})
        if cache is None or own not in ("bf16", "fp16"):
            found.append((describe(step), rest))
            continue
        only = Step(step.use, {"weights": own, "cache": cache})
        found.append((describe(bare), (*steps[:number], only, *steps[number + 1 :])))
        found.append((f"{cache} kv cache", (*steps[:number], bare, *steps[number + 1 :])))
    return found if len(found) > 1 else []


def ablate(climb: Climb) -> Run:
    """The final chain without each of its parts, and beside the best single steps."""
    if climb.request.recipe.replay is not None:
        return Ablated(missing=("the ablation: a replay does what was recorded",))
    rows: list[Ablation] = []
    duels: list[Duel] = []
    missing: list[str] = []
    chain = parts_of(climb.best.steps, climb.original.spec)
    for name, steps in chain:
        stage = Stage(f"without {name}", steps)
        found = yield from _if_it_fits(climb, stage, _without(climb, name, stage), missing)
        rows += [found] if found is not None else []
    for rival in near_singles(climb) if chain else ():
        stage = Stage(rival.name, rival.steps)
        found = yield from _if_it_fits(climb, stage, _beside(climb, stage), missing)
        duels += [found] if found is not None else []
    return Ablated(tuple(rows), tuple(duels), tuple(missing))


def near_singles(climb: Climb) -> list[Candidate]:
    """Single steps within the budget whose speed-up over the original is not clearly below the chain's."""
    return [
        one
        for one in climb.judged
        if not parts_of(one.steps, climb.original.spec)
        and within_budget(climb.request, one)
        and one.speedup.high >= climb.best.speedup.low
    ]


def _if_it_fits(climb: Climb, stage: Stage, measure: Run, missing: list[str]) -> Run:
    """The measurement's result; None, and why in `missing`, where it does not fit the time or is refused."""
    made = _shared(stage.steps, climb.best.steps)  # their folders are there: they belong to the chain
    predicted, left = climb.forecast.stage(stage, climb.best.speedup.mid, made=made), climb.worker.left_seconds
    if predicted > left:
        missing.append(f"the chain beside {stage.name}: needs about {predicted:.0f} s, {max(0.0, left):.0f} left")
        return None
    yield StageStarted(index=climb.ledger.next_index, stage=stage.name, predicted_seconds=predicted)
    try:
        return (yield from measure)
    except Unsupported as error:
        missing.append(f"the chain beside {stage.name}: {error.message}")
        return None


def _shared(some: Sequence[Step], others: Sequence[Step]) -> int:
    """So many of the first steps are the same."""
    same = (one.resolved() == other.resolved() for one, other in zip(some, others, strict=False))
    return sum(itertools.takewhile(bool, same))


def _beside(climb: Climb, stage: Stage) -> Run:
    examiner, original = climb.examiner, climb.original
    rival = Candidate(name=stage.name, model=original.model, steps=stage.steps, prefixes=original.prefixes)
    yield from make(examiner, stage, rival)
    timed: Ratio = yield from examiner.ratio(rival, climb.best, climb.request.goal, stage.name)
    examiner.runners.drop(rival)
    return Duel(single=stage.name, gain=timed.interval.inverse(), steady=timed.steady)


def _without(climb: Climb, name: str, stage: Stage) -> Run:
    examiner, original, best = climb.examiner, climb.original, climb.best
    goal, blocks = climb.request.goal, examiner.texts.blocks("select")
    less = Candidate(name=stage.name, model=original.model, steps=stage.steps, prefixes=original.prefixes)
    yield from make(examiner, stage, less)
    reading = yield from examiner.read(less, "select", stage.name)
    assert original.select is not None and best.select is not None
    loss = quality.compare(examiner.ruler, original.select, reading, blocks, seed=examiner.seed).loss
    added = examiner.change(original.select, reading, best.select, blocks)
    timed: Ratio = yield from examiner.ratio(less, best, goal, stage.name, quads=QUADS)
    over: Ratio = yield from examiner.ratio(original, less, goal, stage.name, quads=QUADS)
    examiner.runners.drop(less)
    gain = timed.interval.inverse()
    return Ablation(
        without=name,
        speedup=over.interval.inverse(),
        loss=loss,
        note="on the selection text" + ("" if timed.steady and over.steady else "; too noisy to say by how much"),
        gain=gain,
        added=added,
        speed_share=_share(math.log(gain.mid), math.log(best.speedup.mid)),
        loss_share=_share(added.mid, best.loss.mid) if best.loss.low > 0 else None,
    )


def _share(part: float, whole: float) -> float | None:
    """None where the whole is next to nothing."""
    return part / whole if abs(whole) > 1e-9 else None
