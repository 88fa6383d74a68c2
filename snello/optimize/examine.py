"""Measuring one candidate: its quality on a cut, its guards, its costs beside another's. Each is a journaled unit.

Units are keyed by the digests of the models and the text, so that a resumed run, or a second stage that needs the same
reading, finds it done.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Sequence
from typing import Any, TypeAlias

import numpy as np

from snello.errors import SnelloError, Unsupported
from snello.measure import guards, metric, quality
from snello.measure import reference as reference_check
from snello.measure.guards import Divergence, Habits, Strictness
from snello.measure.interval import Interval
from snello.measure.quality import Comparison
from snello.measure.rulers import Embeddings, MaskedTokens, NextTokens, Reading, Ruler
from snello.measure.runner import Runner
from snello.measure.self_written import prompt_tokens
from snello.measure.speed import Clock, Workload, bench, cost, sequence_rates
from snello.measure.text import Block, Texts
from snello.measure.timing import HALF_WIDTH, LEAST_QUADS, MOST_QUADS, Ratio, ratio
from snello.measure.translation import Gathered, Translated, Translation
from snello.optimize.candidate import Candidate, Runners
from snello.optimize.events import Event
from snello.optimize.plain import revive
from snello.optimize.receipts import CostRatio, Evidence, Guards, SequenceSpeed, SourceLoss, Speed
from snello.optimize.request import Request
from snello.optimize.work import Report, Worker
from snello.optimize.workbench import Workbench

Run: TypeAlias = Generator[Event, None, Any]
HABIT_PROMPTS = 16
HABIT_TOKENS = 96


@dataclasses.dataclass
class Examiner:
    """Everything that measuring needs to know, for one run."""

    request: Request
    bench: Workbench
    worker: Worker
    runners: Runners
    ruler: Ruler
    texts: Texts
    workload: Workload
    machine: Any
    original: Candidate
    _rules: dict[str, Translation | None] = dataclasses.field(default_factory=dict)

    @property
    def seed(self) -> int:
        return self.request.seed

    # ---- words

    def rule(self, candidate: Candidate) -> Translation | None:
        """How this candidate is told the original's tokens; None where its tokenizer is the same."""
        if candidate.digest not in self._rules:
            self._rules[candidate.digest] = self.bench.translation(self.original.model, candidate.model)
        return self._rules[candidate.digest]

    def reader(self, candidate: Candidate) -> Runner:
        """What answers for the original's tokens.

        Raises:
            Unsupported: hidden words are no pairs where a word may be several pieces.
        """
        rule = self.rule(candidate)
        if rule is None:
            return self.runners(candidate)
        if isinstance(self.ruler, MaskedTokens):
            message = "the loss of hidden words cannot be compared with another vocabulary's"
            raise Unsupported(message, "start from a model with the original's tokenizer, or judge a decoder")
        return Translated(self.runners(candidate), rule)

    def stretch(self, candidate: Candidate) -> float:
        """Tokens that this candidate takes for one of the original's, on the text of the search."""
        rule = self.rule(candidate)
        return 1.0 if rule is None else rule.stretch([block.tokens for block in self.texts.blocks("select")])

    # ---- quality

    def read(self, candidate: Candidate, cut: str, stage: str) -> Run:
        """The candidate's reading of one cut."""
        blocks, inputs = self.texts.blocks(cut), self._read_inputs(candidate, cut)

        def work(report: Report) -> Any:
            def step(done: int, total: int) -> None:
                report(f"score {candidate.name}", done, total, "window")

            reading = self.ruler.read(self.reader(candidate), blocks, step)
            return None, reading.save()

        unit = yield from self.worker.unit(stage, "read", inputs, work)
        return Reading.load(dict(unit.arrays))

    def _read_inputs(self, candidate: Candidate, cut: str) -> dict[str, str]:
        return {"model": candidate.digest, "text": self.texts.sha256, "cut": cut, "ruler": self.ruler.name}

    def seconds_to_read(self, candidate: Candidate, cut: str) -> float | None:
        """How long `read` took; None where it was not done."""
        unit = self.worker.known("read", self._read_inputs(candidate, cut))
        return None if unit is None else unit.seconds

    def evidence(
        self, candidate: Candidate, reading: Reading, against: Reading, cut: str, base: Candidate | None, stage: str
    ) -> Run:
        """Loss, increment, guards, reference and metric. `against`: the original's reading of the cut."""
        blocks = self.texts.blocks(cut)
        found = quality.compare(self.ruler, against, reading, blocks, seed=self.seed)
        increment = None
        if base is not None and base.select is not None and cut == "select":
            increment = self.change(against, base.select, reading, blocks)
        checked = yield from self.guards(candidate, reading, against, cut, stage)
        weights_only, note, executor = yield from self.reference(candidate, against, reading, cut, stage)
        scored = None
        if self.request.metric is not None:
            scored = yield from self.metric(candidate, stage)
        return Evidence(
            cut="proof" if cut == "proof" else "select",
            measure=self.ruler.name,
            loss=found.loss,
            sources=sources_of(found),
            guards=checked,
            increment=increment,
            weights_only=weights_only,
            weights_only_note=note,
            executor_on_same_part=executor,
            metric=scored,
        )

    def change(self, original: Reading, before: Reading, after: Reading, blocks: Sequence[Block]) -> Interval:
        """How much more `after` loses than `before`, paired; both losses are against the original."""
        losses = [self.ruler.differences(original, reading, blocks) for reading in (before, after)]
        paired = [new - old for old, new in zip(*losses, strict=True)]
        return quality.compare_differences(self.ruler, paired, blocks, seed=self.seed).loss

    def guards(self, candidate: Candidate, reading: Reading, against: Reading, cut: str, stage: str) -> Run:
        agreed = guards.agreement(against, reading)
        if isinstance(self.ruler, Embeddings):
            differences = self.ruler.differences(against, reading, self.texts.blocks(cut))
            cosine = 1 - float(np.concatenate(differences).mean())
            return Guards(mean_cosine=cosine, neighbours_kept=guards.neighbours_kept(against, reading))
        if not candidate.spec.causal:
            return Guards(top1_agreement=agreed)
        diverged = yield from self.divergence(candidate, cut, stage)
        own = yield from self.habits(candidate, stage)
        theirs = yield from self.habits(self.original, stage)
        failed = Strictness().failures(self.request.max_loss, diverged, agreed, theirs, own)
        return Guards(
            mean_divergence=diverged.mean,
            divergence_p99=diverged.p99,
            divergence_quantiles=diverged.quantiles,
            top1_agreement=agreed,
            looping=(theirs.looping, own.looping),
            ending=(theirs.ending, own.ending),
            prompts=len(own.loops),
            failed=failed,
        )

    def divergence(self, candidate: Candidate, cut: str, stage: str) -> Run:
        blocks = self.texts.blocks(cut)
        inputs = {"models": [self.original.digest, candidate.digest], "text": self.texts.sha256, "cut": cut}

        def work(report: Report) -> Any:
            def step(done: int, total: int) -> None:
                report("divergence", done, total, "window")

            pair: tuple[Runner, Runner] = self.runners(self.original), self.reader(candidate)
            rule = self.rule(candidate)
            if rule is not None:
                pair = Gathered(pair[0], rule, candidate.spec.vocab_size), pair[1]
            return guards.divergence(*pair, blocks, seed=self.seed, step=step), {}

        unit = yield from self.worker.unit(stage, "divergence", inputs, work)
        return revive(Divergence, unit.value)

    def habits(self, candidate: Candidate, stage: str) -> Run:
        """Looping and ending on the fixed prompts, measured once per model."""

        def work(report: Report) -> Any:
            def step(done: int, total: int) -> None:
                report(f"answer {candidate.name}", done, total, "prompt")

            runner = self.runners(candidate)
            prompts = [prompt[: runner.context // 2] for prompt in self.prompts(candidate)[:HABIT_PROMPTS]]
            longest = min(HABIT_TOKENS, runner.context // 2)
            return guards.habits(runner, prompts, max_tokens=longest, step=step), {}

        unit = yield from self.worker.unit(stage, "habits", {"model": candidate.digest}, work)
        return revive(Habits, unit.value)

    def prompts(self, candidate: Candidate) -> list[list[int]]:
        """In the candidate's own tokens, where they differ."""
        return model_prompts(self.original.model if self.rule(candidate) is None else candidate.model)

    def reference(self, candidate: Candidate, against: Reading, reading: Reading, cut: str, stage: str) -> Run:
        """The loss of the dequantized weights in the reference, and the executor's on the same part."""
        if not isinstance(self.ruler, NextTokens) or not candidate.spec.causal:
            return None, "for decoders only", None
        if self.rule(candidate) is not None:
            return None, "not measured where the vocabulary differs", None
        blocks = self.texts.blocks(cut)
        chosen, part = reference_check.part(blocks)
        first = yield from self._reference_reading(self.original, part, cut, stage)
        if isinstance(first, str):
            return None, first, None
        second = yield from self._reference_reading(candidate, part, cut, stage)
        if isinstance(second, str):
            return None, second, None
        weights = quality.compare(self.ruler, first, second, part, seed=self.seed)
        scored = [block.num_scored for block in part]
        pair = [
            Reading(tuple(r.values[i][:n] for i, n in zip(chosen, scored, strict=True))) for r in (against, reading)
        ]
        executor = quality.compare(self.ruler, pair[0], pair[1], part, seed=self.seed)
        return weights.loss, f"on {weights.tokens:,} tokens", executor.loss

    def _reference_reading(self, candidate: Candidate, part: Sequence[Block], cut: str, stage: str) -> Run:
        inputs = {"model": candidate.digest, "text": self.texts.sha256, "cut": cut, "blocks": len(part)}

        def work(report: Report) -> Any:
            report("reference", 0, 1, "pass")
            reading = self.bench.reference(candidate.model, part)
            return (reading, {}) if isinstance(reading, str) else ("", reading.save())

        unit = yield from self.worker.unit(stage, "reference", inputs, work)
        return unit.value or Reading.load(dict(unit.arrays))

    def metric(self, candidate: Candidate, stage: str) -> Run:
        """How much of the user's own score is lost."""
        scores = []
        for one in (self.original, candidate):
            inputs = {"model": one.digest, "command": self.request.metric}

            def work(report: Report, model: Any = one.model) -> Any:
                report("metric", 0, 1, "run")
                assert self.request.metric is not None
                return None, {"scores": metric.run(self.request.metric, model.path)}

            unit = yield from self.worker.unit(stage, "metric", inputs, work)
            scores.append(unit.arrays["scores"])
        return metric.drop(scores[0], scores[1], seed=self.seed)

    # ---- cost

    def ratio(
        self,
        a: Candidate,
        b: Candidate,
        goal: str,
        stage: str,
        *,
        quads: int = MOST_QUADS,
        coarse: bool = False,
        threshold: float | None = None,
    ) -> Run:
        """Cost of `b` over cost of `a` by a goal; None where it cannot be measured here.

        Args:
            threshold: all that is to be known is on which side of it the ratio lies.
        """
        inputs = {
            "models": [a.digest, b.digest],
            "goal": goal,
            "workload": str(self.workload),
            "machine": str(self.machine.cpu),
            "quads": quads,
            "coarse": coarse,
            "threshold": threshold,
        }

        def work(report: Report) -> Any:
            def step(done: int, total: int) -> None:
                report(f"time {goal} over {a.name}", done, total, "pair")

            if goal == "memory":
                return self._memory_ratio(a, b, step), {}
            clocks = [Clock(self.runners(one), self.workload, seed=self.seed) for one in (a, b)]
            least = 1 if coarse else LEAST_QUADS
            stretches = [self.stretch(one) for one in (a, b)]  # the cost of a text, not of a token
            try:
                costs = [
                    lambda clock=clock, stretch=stretch: stretch * cost(clock, goal)
                    for clock, stretch in zip(clocks, stretches, strict=True)
                ]
                most = 1 if coarse else quads
                return ratio(*costs, most_quads=most, least_quads=least, threshold=threshold, step=step), {}
            except Unsupported as error:
                return error.message, {}

        unit = yield from self.worker.unit(stage, "ratio", inputs, work)
        return None if isinstance(unit.value, str) else revive(Ratio, unit.value)

    def _memory_ratio(self, a: Candidate, b: Candidate, step: Any) -> Ratio:
        pairs = []
        for number in range(2):
            order = (a, b) if number == 0 else (b, a)
            peaks = {id(one): float(self.bench.peak_memory(one.model)) for one in order}
            pairs.append((peaks[id(a)], peaks[id(b)]))
            step(number + 1, 2)
        ratios = [second / first for first, second in pairs]
        middle = math.sqrt(ratios[0] * ratios[1])
        interval = Interval(min(ratios), middle, max(ratios))
        return Ratio(interval, interval.half_width <= HALF_WIDTH, tuple(pairs))

    def speed(self, candidate: Candidate, stage: str) -> Run:
        """The candidate's own speed beside its ceiling; None for encoders, which have no tokens a second."""
        if not candidate.spec.causal:
            return None

        def work(report: Report) -> Any:
            def step(done: int, total: int) -> None:
                report("bench", done, total, "run")

            runner = self.runners(candidate)
            work = self.workload
            length = min(33, work.generate)
            found = bench(runner, self.machine, prompt=work.prompt, generate=length, repeats=3, step=step)
            return found, {}

        inputs = {"model": candidate.digest, "workload": str(self.workload), "machine": str(self.machine.cpu)}
        unit = yield from self.worker.unit(stage, "bench", inputs, work)
        return speed_of(unit.value, self.workload)

    def sequences(self, candidate: Candidate, stage: str) -> Run:
        """An encoder's sequences a second at each length; none for decoders."""
        if not self.workload.sequences:
            return ()

        def work(report: Report) -> Any:
            report("bench", 0, 1, "run")
            return sequence_rates(self.runners(candidate), self.machine, self.workload), {}

        inputs = {"model": candidate.digest, "workload": str(self.workload), "machine": str(self.machine.cpu)}
        unit = yield from self.worker.unit(stage, "sequences", inputs, work)
        return tuple(
            SequenceSpeed(
                tokens=found["tokens"],
                sequences_per_second=_spread(found["sequences_per_second"]),
                ceiling=found["ceiling"],
            )
            for found in unit.value
        )


def speed_of(found: dict[str, Any], workload: Workload) -> Speed:
    """The receipt's form of what `bench` gives."""
    decode = found["decode_tokens_per_second"]
    first = found["first_token_seconds"]
    return Speed(
        prefill_tokens_per_second=_spread(found["prefill_tokens_per_second"]),
        decode_tokens_per_second=_spread(decode),
        ceiling_prefill_tokens_per_second=found["ceiling"]["prefill_tokens_per_second"],
        ceiling_decode_tokens_per_second=found["ceiling"]["decode_tokens_per_second"],
        bytes_per_token=found["bytes_per_token"],
        first_token_seconds=first,
        latency_seconds=first + (workload.generate - 1) / decode["median"],
    )


def _spread(found: dict[str, float]) -> Interval:
    return Interval(found["min"], found["median"], found["max"])


def sources_of(found: Comparison) -> tuple[SourceLoss, ...]:
    return tuple(
        SourceLoss(source=one.source, tokens=one.tokens, blocks=one.blocks, loss=one.loss) for one in found.sources
    )


def cost_ratio(goal: str, against: str, found: Ratio) -> CostRatio:
    return CostRatio(goal=goal, against=against, ratio=found.interval, steady=found.steady, pairs=found.pairs)


def model_prompts(model: Any) -> list[list[int]]:
    """Our prompts as this model takes them: through its chat template, or plainly."""
    tokenizer = model.tokenizer
    try:
        return prompt_tokens(
            tokenizer.encode, lambda prompt: list(tokenizer.chat([{"role": "user", "content": prompt}]))
        )
    except SnelloError:  # it has no chat template
        return prompt_tokens(tokenizer.encode, None)
