"""What a stage should cost, and what is not worth trying.

A candidate's cost is predicted from the ceiling of its *planned* spec, times what measured models take over theirs
(`Overhead`). One whose prediction cannot beat what is kept is never run, nor one whose steps alone lost more than the
budget together. One that would have the same formats as what is kept costs the same and can only lose less; it is run
where the stages that may still pay fit beside it. Time is predicted per stage and corrected by the stages that are
done; no stage starts that does not fit into what is left after the proof's share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from snello.errors import Unsupported
from snello.measure.limits import above, exact, percent
from snello.measure.machine import Ceiling, Machine, ceiling
from snello.measure.sizes import cache_bytes, linear_bytes, num_weights, weights_bytes
from snello.measure.speed import Workload, lasting
from snello.models.spec import Spec
from snello.optimize.gate import PAYS
from snello.optimize.recipe import Stage, Step
from snello.techniques.base import wanted_tokens

# per billion weights, before any was measured: by method, where a technique has none by its name
APPLY_SECONDS = {"rtn": 40.0, "hqq": 150.0, "smoothquant": 400.0, "awq": 500.0, "gptq": 700.0, "prune": 1500.0}
DOUBT = 0.95  # a prediction this much better than expected must not pay either before a stage is left out
SENSITIVITY_SECONDS = 1200.0
TRAIN_SECONDS, CONTROL_SECONDS = 0.06, 0.04  # per token: with the teacher's answers, and on the text alone
TIMED_RUNS = 30  # of the goal's workload, per judged stage
Plan = Callable[[Step, Spec], Spec]


@dataclass(frozen=True)
class Prospect:
    """A planned stage: what it would be, and why it is not run if it is not."""

    stage: Stage
    spec: Spec | None
    speedup: float
    bytes: int
    reason: str = ""


def planned_spec(stage: Stage, base: Spec, plan: Plan) -> Spec:
    spec = base
    for step in stage.steps:
        spec = plan(step, spec)
    return spec


def prospect(stage: Stage, base: Spec, original: Spec, goal: Goals, plan: Plan) -> Prospect:
    """What the ceilings promise of a stage, over the original."""
    try:
        spec = planned_spec(stage, base, plan)
    except Unsupported as error:
        return Prospect(stage, None, 1.0, weights_bytes(base), f"{error.message}")
    speedup = goal.predicted(original) / goal.predicted(spec)
    return Prospect(stage, spec, speedup, weights_bytes(spec))


@dataclass(frozen=True)
class Goals:
    """Predicted cost of a spec by the goal, from its ceiling."""

    goal: str
    machine: Machine
    workload: Workload

    def ceiling(self, spec: Spec, streams: int = 1) -> Ceiling:
        work = self.workload
        return ceiling(spec, self.machine, prompt=work.prompt, generate=work.generate, streams=streams)

    def predicted(self, spec: Spec) -> float:
        """Seconds or bytes; no model of this spec can cost less."""
        if self.goal == "memory":
            return float(weights_bytes(spec))
        if self.workload.sequences and self.goal == "throughput":
            return math.exp(sum(map(math.log, self._sequences(spec))) / len(self.workload.sequences))
        if not spec.causal:
            return self.workload.prompt / self.ceiling(spec).prefill_tokens_per_second
        if self.goal == "throughput":
            return 1 / self.ceiling(spec, self.workload.streams).decode_tokens_per_second
        return self.ceiling(spec).seconds(self.workload.prompt, self.workload.generate)

    def _sequences(self, spec: Spec) -> list[float]:
        """Seconds of a sequence of each length."""
        limits = [ceiling(spec, self.machine, prompt=n, generate=1) for n in self.workload.sequences]
        return [n / limit.prefill_tokens_per_second for n, limit in zip(self.workload.sequences, limits, strict=True)]


@dataclass
class Overhead:
    """What measured models cost beside their ceilings; it corrects the predictions of those that were not measured.

    Time takes a multiple of its ceiling; memory takes its weights and a constant (the program, caches). The nearest
    measured models count, those of the same formats, else all of them; of these the least, so that a prediction is
    rather too good than too bad.
    """

    goals: Goals
    _seen: list[tuple[frozenset[str], float]] = field(default_factory=list)

    def learn(self, spec: Spec, cost: float) -> None:
        limit = self.goals.predicted(spec)
        self._seen.append((_formats(spec), cost - limit if self.goals.goal == "memory" else cost / limit))

    def predicted(self, spec: Spec) -> float:
        """The cost to expect, by the goal; before anything was measured, the ceiling."""
        limit = self.goals.predicted(spec)
        alike = [over for formats, over in self._seen if formats == _formats(spec)]
        known = alike or [over for _, over in self._seen]
        if not known:
            return limit
        return limit + min(known) if self.goals.goal == "memory" else limit * min(known)


def _formats(spec: Spec) -> frozenset[str]:
    """Number types of weights and cache, whatever the shapes."""
    return frozenset({spec.default_format.weights, f"cache {spec.cache_format}", *(f.weights for _, f in spec.formats)})


def hopeless(steps: Sequence[Step], alone: Callable[[Step], float | None], max_loss: float) -> str:
    """Why a chain loses too much, by the losses of its steps alone; a forecast for leaving out, never a verdict."""
    losses = [alone(step) for step in steps]
    total = sum(loss for loss in losses if loss is not None)
    if len(steps) < 2 or total <= max_loss or None in losses:
        return ""
    alone_lose = " + ".join(percent(loss or 0.0) for loss in losses)
    return f"its steps alone lose {alone_lose}, together {above(total, max_loss)}, over {exact(max_loss)}"


def why_not_run(
    found: Prospect, best: Spec, best_name: str, best_cost: float | None, goal: Goals, overhead: Overhead | None = None
) -> str:
    """Why a stage could not pay; empty if it could. `best_cost`: measured, by the goal."""
    if found.spec is None:
        return found.reason
    if found.spec.digest == best.digest:
        return f"same formats as {best_name}"
    predicted = goal.predicted(found.spec)
    if best_cost is not None and goal.goal != "memory" and predicted > PAYS * best_cost:
        return f"cannot pay: {best_name} is nearer to the machine's limit than this could come"
    if best_cost is not None and overhead is not None:
        expected = overhead.predicted(found.spec)
        if DOUBT * expected > PAYS * best_cost:
            return f"cannot pay: {best_cost / expected:.2f}x of {best_name} predicted (ceiling, measured overhead)"
    if _bytes(found.spec, goal) >= _bytes(best, goal) and predicted > PAYS * goal.predicted(best):
        return f"cannot pay: no fewer bytes than {best_name}"
    return ""


def _bytes(spec: Spec, goal: Goals) -> int:
    """What one token reads, keys and values included."""
    return linear_bytes(spec) + cache_bytes(spec, goal.workload.prompt)


@dataclass
class Forecast:
    """Seconds that a stage should take; corrected by those that are done, training apart from all else.

    How long a step trains follows from its tokens, whatever the method; how far off that is says nothing about what
    a method costs that trains nothing, nor the other way round.
    """

    weights: int
    score_tokens: int
    score_tokens_per_second: float
    run_seconds: float  # one run of the goal's workload on the original
    _ratios: list[float] = field(default_factory=list)  # real over predicted, of stages that train nothing
    _trained: list[float] = field(default_factory=list)  # the same of what the others train

    def stage(self, stage: Stage, speedup: float = 1.0, *, timed: bool = True, made: int = 0) -> float:
        """`made`: so many of its first steps are done already."""
        apply = sum(self._apply(step) for step in stage.steps[made:])
        score = 1.3 * self.score_tokens / self.score_tokens_per_second
        runs = TIMED_RUNS * self.run_seconds / 2 * (1 + 1 / max(speedup, 0.1)) if timed else 0.0
        training = _median(self._trained) * self._training(stage, made)
        return _median(self._ratios) * (2.0 + apply + score + runs) + training

    def proof(self, tokens: int) -> float:
        return 2.0 + 2.3 * tokens / self.score_tokens_per_second + TIMED_RUNS * self.run_seconds

    def learn(self, stage: Stage, predicted: float, real: float, *, made: int = 0) -> None:
        """A finished stage corrects the rest, by the median of real over predicted. One that trained corrects what is
        foreseen of training, by what is left of its time once the rest of it is taken as foreseen.
        """
        training, others = self._training(stage, made), self._ratios
        if training > 0:
            rest = predicted - _median(self._trained) * training
            self._trained.append(max(0.0, real - rest) / training)
        else:
            others.append(real / max(predicted / _median(others), 1e-9))

    def _training(self, stage: Stage, made: int) -> float:
        tokens = sum(wanted_tokens(step.technique) for step in stage.steps[made:])
        return self.weights / 1e9 * tokens * (TRAIN_SECONDS + CONTROL_SECONDS)

    def _apply(self, step: Step) -> float:
        """Of a step that trains nothing."""
        billions = self.weights / 1e9
        if wanted_tokens(step.technique) > 0:
            return 0.0
        method = str(step.options.get("method", "rtn"))
        seconds = APPLY_SECONDS.get(step.use, APPLY_SECONDS.get(method, APPLY_SECONDS["gptq"]))
        mixed = SENSITIVITY_SECONDS if step.options.get("weights") == "mixed" else 0.0
        return billions * (seconds + mixed)


def _median(ratios: Sequence[float]) -> float:
    """The upper one of two in the middle: rather too long than too short. One before anything is known."""
    return sorted(ratios)[len(ratios) // 2] if ratios else 1.0


def forecast_for(
    spec: Spec, goal: Goals, score_tokens: int, speed: float | None, run_seconds: float | None
) -> Forecast:
    """From measurements where there are any, else from the ceilings at a fifth of their speed."""
    limit = goal.ceiling(spec)
    tokens_per_second = speed or limit.prefill_tokens_per_second / 5
    seconds = lasting(run_seconds or 2 * limit.seconds(goal.workload.prompt, goal.workload.generate))
    return Forecast(num_weights(spec), score_tokens, tokens_per_second, seconds)
