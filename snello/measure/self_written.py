"""Text that the original writes itself, where the user gives none: at temperature 1, from prompts that we ship.

Its own samples are the distribution that it was trained to hold, so a lean model that matches them matches the
original; they say nothing about the user's domain, and every verdict on them says so. Streams are stepped together;
draws are seeded by stream, so the text does not depend on how many run at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from snello.errors import SnelloError
from snello.measure.documents import Document
from snello.measure.prompts import PROMPTS
from snello.measure.runner import Runner, Step, silent

SOURCE = "written by the model itself"
ANSWERS, MORE_ANSWERS = 4, 12  # to each prompt
SMALL = 300_000_000  # parameters of a model that writes so fast that more text costs little


def prompt_tokens(encode: Callable[[str], list[int]], chat: Callable[[str], list[int]] | None) -> list[list[int]]:
    """Our prompts through the model's chat template, or plainly where it has none."""
    return [chat(prompt) if chat else encode(prompt) for prompt in PROMPTS]


def answers_per_prompt(num_parameters: int) -> int:
    """By the model alone, so that a replay reads the same text. Small models need more of it to prove a percent."""
    return MORE_ANSWERS if num_parameters <= SMALL else ANSWERS


def write(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int,
    answers: int = ANSWERS,
    max_tokens: int = 384,
    streams: int = 16,
    step: Step = silent,
) -> list[Document]:
    """Documents with tokens: prompt and answer, `answers` answers to each prompt."""
    jobs = [(number, list(prompt)) for number, prompt in enumerate(prompts) for _ in range(answers)]
    documents: list[Document] = []
    for start in range(0, len(jobs), streams):
        batch = jobs[start : start + streams]
        generators = [np.random.default_rng([seed, start + i]) for i in range(len(batch))]
        room = min(max_tokens, runner.context - max(len(prompt) for _, prompt in batch))
        said = _answers(runner, [prompt for _, prompt in batch], generators, room)
        for i, ((_, prompt), answer) in enumerate(zip(batch, said, strict=True)):
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
        for answer, row, generator in zip(answers, rows, generators, strict=True):
            answer.append(draw(row, generator))
        live = [i for i in range(len(prompts)) if answers[i][-1] not in stops]
        for _ in range(max_tokens - 1):
            if not live:
                break
            logits = runner.step([sessions[i] for i in live], [answers[i][-1] for i in live])
            for i, row in zip(live, logits, strict=True):
                answers[i].append(draw(row, generators[i]))
            live = [i for i in live if answers[i][-1] not in stops]
    finally:
        for session in sessions:
            session.close()
    return answers


def draw(logits: np.ndarray, generator: np.random.Generator) -> int:
    """One token at temperature 1, by the largest of logit plus Gumbel noise."""
    return int(np.argmax(logits + generator.gumbel(size=len(logits))))
