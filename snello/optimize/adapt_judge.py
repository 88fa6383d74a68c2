"""Judging a task on held-out examples: texts by their loss per token, labels by accuracy.

What is better is paired with what it is compared with, example by example. Losses are redrawn by families; right and
wrong answers are bounded by a score test, and redrawn too where families hold several examples. A judge does not know
what it judges: a *scorer* gives the loss of each token of each answer, from the reference or from the executor that
serves.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from snello.errors import SnelloError
from snello.measure.bootstrap import Clusters, mean_interval
from snello.measure.interval import Interval
from snello.measure.proportions import flips_interval
from snello.measure.runner import Runner
from snello.optimize.adapt_data import Example, Split

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.techniques.adapt.train import Answer

MOST_TOKENS = 512  # of one example
MOST_LABELS = 20
Scorer: TypeAlias = "Callable[[Sequence[Answer]], list[np.ndarray]]"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`before` and `after`: loss per token in nats, or accuracy; `gain` is above zero where the adapter is better."""

    measure: str  # "loss" or "accuracy"
    before: float
    after: float
    gain: Interval
    held_out: int

    def sentence(self) -> str:
        scale, unit = (100, " points") if self.measure == "accuracy" else (1, " nats a token")
        numbers = f"{self.measure} {self.before:.3f} -> {self.after:.3f}"
        bounds = f"{scale * self.gain.low:+.3g} to {scale * self.gain.high:+.3g}{unit}, 95%"
        return f"{numbers} on {self.held_out} held-out examples ({bounds})"


class Judge(Protocol):
    """Asked about what is compared with first, then about what may be better."""

    def before(self, score: Scorer) -> None: ...
    def after(self, score: Scorer) -> Verdict: ...


def by_runner(runner: Runner) -> Scorer:
    """Loss of each token of each answer, in nats, as the executor that serves computes it."""

    def score(answers: Sequence[Answer]) -> list[np.ndarray]:
        return [-np.asarray(runner.score(one.tokens).log_probabilities)[one.start - 1 :] for one in answers]

    return score


def encode(model: Model, example: Example, taken: int = 0) -> list[Answer]:
    """An example as tokens: a long prompt loses its beginning, plain text becomes several windows.

    Args:
        taken: positions before it that are not its own.

    Raises:
        SnelloError: an answer is longer than the model can see.
    """
    from snello.techniques.adapt.train import Answer

    limit, spec = min(MOST_TOKENS, model.spec.max_positions - taken), model.spec
    before = model.tokenizer.encode(example.prompt)
    if not before:
        first = spec.bos_token if spec.bos_token is not None else next(iter(spec.eos_tokens), None)
        if first is None:
            raise SnelloError(f"{model.name} has no token to begin with", "give examples with a prompt")
        before = [first]
    answer = [*model.tokenizer.encode(example.completion, add_special=False), *spec.eos_tokens[:1]]
    if example.family is not None:
        whole, windows = [*before, *answer], range(0, len(before) + len(answer), limit)
        pieces = [np.array(whole[start : start + limit], np.int32) for start in windows]
        return [Answer(piece, 1) for piece in pieces if len(piece) > 1]
    if len(answer) >= limit:
        message = f"the completion of {example.prompt[:40]!r} has {len(answer)} tokens, {limit - 1} fit"
        raise SnelloError(message, "give shorter completions")
    before = before[-(limit - len(answer)) :]
    return [Answer(np.array([*before, *answer], np.int32), len(before))]


def judge_of(model: Model, parts: Split, seed: int, taken: int = 0) -> Judge:
    """By labels where the examples have them, else by loss. `taken`: as `encode` has it."""
    return (_ByLoss if parts.held_out[0].label is None else _ByLabel)(model, parts, seed, taken)


class _ByLoss:
    """Loss per token of held-out completions; all of an example is one block."""

    def __init__(self, model: Model, parts: Split, seed: int, taken: int) -> None:
        self.seed, self.count = seed, len(parts.held_out)
        each = [encode(model, example, taken) for example in parts.held_out]
        self.answers = [answer for answers in each for answer in answers]
        pairs = zip(parts.families, each, strict=True)
        self.families = [family for family, answers in pairs for _ in answers]

    def before(self, score: Scorer) -> None:
        self.base = score(self.answers)

    def after(self, score: Scorer) -> Verdict:
        found = score(self.answers)
        differences = [base - own for base, own in zip(self.base, found, strict=True)]
        return Verdict(
            measure="loss",
            before=float(np.concatenate(self.base).mean()),
            after=float(np.concatenate(found).mean()),
            gain=mean_interval(Clusters.of(differences, self.families), seed=self.seed),
            held_out=self.count,
        )


class _ByLabel:
    """Accuracy of the likeliest label, against the better of the base and of always saying the commonest one."""

    def __init__(self, model: Model, parts: Split, seed: int, taken: int) -> None:
        self.seed, self.families = seed, parts.families
        counts = Counter(str(example.label) for example in parts.train)
        self.labels = sorted(counts)
        if not 2 <= len(self.labels) <= MOST_LABELS:
            message = f"the examples have {len(self.labels)} different labels"
            raise SnelloError(message, f"2 to {MOST_LABELS} are supported; else write them as prompt and completion")
        self.true = np.array([str(example.label) for example in parts.held_out])
        self.answers = [
            encode(model, dataclasses.replace(example, completion=f" {label}"), taken)[0]
            for example in parts.held_out
            for label in self.labels
        ]
        self.common = max(self.labels, key=lambda label: (counts[label], label))

    def before(self, score: Scorer) -> None:
        rights: Sequence[np.ndarray] = (self._right(score), self.true == self.common)
        self.base = max(rights, key=lambda right: float(right.mean()))

    def _right(self, score: Scorer) -> np.ndarray:
        losses = np.array([float(each.sum()) for each in score(self.answers)]).reshape(len(self.true), -1)
        right: np.ndarray = np.array(self.labels)[losses.argmin(1)] == self.true
        return right

    def after(self, score: Scorer) -> Verdict:
        return accuracy_verdict(self._right(score), self.base, self.families, self.seed)


def accuracy_verdict(right: np.ndarray, base: np.ndarray, families: Sequence[int], seed: int) -> Verdict:
    """Right answers (N,) paired with those of what they are compared with.

    The score test takes examples for independent; those of one family are not, so there the wider bounds count.
    """
    differences = right.astype(np.float64) - base.astype(np.float64)
    gain = flips_interval(differences)
    if len(set(families)) < len(families):
        redrawn = mean_interval(Clusters.of(list(differences[:, None]), list(families)), seed=seed)
        gain = Interval(min(gain.low, redrawn.low), gain.mid, max(gain.high, redrawn.high))
    return Verdict(
        measure="accuracy",
        before=float(base.mean()),
        after=float(right.mean()),
        gain=gain,
        held_out=len(right),
    )
