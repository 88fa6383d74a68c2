"""A model on the ladder, what was measured of it, and the few models that are open at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snello.measure.guards import Habits
from snello.measure.interval import Interval
from snello.measure.rulers import Reading
from snello.measure.runner import Runner
from snello.measure.sizes import bits_per_weight
from snello.models.spec import Spec
from snello.optimize.gate import Judgement, judge_quality
from snello.optimize.receipts import CostRatio, Evidence, ModelFacts, SequenceSpeed, Speed
from snello.optimize.recipe import Step
from snello.optimize.request import Request

MOST_OPEN = 3  # the original, the best, the one under way


@dataclass(eq=False)
class Candidate:
    """`prefixes`: the models after each step of its chain, so that a later stage can replace the end of it.

    `draft`: who guesses for it; then `model` is the original's, and `steps` are what made the draft.
    """

    name: str
    model: Any
    steps: tuple[Step, ...] = ()
    artifact: Path | None = None
    artifact_sha256: str | None = None
    applied_to: str | None = None
    select: Reading | None = None
    habits: Habits | None = None
    loss: Interval = field(default_factory=lambda: Interval.exact(0.0))
    speedup: Interval = field(default_factory=lambda: Interval.exact(1.0))
    cost: float | None = None  # measured, by the goal
    peak: int | None = None  # the most resident bytes of any run, where the goal is memory
    evidence: Evidence | None = None
    speed: Speed | None = None
    sequences: tuple[SequenceSpeed, ...] = ()  # of an encoder
    costs: tuple[CostRatio, ...] = ()
    prefixes: tuple[Any, ...] = ()
    seconds: float = 0.0
    draft: Candidate | None = None

    @property
    def spec(self) -> Spec:
        return self.model.spec  # type: ignore[no-any-return]

    @property
    def digest(self) -> str:
        return str(self.model.digest)

    @property
    def is_original(self) -> bool:
        return not self.steps

    def base_for(self, steps: tuple[Step, ...]) -> tuple[Any, tuple[Step, ...], tuple[Any, ...]]:
        """The model that these steps start from: a technique stands once in a chain, so a later use replaces it."""
        used = {step.use for step in steps}
        keep = next((i for i, step in enumerate(self.steps) if step.use in used), len(self.steps))
        models = (self.prefixes[0], *self.prefixes[1:]) if self.prefixes else (self.model,)
        return models[keep], self.steps[:keep], models[: keep + 1]


def refused_for_quality(request: Request, one: Candidate) -> Judgement | None:
    """The gate's judgement where quality alone decides, of something measured."""
    evidence = one.evidence
    assert evidence is not None
    failures = evidence.guards.failed if request.strict else ()
    return judge_quality(evidence.loss, request.max_loss, strict_failures=failures, metric=evidence.metric)


def within_budget(request: Request, one: Candidate) -> bool:
    return refused_for_quality(request, one) is None


def facts(candidate: Candidate, weights_bytes: int) -> ModelFacts:
    model = candidate.model
    return ModelFacts(
        name=str(model.name),
        digest=candidate.digest,
        spec_digest=model.spec.digest,
        num_parameters=model.num_parameters,
        weights=model.spec.default_format.weights,
        weights_bytes=weights_bytes,
        bits_per_weight=bits_per_weight(weights_bytes, model.spec),
    )


class Runners:
    """Opened models by digest; the one that was not used for longest is closed when there are too many."""

    def __init__(self, open_model: Callable[[Any], Runner]) -> None:
        self._open = open_model
        self._runners: dict[str, Runner] = {}

    def __call__(self, candidate: Candidate) -> Runner:
        runner = self._runners.pop(candidate.digest, None)
        if runner is None:
            while len(self._runners) >= MOST_OPEN:
                self._runners.pop(next(iter(self._runners))).close()
            runner = self._open(candidate.model)
        self._runners[candidate.digest] = runner
        return runner

    def weights_bytes(self, candidate: Candidate) -> int:
        """That it holds, the draft's included."""
        own = self(candidate).weights_bytes
        return own if candidate.draft is None else own + self(candidate.draft).weights_bytes

    def drop(self, candidate: Candidate) -> None:
        """Closes a model that will not be asked again."""
        runner = self._runners.pop(candidate.digest, None)
        if runner is not None:
            runner.close()

    def close(self) -> None:
        for runner in self._runners.values():
            runner.close()
        self._runners.clear()
