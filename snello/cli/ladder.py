"""The ladder: events of `optimize` as lines. Finished rows are printed once; under them a footer that is redrawn.

On a terminal the footer shows what runs, how far it is and the time budget; elsewhere one line a minute says the same.
The word carries the verdict, never a colour. Nothing here measures or decides.
"""

from __future__ import annotations

import time

from snello.measure.interval import Interval
from snello.optimize.events import (
    Event,
    Finished,
    LadderRow,
    MachineProbed,
    ModelLoaded,
    Planned,
    Progress,
    ProofRead,
    StageJudged,
    StageStarted,
    TextRead,
    Warned,
)
from snello.report import numbers
from snello.terminal import Terminal, bar

PLAIN_SECONDS = 60.0  # between progress lines where nothing can be redrawn
NAME_WIDTH = 25
TRY = {"causal-lm": "snello run {}", "embedding": 'snello embed {} "a text"'}  # by task; any model can be timed


class Ladder:
    """Renders one run. `goal` names the third column until the plan says it."""

    def __init__(self, terminal: Terminal, goal: str) -> None:
        self.terminal, self.goal = terminal, goal
        self.used, self.budget, self.best = 0.0, 0.0, 1.0
        self._header_printed = False
        self._activity = ("", "")
        self._activity_started = self._plain_said = time.monotonic()
        self._possible = 0.0
        self._task = "causal-lm"

    def show(self, event: Event) -> None:
        match event:
            case ModelLoaded():
                self._model(event)
            case MachineProbed():
                self._machine(event)
            case TextRead():
                self._text(event)
            case Planned():
                self._plan(event)
            case StageStarted():
                self._start(event.stage, "")
                self.terminal.footer(self._footer(f" > {event.stage}"))
            case Progress():
                self._progress(event)
            case StageJudged():
                self._judged(event)
            case Warned():
                self.terminal.say(f"note: {event.message}" + (f"\n      {event.hint}" if event.hint else ""))
            case ProofRead():
                self.terminal.say(f"\nProof, read once: {numbers.count(event.tokens)} unseen {event.unit}")
            case Finished():
                self._finished(event)

    # ---- the head

    def _model(self, event: ModelLoaded) -> None:
        self._task = event.task
        count, size = numbers.parameters(event.num_parameters), numbers.size(event.weights_bytes)
        resumed = " (continuing a run that was stopped)" if event.resumed else ""
        self.terminal.say(f"model    {event.model}, {count} parameters, {event.weights}, {size}{resumed}")

    def _machine(self, event: MachineProbed) -> None:
        decodes = self._task == "causal-lm"
        self._possible = (
            event.possible_decode_tokens_per_second if decodes else event.possible_prefill_tokens_per_second
        )
        speed = f"{event.bandwidth_gigabytes:.0f} GB/s"
        self.terminal.say(f"machine  {event.cpu}, {event.threads} threads, {event.isa}, {speed}")

    def _text(self, event: TextRead) -> None:
        if event.self_written:
            self.terminal.say("text     none given: the original wrote its own, and the verdict says so")
        for source in event.sources:
            documents, proof = numbers.count(source.documents), numbers.count(source.proof_tokens)
            self.terminal.say(f"text     {source.name}, {documents} documents; {proof} tokens for the proof")
        if 0 <= event.smallest_provable < numbers.BEYOND:  # else the sentence at the end says what is missing
            self.terminal.say(f"         can prove {numbers.at_most(event.smallest_provable)} or more")

    def _plan(self, event: Planned) -> None:
        running = sum(stage.runs for stage in event.stages)
        memory = f"peak {numbers.size(event.memory_bytes)} of {numbers.size(event.memory_available_bytes)} memory"
        disk = f"{numbers.size(event.disk_bytes)} of {numbers.size(event.disk_available_bytes)} disk"
        budget = numbers.clock(event.time_budget_seconds)
        self.budget, self.goal = event.time_budget_seconds, event.goal
        self.terminal.say(f"plan     {running} of {len(event.stages)} stages in at most {budget}; {memory}, {disk}")
        for stage in event.stages:
            reason = f"; {stage.reason}" if stage.reason else ""
            self.terminal.detail(f"         {stage.name}: {stage.predicted_speedup:.2f}x predicted{reason}")

    # ---- rows

    def _judged(self, event: StageJudged) -> None:
        self.used, self.budget, self.best = event.used_seconds, event.time_budget_seconds, event.best_speedup
        if not self._header_printed:
            self._header_printed = True
            self.terminal.say(f"\n {'stage':<{NAME_WIDTH}}{'loss (at most)':>17}  {self.goal:>10}  verdict")
        line = row_line(event.row)
        if event.row.kind == "original" and not event.row.reason and self._possible:
            line += f"{'':>{NAME_WIDTH}}{numbers.rate(self._possible)} tokens a second would be possible"
        self.terminal.say(line + (" (from the journal)" if event.resumed else ""))

    def _finished(self, event: Finished) -> None:
        result = event.result
        self.terminal.always(f"\n{result.sentence}")
        if result.reason and result.reason not in result.sentence:
            self.terminal.say(f"  {result.reason}")
        if result.report is not None:
            self.terminal.say(f"  {result.report}   {result.recipe or ''}".rstrip())
        if result.path is not None:
            self.terminal.say(f"  try it: {TRY.get(self._task, 'snello bench {}').format(result.path)}")

    # ---- the footer

    def _start(self, stage: str, activity: str) -> None:
        if (stage, activity) != self._activity:
            self._activity = (stage, activity)
            self._activity_started = time.monotonic()

    def _progress(self, event: Progress) -> None:
        self._start(event.stage, event.activity)
        self.used = event.used_seconds
        share = event.done / max(1, event.total)
        left = time_left(share, time.monotonic() - self._activity_started)
        place = f"{event.activity} {event.unit} {event.done} of {event.total}"
        if self.terminal.live:
            line = f" > {event.stage:<{NAME_WIDTH - 2}}{bar(share)} {share:4.0%}   {place}   {left}"
            self.terminal.footer(self._footer(line))
        elif time.monotonic() - self._plain_said > PLAIN_SECONDS:
            self._plain_said = time.monotonic()
            self.terminal.say(f"   {event.stage}: {share:.0%} of {event.activity}" + (f", {left}" if left else ""))

    def _footer(self, line: str) -> list[str]:
        used = f"   {numbers.clock(self.used)} of {numbers.clock(self.budget)} used" if self.budget else ""
        return [line, f"{used}   best so far {numbers.times(self.best)}   Ctrl-C stops; the same command continues"]


