"""What the mean loss can hide: divergence in the tails, other first choices, answers that loop or do not end.

Always reported beside the loss; they decide only with `--strict`. Divergence is read at a fixed sample of positions,
looping and ending on fixed prompts answered greedily, each paired with the original's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from snello.measure import limits
from snello.measure.rulers import Reading, log_normalizer
from snello.measure.runner import Runner, Step, silent
from snello.measure.text import Block

QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
LONGEST_PERIOD = 24
LEAST_REPEATED = 24  # tokens at the end that repeat with one period


@dataclass(frozen=True)
class Divergence:
    """KL(original || candidate) in nats over sampled positions."""

    mean: float
    p99: float
    quantiles: tuple[tuple[float, float], ...]
    positions: int


def divergence(
    original: Runner,
    other: Runner,
    blocks: Sequence[Block],
    *,
    seed: int,
    most_blocks: int = 16,
    rows: int = 64,
    step: Step = silent,
) -> Divergence:
    """Both models' whole distributions, at up to `rows` scored positions of up to `most_blocks` blocks.

    Words that only one of them has stand at its end and are padding, which is left out.
    """
    generator = np.random.default_rng(seed)
    number = min(most_blocks, len(blocks))
    chosen = sorted(generator.choice(len(blocks), number, replace=False).tolist())
    values: list[np.ndarray] = []
    for done, index in enumerate(chosen, start=1):
        block = blocks[index]
        scored = np.arange(block.scored_from - 1, len(block.tokens) - 1)
        picked = np.sort(generator.choice(scored, min(rows, len(scored)), replace=False))
        a, b = original.logits(block.tokens, picked), other.logits(block.tokens, picked)
        words = min(a.shape[1], b.shape[1])
        values.append(kl(a[:, :words], b[:, :words]))
        step(done, number)
    return summarize(np.concatenate(values))


def kl(original: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(original || other) of each row of logits (N, V), (N,). Never below zero but for rounding, which is cut."""
    a, b = original.astype(np.float64), other.astype(np.float64)
    log_p, log_q = a - log_normalizer(a)[:, None], b - log_normalizer(b)[:, None]
    return np.asarray(np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0))


def summarize(values: np.ndarray) -> Divergence:
    points = tuple((q, float(np.quantile(values, q))) for q in QUANTILES)
    return Divergence(float(values.mean()), float(np.quantile(values, 0.99)), points, len(values))


def agreement(original: Reading, other: Reading) -> float | None:
    """The share of positions at which both choose the same token."""
    if not original.choices:
        return None
    a, b = np.concatenate(original.choices), np.concatenate(other.choices)
    return float((a == b).mean())


# ---- answers ----


@dataclass(frozen=True)
class Habits:
    """How answers to the fixed prompts went: does each loop, does each end by itself?"""

    loops: tuple[bool, ...]
    ends: tuple[bool, ...]

    @property
    def looping(self) -> float:
        return sum(self.loops) / max(1, len(self.loops))

    @property
    def ending(self) -> float:
        return sum(self.ends) / max(1, len(self.ends))


def habits(runner: Runner, prompts: Sequence[Sequence[int]], *, max_tokens: int, step: Step = silent) -> Habits:
    """Greedy answers to these prompts, at most `max_tokens` each."""
    stops = set(runner.spec.eos_tokens)
    answers = []
    for done, prompt in enumerate(prompts, start=1):
        answers.append(greedy(runner, prompt, max_tokens, stops))
        step(done, len(prompts))
    loops = tuple(is_loop(answer) for answer in answers)
    return Habits(loops, tuple(bool(answer) and answer[-1] in stops for answer in answers))


def greedy(runner: Runner, prompt: Sequence[int], max_tokens: int, stops: set[int]) -> list[int]:
    session = runner.session()
    answer: list[int] = []
    try:
        logits = session.feed(prompt)
        while len(answer) < max_tokens:
            answer.append(int(np.argmax(logits)))
            if answer[-1] in stops or len(answer) == max_tokens:
                break
            logits = runner.step([session], [answer[-1]])[0]
    finally:
        session.close()
    return answer


def is_loop(answer: Sequence[int]) -> bool:
    """The end repeats: at least three times over and 24 tokens long, with a period of at most 24 tokens."""
    tokens = np.asarray(answer)
    for period in range(1, LONGEST_PERIOD + 1):
        length = max(3 * period, LEAST_REPEATED)
        if len(tokens) >= length:
            tail = tokens[-length:]
            if np.array_equal(tail[period:], tail[:-period]):
                return True
    return False


# ---- strict ----


@dataclass(frozen=True)
class Strictness:
    """What `--strict` asks for. Divergence is in terms of the budget, because a harmless one grows with it."""

    mean_divergence: float = 3.0  # times log(1 + budget)
    p99_divergence: float = 60.0
    agreement: float = 0.9
    significance: float = 0.05

    def failures(
        self,
        max_loss: float,
        found: Divergence | None,
        agreed: float | None,
        original: Habits | None,
        other: Habits | None,
    ) -> tuple[str, ...]:
        """The guards that do not pass, in words."""
        failed = []
        nats = math.log1p(max_loss)
        if found and found.mean > self.mean_divergence * nats:
            failed.append(f"mean divergence {limits.over(found.mean, self.mean_divergence * nats)}")
        if found and found.p99 > self.p99_divergence * nats:
            failed.append(f"99th percentile of divergence {limits.over(found.p99, self.p99_divergence * nats)}")
        if agreed is not None and agreed < self.agreement:
            same, least = limits.below(agreed, self.agreement), limits.exact(self.agreement)
            failed.append(f"{same} of next words the same, under {least}")
        if original and other:
            if worse(original.loops, other.loops) < self.significance:
                failed.append(f"loops in {100 * other.looping:.0f}% of answers, not {100 * original.looping:.0f}%")
            if worse(other.ends, original.ends) < self.significance:
                failed.append(f"ends {100 * other.ending:.0f}% of answers, not {100 * original.ending:.0f}%")
        return tuple(failed)


def worse(before: Sequence[bool], after: Sequence[bool]) -> float:
    """McNemar's exact one-sided p: that as many or more turned true than by a fair coin among those that changed."""
    gained = sum(not a and b for a, b in zip(before, after, strict=True))
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    changed = gained + lost
    return float(sum(math.comb(changed, k) for k in range(gained, changed + 1)) / 2**changed)


# ---- embeddings ----


def neighbours_kept(original: Reading, other: Reading, *, nearest: int = 10) -> float:
    """The mean share of each text's nearest neighbours (by cosine) that stay among them."""
    a, b = np.stack(original.values), np.stack(other.values)
    nearest = min(nearest, len(a) - 1)
    sets = []
    for vectors in (a, b):
        cosines = vectors @ vectors.T
        np.fill_diagonal(cosines, -np.inf)
        sets.append(np.argpartition(-cosines, nearest - 1, axis=1)[:, :nearest])
    return float(np.mean([len(np.intersect1d(x, y)) / nearest for x, y in zip(*sets, strict=True)]))
