"""How fast a model runs here: prompts and tokens a second beside the ceiling, and the costs that the goals judge.

Prompts are random tokens of the vocabulary, new for each run, so that no cache or draft has seen them. `latency` is the
time to the first token of 512 prompt tokens plus 127 times the time between tokens; `throughput` the seconds of a token
when 16 streams are stepped together. Where a model's context is shorter, the prompt is, and the workload says so.
An encoder's `throughput` is the seconds of a sequence, the geometric mean over 16, 128 and 512 tokens: each length
weighs the same, however long it takes. What is over in milliseconds is run again until a quarter of a second has
passed, and the median counts: else a hiccup of the machine is what a small model is said to cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from snello.errors import Unsupported
from snello.measure.machine import Ceiling, Machine, ceiling
from snello.measure.memory import resident_bytes as current_resident_bytes
from snello.measure.runner import Runner, Step, silent
from snello.measure.sizes import bits_per_weight
from snello.models.spec import Spec

PROMPT = 512
GENERATE = 128
STREAMS = 16
SEQUENCES = (16, 128, 512)
TIMED_STEPS = 24  # of the 127: the median between tokens stands for the rest
LEAST_SECONDS, MOST_RUNS = 0.25, 15  # of one cost


@dataclass(frozen=True)
class Workload:
    """A prompt and an answer of these many tokens, in this many streams; `sequences`: an encoder's lengths instead."""

    prompt: int = PROMPT
    generate: int = GENERATE
    streams: int = STREAMS
    sequences: tuple[int, ...] = ()

    @classmethod
    def fitting(cls, spec: Spec) -> Workload:
        """The standard workload, the prompt shortened where the model's context is."""
        if not spec.causal:
            lengths = tuple(sorted({min(length, spec.max_positions) for length in SEQUENCES}))
            return cls(prompt=min(PROMPT, spec.max_positions), generate=1, sequences=lengths)
        generate = min(GENERATE, max(2, spec.max_positions // 4))
        return cls(prompt=max(1, min(PROMPT, spec.max_positions - generate)), generate=generate)

    def __str__(self) -> str:
        if self.sequences:
            lengths = ", ".join(map(str, self.sequences))
            return (
                f"latency: one text of {self.prompt} tokens; throughput: sequences of {lengths} tokens, geometric "
                "mean; memory: peak resident bytes while serving"
            )
        return (
            f"latency: time to first token ({self.prompt}) + {self.generate - 1} x time between tokens; "
            f"throughput: {self.streams} streams; memory: peak resident bytes while serving"
        )


class Clock:
    """Timed runs of one runner on one workload; prompts come from a seeded stream."""

    def __init__(self, runner: Runner, workload: Workload, *, seed: int = 0) -> None:
        self.runner = runner
        self.workload = workload
        self._generator = np.random.default_rng(seed)

    def tokens(self, count: int) -> np.ndarray:
        return self._generator.integers(0, self.runner.spec.vocab_size, count, dtype=np.int32)

    def latency(self) -> float:
        """Seconds of one answer in one stream (an encoder: of one text)."""
        return steadied(self._answer_seconds if self.runner.spec.causal else self.encode_seconds)

    def _answer_seconds(self) -> float:
        first, between = self.one_stream(min(TIMED_STEPS, self.workload.generate - 1))
        return first + (self.workload.generate - 1) * float(np.median(between))

    def one_stream(self, steps: int) -> tuple[float, list[float]]:
        """Seconds to the first token, and between each of the next `steps`."""
        session = self.runner.session()
        try:
            begin = time.perf_counter()
            logits = session.feed(self.tokens(self.workload.prompt))
            moments = [time.perf_counter()]
            for _ in range(steps):
                logits = self.runner.step([session], [int(np.argmax(logits))])[0]
                moments.append(time.perf_counter())
        finally:
            session.close()
        return moments[0] - begin, np.diff(moments).tolist()

    def throughput(self) -> float:
        """Seconds of one token when all streams are stepped together, from short prompts on (encoders: of a text)."""
        if self.workload.sequences:
            return float(np.exp(np.mean([np.log(self.sequence_seconds(n)) for n in self.workload.sequences])))
        return steadied(self._step_seconds)

    def _step_seconds(self) -> float:
        sessions = [self.runner.session() for _ in range(self.workload.streams)]
        try:
            for session in sessions:
                session.feed(self.tokens(min(32, self.workload.prompt)))
            tokens = self.tokens(len(sessions)).tolist()
            moments = [time.perf_counter()]
            for _ in range(min(TIMED_STEPS, self.workload.generate - 1)):
                tokens = self.runner.step(sessions, tokens).argmax(-1).tolist()
                moments.append(time.perf_counter())
        finally:
            for session in sessions:
                session.close()
        return float(np.median(np.diff(moments))) / len(sessions)

    def sequence_seconds(self, length: int) -> float:
        """Seconds of one sequence of this many tokens."""
        return steadied(lambda: self.encode_seconds(length))

    def encode_seconds(self, length: int | None = None) -> float:
        tokens = self.tokens(min(length or self.workload.prompt, self.runner.context))
        begin = time.perf_counter()
        self.runner.encode(tokens)
        return time.perf_counter() - begin


def steadied(run: Callable[[], float]) -> float:
    """The median cost of runs that together last long enough: one, of a large model."""
    begin, costs = time.perf_counter(), [run()]
    while time.perf_counter() - begin < LEAST_SECONDS and len(costs) < MOST_RUNS:
        costs.append(run())
    return float(np.median(costs))


def lasting(seconds: float) -> float:
    """How long it takes to measure a cost of so many seconds."""
    return min(max(seconds, LEAST_SECONDS), MOST_RUNS * seconds)


def cost(clock: Clock, goal: str) -> float:
    """One run of what a goal judges (memory is measured in fresh processes: see `memory`)."""
    if goal == "latency":
        return clock.latency()
    if goal == "throughput":
        return clock.throughput()
    raise Unsupported(f"the goal {goal} is not measured by the clock", "measured by it: latency, throughput")


def bench(
    runner: Runner,
    machine: Machine,
    *,
    prompt: int | None = None,
    generate: int | None = None,
    repeats: int = 5,
    resident_bytes: int | None = None,
    seed: int = 0,
    step: Step = silent,
) -> dict[str, Any]:
    """What `snello bench` prints: medians with their extremes, beside the ceiling.

    `resident_bytes`: of a process that serves (`memory.peak_while_serving`); without it, this process's own.
    """
    workload = Workload.fitting(runner.spec)
    workload = Workload(prompt or workload.prompt, generate or workload.generate)
    clock = Clock(runner, workload, seed=seed)
    clock.one_stream(2)
    first, between = [], []
    for done in range(repeats):
        seconds, gaps = clock.one_stream(workload.generate - 1)
        first.append(seconds)
        between.append(float(np.mean(gaps)))
        step(done + 1, repeats)
    limit = ceiling_of(runner, machine, workload)
    return {
        "prefill_tokens_per_second": spread([workload.prompt / seconds for seconds in first]),
        "decode_tokens_per_second": spread([1 / seconds for seconds in between]),
        "ceiling": ceiling_facts(limit),
        "bytes_per_token": limit.bytes_per_token,
        "weights_bytes": runner.weights_bytes,
        "bits_per_weight": bits_per_weight(runner.weights_bytes, runner.spec),
        "resident_bytes": resident_bytes or current_resident_bytes(),
        "first_token_seconds": float(np.median(first)),
    }


def sequence_rates(runner: Runner, machine: Machine, workload: Workload, *, repeats: int = 5) -> list[dict[str, Any]]:
    """Sequences a second of an encoder at each length of the workload, beside the ceiling."""
    clock, found = Clock(runner, workload), []
    for length in workload.sequences:
        clock.encode_seconds(length)
        rates = [1 / clock.sequence_seconds(length) for _ in range(repeats)]
        limit = ceiling(runner.spec, machine, prompt=length, generate=1, measured_bytes=runner.bytes_per_token(0))
        possible = limit.prefill_tokens_per_second / length
        found.append({"tokens": length, "sequences_per_second": spread(rates), "ceiling": possible})
    return found


def ceiling_facts(limit: Ceiling) -> dict[str, float]:
    """The ceiling as `snello bench` prints it."""
    return {
        "prefill_tokens_per_second": limit.prefill_tokens_per_second,
        "decode_tokens_per_second": limit.decode_tokens_per_second,
    }


def ceiling_of(runner: Runner, machine: Machine, workload: Workload) -> Ceiling:
    """The ceiling of an open model, from the bytes it really reads."""
    return ceiling(
        runner.spec,
        machine,
        prompt=workload.prompt,
        generate=workload.generate,
        measured_bytes=runner.bytes_per_token(0),
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "min": float(min(values)), "max": float(max(values))}