def row_line(row: LadderRow) -> str:
    """` quantize int4, awq        0.52% (0.71%)   3.02x  kept, replaces int8`"""
    loss = "" if row.loss is None else numbers.loss(row.loss)
    gain = "" if row.speedup is None or row.kind == "original" else _ratio(row.speedup)
    verdict = row.verdict if row.kind != "original" else ""
    reason = row.reason if not verdict else (f"{verdict}: {row.reason}" if row.reason else verdict)
    replaced = f", replaces {row.replaces}" if row.replaces else ""
    name = row.name if len(row.name) < NAME_WIDTH else row.name[: NAME_WIDTH - 2] + "~"
    return f" {name:<{NAME_WIDTH}}{loss:>17}  {gain:>10}  {reason}{replaced}".rstrip()


def time_left(share: float, spent: float) -> str:
    """ "2:10 left"; a range until a tenth is done, nothing before there is anything to go by."""
    if share <= 0.02 or share >= 1 or spent < 1:
        return ""
    rest = spent * (1 - share) / share
    if share < 0.1:
        return f"{numbers.clock(0.7 * rest)}-{numbers.clock(1.5 * rest)} left"
    return f"{numbers.clock(rest)} left"


def _ratio(interval: Interval) -> str:
    return numbers.times(interval.mid)
