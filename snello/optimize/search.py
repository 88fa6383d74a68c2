"""The search: phases in their order, a narrow beam of chains from one to the next.

Each phase is tried on the original first, step by step; what its steps lose alone is then known. Then it is tried
behind the chains of the beam, the one that should cost least first, and without those that cannot pay or whose steps
alone lost more than the budget together. Forecasts choose the order and what is left out; the gate judges what is run,
always against the original and the best so far.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from snello.measure.limits import above, exact
from snello.optimize.candidate import Candidate, within_budget
from snello.optimize.events import Event
from snello.optimize.planner import hopeless, prospect
from snello.optimize.proposals import PHASES, Offer, Offers, cache_stage, stage_of
from snello.optimize.recipe import Stage, Step

if TYPE_CHECKING:
    from snello.optimize.climb import Climb

Run: TypeAlias = Generator[Event, None, Any]
WIDTH = 3  # of the beam, the original with it


def search(climb: Climb) -> Run:
    """All phases, then the INT8 cache on what was kept."""
    found = Search(climb)
    for number, phase in enumerate(PHASES):
        yield from found.phase(phase, later=PHASES[number + 1 :])
    extra = cache_stage(climb.original.spec, climb.best.steps)
    if extra is not None:
        made = sum(step.use != "quantize" for step in climb.best.steps)
        yield from climb.stage(extra, alone=True, made=made)


class Search:
    """The beam, and what every step lost alone."""

    def __init__(self, climb: Climb) -> None:
        self.climb = climb
        self.beam: list[Candidate] = []  # beside the original
        self.losses: dict[str, float] = {}
        self.too_much: dict[str, float] = {}  # label -> loss of what was refused

    def phase(self, phase: Offers, later: Sequence[Offers]) -> Run:
        climb = self.climb
        offers = phase(climb.subject)
        climb.reserved_seconds = self._reserve(later)
        made: list[Candidate] = yield from self._alone(offers)
        climb.reserved_seconds = 0.0
        made += yield from self._chains(offers)
        if later:
            self._choose(made)

    # ---- on the original

    def _alone(self, offers: Sequence[Offer]) -> Run:
        made: list[Candidate] = []
        told: set[str] = set()  # a technique that cannot take this model says so once
        for offer in offers:
            stage = stage_of((), "", offer)
            reason = self._plan_of(stage).reason
            if reason in told:
                continue
            told |= {reason} - {""}
            self.climb.chain_seconds = self._reserve_chain(offer)
            candidate = yield from self.climb.stage(stage, alone=True, refused=self._milder(offer))
            if candidate is None:
                continue
            made.append(candidate)
            self.losses[_key(offer.step)] = candidate.loss.mid
            if candidate.loss.mid > self.climb.request.max_loss:
                self.too_much[offer.label] = candidate.loss.mid
        return made

    def _milder(self, offer: Offer) -> str:
        """More of what lost too much loses more."""
        if offer.milder not in self.too_much:
            return ""
        lost = self.too_much[offer.label] = self.too_much[offer.milder]
        most = self.climb.request.max_loss
        return f"less of it lost {above(lost, most)}, over {exact(most)}"

    def _plan_of(self, stage: Stage) -> Any:
        climb = self.climb
        return prospect(stage, climb.original.spec, climb.original.spec, climb.goals, climb.examiner.bench.plan)

    def _reserve(self, later: Sequence[Offers]) -> float:
        """Seconds for the stages of later phases that may pay by themselves, one for each outcome."""
        climb, longest = self.climb, dict[str, float]()
        for phase in later:
            for offer in phase(climb.subject):
                stage = stage_of((), "", offer)
                found = self._plan_of(stage)
                if found.spec is not None:
                    seconds = climb.seconds_if_it_may_pay(stage)
                    longest[found.spec.digest] = min(seconds, longest.get(found.spec.digest, seconds))
        return sum(longest.values())

    def _reserve_chain(self, offer: Offer) -> float:
        """Seconds for this step behind a chain of the beam, where that may pay."""
        stages = [stage_of(base.steps, base.name, offer) for base in self.beam]
        return max(map(self.climb.seconds_if_it_may_pay, stages), default=0.0)

    # ---- on chains

    def _chains(self, offers: Sequence[Offer]) -> Run:
        made: list[Candidate] = []
        chosen = self._best(offers)
        stages = [(stage_of(base.steps, base.name, offer), len(base.steps)) for base in self.beam for offer in chosen]
        for stage, steps in sorted(stages, key=lambda pair: self._predicted(pair[0])):
            if self.climb.reached:
                break
            refused = hopeless(stage.steps, self._lost_alone, self.climb.request.max_loss)
            candidate = yield from self.climb.stage(stage, alone=True, made=steps, refused=refused)
            if candidate is not None:
                made.append(candidate)
        return made

    def _best(self, offers: Sequence[Offer]) -> list[Offer]:
        """Of offers that give the same formats, the one that lost least alone; the first where none was measured."""
        chosen: dict[str, Offer] = {}
        for offer in offers:
            spec = self._plan_of(stage_of((), "", offer)).spec
            if spec is None:
                continue
            before = chosen.setdefault(spec.digest, offer)
            if self._order(offer) < self._order(before):
                chosen[spec.digest] = offer
        return list(chosen.values())

    def _order(self, offer: Offer) -> float:
        lost = self._lost_alone(offer.step)
        return float("inf") if lost is None else lost

    def _lost_alone(self, step: Step) -> float | None:
        return self.losses.get(_key(step))

    def _predicted(self, stage: Stage) -> float:
        spec = self._plan_of(stage).spec
        return float("inf") if spec is None else self.climb.overhead.predicted(spec)

    # ---- the beam

    def _choose(self, made: Sequence[Candidate]) -> None:
        """Of all chains that lose little enough and are faster: the fastest, and then those that lose least."""
        within = [one for one in (*self.beam, *made) if within_budget(self.climb.request, one)]
        within = [one for one in within if one.speedup.low > 1]
        fastest = sorted(within, key=lambda one: -one.speedup.mid)[:1]
        careful = sorted((one for one in within if one not in fastest), key=lambda one: one.loss.high)
        self.beam = [*fastest, *careful][: WIDTH - 1]


def _key(step: Step) -> str:
    return json.dumps(step.resolved(), sort_keys=True)
