"""What each part of the final chain is worth: the chain without it is made, read, and timed beside the chain itself.

Only for chains of two parts or more, after the proof and within what is left of the time budget; a part that does not
fit is named as not measured. An INT8 cache that was added to a quantized model is a part of its own.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from snello.errors import Unsupported
from snello.measure import quality
from snello.measure.timing import Ratio
from snello.models.spec import Spec
from snello.optimize.candidate import Candidate
from snello.optimize.events import Event, StageStarted
from snello.optimize.make import make
from snello.optimize.receipts import Ablation
from snello.optimize.recipe import Stage, Step, describe

if TYPE_CHECKING:
    from snello.optimize.climb import Climb

Run: TypeAlias = Generator[Event, None, Any]
QUADS = 4


@dataclass(frozen=True)
class Ablated:
    """`missing`: parts that were not measured, with the reason."""

    rows: tuple[Ablation, ...] = ()
    missing: tuple[str, ...] = ()


def parts_of(steps: Sequence[Step], original: Spec) -> list[tuple[str, tuple[Step, ...]]]:
    """Each part's name and the chain without it; none for a chain of one part."""
    own = original.default_format.weights
    found: list[tuple[str, tuple[Step, ...]]] = []
    for number, step in enumerate(steps):
        rest = (*steps[:number], *steps[number + 1 :])
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
    """The final chain without each of its parts."""
    if climb.request.recipe.replay is not None:
        return Ablated(missing=("the ablation: a replay does what was recorded",))
    rows: list[Ablation] = []
    missing: list[str] = []
    for name, steps in parts_of(climb.best.steps, climb.original.spec):
        stage = Stage(f"without {name}", steps)
        predicted, left = climb.forecast.stage(stage, climb.best.speedup.mid), climb.worker.left_seconds
        if predicted > left:
            missing.append(f"the chain without {name}: needs about {predicted:.0f} s, {max(0.0, left):.0f} left")
            continue
        yield StageStarted(index=climb.ledger.next_index, stage=stage.name, predicted_seconds=predicted)
        try:
            rows.append((yield from _without(climb, name, stage)))
        except Unsupported as error:
            missing.append(f"the chain without {name}: {error.message}")
    return Ablated(tuple(rows), tuple(missing))


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
