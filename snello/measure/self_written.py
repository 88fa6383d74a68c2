"""Text that the original writes itself, where the user gives none: at temperature 1, from prompts that we ship.

Its own samples are the distribution that it was trained to hold, so a lean model that matches them matches the
original; they say nothing about the user's domain, and every verdict on them says so. Streams are stepped together;
draws are seeded by stream, so the text does not depend on how many run at once, and more of it begins with the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from snello.errors import SnelloError
from snello.measure.documents import Document
from snello.measure.prompts import PROMPTS
from snello.measure.runner import Runner, Step, silent

SOURCE = "written by the model itself"
ANSWERS, MOST_ANSWERS = 4, 8  # to each prompt: at first, and where those prove too little
SMALL_ANSWERS, SMALL_MOST = 12, 48  # of a small model, which writes fast and needs more of it to prove a percent
SMALL = 300_000_000  # parameters
MARGIN = 1.15  # what a text can prove is known to about this factor from a part of it


def prompt_tokens(encode: Callable[[str], list[int]], chat: Callable[[str], list[int]] | None) -> list[list[int]]:
    """Our prompts through the model's chat template, or plainly where it has none."""
    return [chat(prompt) if chat else encode(prompt) for prompt in PROMPTS]


def answers_per_prompt(num_parameters: int) -> int:
    """At first; by the model alone, so that a replay reads the same text."""
    return SMALL_ANSWERS if num_parameters <= SMALL else ANSWERS


def answers_wanted(num_parameters: int, short: float) -> int:
    """In all, where the first prove `short` times the loss that was asked: it falls as the text grows."""
    most = SMALL_MOST if num_parameters <= SMALL else MOST_ANSWERS
    first = answers_per_prompt(num_parameters)
    return first if short <= 1 else min(most, math.ceil(first * min(short, most) * MARGIN))


def write(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int,
    answers: int = ANSWERS,
    begun: int = 0,
    max_tokens: int = 384,
    streams: int = 16,
    step: Step = silent,
) -> list[Document]:
    """Documents with tokens: prompt and answer; `answers` answers to each prompt, but for the `begun` first."""
    jobs = [list(prompt) for _ in range(answers) for prompt in prompts]
    documents: list[Document] = []
    for start in range(begun * len(prompts), len(jobs), streams):
        batch = jobs[start : start + streams]
        generators = [np.random.default_rng([seed, start + i]) for i in range(len(batch))]
        room = min(max_tokens, runner.context - max(map(len, batch)))
        said = _answers(runner, batch, generators, room)
        for i, (prompt, answer) in enumerate(zip(batch, said, strict=True)):
            tokens = tuple(prompt + answer)
            name = f"answer {start + i}"
            documents.append(Document(source=SOURCE, name=name, text="", tokens=tokens, prompt_tokens=len(prompt)))
        step(min(start + streams, len(jobs)), len(jobs))
    if sum(len(document.tokens) for document in documents) < 1_000:
        raise SnelloError("the model wrote almost nothing by itself", "give a text: --text yours.txt")
    return documents


def _answers(
    runner: Runner, prompts: list[list[int]], generators: list[np.random.Generator], max_tokens: int
) -> list[list[int]]:
    stops = set(runner.spec.eos_tokens)
    sessions = [runner.session() for _ in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    try:
        rows = [session.feed(prompt) for session, prompt in zip(sessions, prompts, strict=True)]
        for answer, token in zip(answers, draw(np.stack(rows), generators), strict=True):
            answer.append(token)
        live = [i for i in range(len(prompts)) if answers[i][-1] not in stops]
        for _ in range(max_tokens - 1):
            if not live:
                break
            logits = runner.step([sessions[i] for i in live], [answers[i][-1] for i in live])
            for i, token in zip(live, draw(logits, [generators[i] for i in live]), strict=True):
                answers[i].append(token)
            live = [i for i in live if answers[i][-1] not in stops]
    finally:
        for session in sessions:
            session.close()
    return answers


def draw(logits: np.ndarray, generators: Sequence[np.random.Generator]) -> list[int]:
    """One token at temperature 1 of each row of logits (S, V): where a uniform number falls in the summed shares."""
    sums = np.exp(logits - logits.max(1, keepdims=True)).cumsum(1, dtype=np.float64)  # (S, V)
    points = [generator.random() * row[-1] for row, generator in zip(sums, generators, strict=True)]
    return [int(np.searchsorted(row, point, side="right")) for row, point in zip(sums, points, strict=True)]
