"""What to try, in which order, what it should cost, and what is not worth trying.

Without a recipe there is one fixed list. A candidate's speed is predicted from the ceiling of its *planned* spec, so a
stage that cannot pay is never run: not even at its ceiling would it beat the best so far. One that would have the same
formats as what is kept costs the same and can only lose less; it is run where the stages that may still pay fit beside
it. Time is predicted per stage and corrected by the stages that are done; no stage starts that does not fit into what
is left after the proof's share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from snello.errors import Unsupported
from snello.measure.machine import Ceiling, Machine, ceiling
from snello.measure.sizes import cache_bytes, linear_bytes, num_weights, weights_bytes
from snello.measure.speed import Workload
from snello.models.spec import BITS, Spec
from snello.optimize.gate import PAYS
from snello.optimize.recipe import Stage, Step
from snello.techniques.base import wanted_tokens

# per billion weights, before any was measured
APPLY_SECONDS = {"rtn": 40.0, "hqq": 150.0, "smoothquant": 400.0, "awq": 500.0, "gptq": 700.0}
SENSITIVITY_SECONDS = 600.0
TRAIN_SECONDS, CONTROL_SECONDS = 0.06, 0.04  # per token: with the teacher's answers, and on the text alone
TIMED_RUNS = 30  # of the goal's workload, per judged stage
Plan = Callable[[Step, Spec], Spec]


def default_stages(spec: Spec) -> tuple[Stage, ...]:
    """The fixed list: cheap and sure first, then fewer bits with more effort.

    HQQ and SmoothQuant are for recipes: what they make runs as fast as what `rtn` makes, and on every model measured
    HQQ diverges more and SmoothQuant as much (docs/decisions.md), so a stage of theirs only takes time from others.
    """
    own = spec.default_format.weights
    stages = [_quantize("bf16", weights="bf16")] if BITS[own] > 16 else []
    stages.append(_quantize("int8", weights="int8"))
    stages += [_quantize(f"int4, {m}", weights="int4", method=m) for m in ("rtn", "gptq", "awq")]
    stages += [_quantize(f"mixed {b} bits", weights="mixed", bits=b, method="gptq") for b in (5.0, 6.0)]
    return tuple(stages)


def _quantize(name: str, **options: object) -> Stage:
    return Stage(f"quantize {name}", (Step("quantize", options),))


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
        if not spec.causal:
            return self.workload.prompt / self.ceiling(spec).prefill_tokens_per_second
        if self.goal == "throughput":
            return 1 / self.ceiling(spec, self.workload.streams).decode_tokens_per_second
        return self.ceiling(spec).seconds(self.workload.prompt, self.workload.generate)


def why_not_run(found: Prospect, best: Spec, best_name: str, best_cost: float | None, goal: Goals) -> str:
    """Why a stage could not pay; empty if it could. `best_cost`: measured, by the goal."""
    if found.spec is None:
        return found.reason
    if found.spec.digest == best.digest:
        return f"same formats as {best_name}"
    predicted = goal.predicted(found.spec)
    if best_cost is not None and goal.goal != "memory" and predicted > PAYS * best_cost:
        return f"cannot pay: {best_name} is nearer to the machine's limit than this could come"
    if _bytes(found.spec, goal) >= _bytes(best, goal) and predicted > PAYS * goal.predicted(best):
        return f"cannot pay: no fewer bytes than {best_name}"
    return ""


def _bytes(spec: Spec, goal: Goals) -> int:
    """What one token reads, keys and values included."""
    return linear_bytes(spec) + cache_bytes(spec, goal.workload.prompt)


@dataclass
class Forecast:
    """Seconds that a stage should take; corrected by those that are done."""

    weights: int
    score_tokens: int
    score_tokens_per_second: float
    run_seconds: float  # one run of the goal's workload on the original
    factor: float = 1.0
    _ratios: list[float] = field(default_factory=list)

    def stage(self, stage: Stage, speedup: float = 1.0, *, timed: bool = True) -> float:
        apply = sum(self._apply(step) for step in stage.steps)
        score = 1.3 * self.score_tokens / self.score_tokens_per_second
        runs = TIMED_RUNS * self.run_seconds / 2 * (1 + 1 / max(speedup, 0.1)) if timed else 0.0
        return self.factor * (2.0 + apply + score + runs)

    def proof(self, tokens: int) -> float:
        return 2.0 + 2.3 * tokens / self.score_tokens_per_second + TIMED_RUNS * self.run_seconds

    def learn(self, predicted: float, real: float) -> None:
        """A finished stage corrects the rest, by the median of real over predicted."""
        self._ratios.append(real / max(predicted / self.factor, 1e-9))
        self.factor = sorted(self._ratios)[len(self._ratios) // 2]

    def _apply(self, step: Step) -> float:
        billions = self.weights / 1e9
        if (tokens := wanted_tokens(step.technique)) > 0:
            return billions * tokens * (TRAIN_SECONDS + CONTROL_SECONDS)
        seconds = APPLY_SECONDS.get(str(step.options.get("method", "rtn")), APPLY_SECONDS["gptq"])
        mixed = SENSITIVITY_SECONDS if step.options.get("weights") == "mixed" else 0.0
        return billions * (seconds + mixed)


def forecast_for(
    spec: Spec, goal: Goals, score_tokens: int, speed: float | None, run_seconds: float | None
) -> Forecast:
    """From measurements where there are any, else from the ceilings at a fifth of their speed."""
    limit = goal.ceiling(spec)
    tokens_per_second = speed or limit.prefill_tokens_per_second / 5
    seconds = run_seconds or 2 * limit.seconds(goal.workload.prompt, goal.workload.generate)
    return Forecast(num_weights(spec), score_tokens, tokens_per_second, seconds)
