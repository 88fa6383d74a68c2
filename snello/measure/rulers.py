"""Yardsticks: what a model's quality is read as, and what of it is compared token by token.

`read` runs a model over blocks and keeps what is needed to compare; `differences` pairs two readings of the same
blocks: candidate minus original, positive is worse. Decoders are read by the loss of the next token, masked encoders by
the loss of hidden tokens, classifiers by right answers, embedding models by cosine (or by AUC where pairs are
labelled).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from snello.errors import Unsupported
from snello.measure.bootstrap import relative
from snello.measure.interval import Interval
from snello.measure.runner import Runner, Step, silent
from snello.measure.text import Block
from snello.models.spec import Spec


@dataclass(frozen=True)
class Reading:
    """One model over some blocks: an array per block (per-token losses, or a vector), and its first choices."""

    values: tuple[np.ndarray, ...]
    choices: tuple[np.ndarray, ...] = ()

    def save(self) -> dict[str, np.ndarray]:
        """As few arrays of one .npz file."""
        return _joined("values", self.values) | _joined("choices", self.choices)

    @classmethod
    def load(cls, arrays: dict[str, np.ndarray]) -> Reading:
        return cls(_parted("values", arrays), _parted("choices", arrays))


def _joined(name: str, pieces: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """1-D pieces as one array and their ends."""
    if not pieces:
        return {}
    return {name: np.concatenate(pieces), f"{name}_ends": np.cumsum([len(piece) for piece in pieces])}


def _parted(name: str, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return tuple(np.split(arrays[name], arrays[f"{name}_ends"][:-1])) if name in arrays else ()


class Ruler(Protocol):
    """`name` says what the loss is in, for people."""

    name: str

    def read(self, runner: Runner, blocks: Sequence[Block], step: Step = silent) -> Reading: ...
    def differences(self, original: Reading, other: Reading, blocks: Sequence[Block]) -> list[np.ndarray]: ...
    def loss(self, mean: Interval) -> Interval: ...


class NextTokens:
    """Loss of the next token; the first tokens of a window only give context."""

    name = "loss"

    def read(self, runner: Runner, blocks: Sequence[Block], step: Step = silent) -> Reading:
        values, choices = [], []
        for number, block in enumerate(blocks):
            scores = runner.score(block.tokens)
            values.append(-np.asarray(scores.log_probabilities, np.float32)[block.scored_from - 1 :])
            choices.append(np.asarray(scores.top1, np.int32)[block.scored_from - 1 :])
            step(number + 1, len(blocks))
        return Reading(tuple(values), tuple(choices))

    def differences(self, original: Reading, other: Reading, blocks: Sequence[Block]) -> list[np.ndarray]:
        return [b.astype(np.float64) - a for a, b in zip(original.values, other.values, strict=True)]

    def loss(self, mean: Interval) -> Interval:
        return relative(mean)


class MaskedTokens(NextTokens):
    """Loss of hidden tokens: 15% of each block, fixed by the block's own tokens, are replaced by the mask token."""

    def __init__(self, mask_token: int) -> None:
        self.mask_token = mask_token

    def read(self, runner: Runner, blocks: Sequence[Block], step: Step = silent) -> Reading:
        values, choices = [], []
        for number, block in enumerate(blocks):
            hidden = self.hidden(block.tokens)
            tokens = block.tokens.copy()
            tokens[hidden] = self.mask_token
            logits = runner.encode(tokens)[hidden].astype(np.float64)
            losses = log_normalizer(logits) - logits[np.arange(len(hidden)), block.tokens[hidden]]
            values.append(losses.astype(np.float32))
            choices.append(logits.argmax(-1).astype(np.int32))
            step(number + 1, len(blocks))
        return Reading(tuple(values), tuple(choices))

    def hidden(self, tokens: np.ndarray) -> np.ndarray:
        inner = np.arange(1, max(2, len(tokens) - 1))
        generator = np.random.default_rng(np.asarray(tokens, np.uint32))
        return np.sort(generator.choice(inner, max(1, round(0.15 * len(inner))), replace=False))


class Labels:
    """Right answers of a classifier; the loss is in points of accuracy."""

    name = "accuracy points"

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)

    def read(self, runner: Runner, blocks: Sequence[Block], step: Step = silent) -> Reading:
        values, choices = [], []
        for number, block in enumerate(blocks):
            chosen = int(np.argmax(runner.encode(block.tokens)))
            right = chosen == self.index(block.label)
            values.append(np.array([0.0 if right else 1.0], np.float32))
            choices.append(np.array([chosen], np.int32))
            step(number + 1, len(blocks))
        return Reading(tuple(values), tuple(choices))

    def index(self, label: str | None) -> int:
        """A label by the model's own name for it, or by its number."""
        assert label is not None
        folded = [name.lower() for name in self.labels]
        if label.lower() in folded:
            return folded.index(label.lower())
        if label.isdigit() and int(label) < max(len(self.labels), 2):
            return int(label)
        known = ", ".join(self.labels) or "numbers from 0"
        raise Unsupported(f"label {label!r} is not one of this model's", f"its labels: {known}")

    def differences(self, original: Reading, other: Reading, blocks: Sequence[Block]) -> list[np.ndarray]:
        return [b.astype(np.float64) - a for a, b in zip(original.values, other.values, strict=True)]

    def loss(self, mean: Interval) -> Interval:
        return mean


class Embeddings:
    """How far embeddings turned: 1 - cosine to the original's."""

    name = "1 - cosine"

    def read(self, runner: Runner, blocks: Sequence[Block], step: Step = silent) -> Reading:
        values = []
        for number, block in enumerate(blocks):
            values.append(unit(runner.encode(block.tokens)))
            step(number + 1, len(blocks))
        return Reading(tuple(values))

    def differences(self, original: Reading, other: Reading, blocks: Sequence[Block]) -> list[np.ndarray]:
        pairs = zip(original.values, other.values, strict=True)
        return [np.array([0.0 if np.array_equal(a, b) else 1.0 - float(np.dot(a, b))]) for a, b in pairs]

    def loss(self, mean: Interval) -> Interval:
        return mean


class Pairs:
    """Labelled pairs: AUC of the cosine; the loss is in points of AUC.

    The AUC is a mean over examples of how many examples of the other class they are ranked right against, so its
    differences pair per example like any other. Each text has an AUC of its own: examples of two texts are not ranked
    against each other.
    """

    name = "AUC points"

    def read(self, runner: Runner, blocks: Sequence[Block], step: Step = silent) -> Reading:
        values = []
        for number, block in enumerate(blocks):
            assert block.other is not None
            cosine = np.dot(unit(runner.encode(block.tokens)), unit(runner.encode(block.other)))
            values.append(np.array([cosine], np.float32))
            step(number + 1, len(blocks))
        return Reading(tuple(values))

    def differences(self, original: Reading, other: Reading, blocks: Sequence[Block]) -> list[np.ndarray]:
        positive = np.array([str(block.label).lower() not in ("0", "no", "false") for block in blocks])
        sources = np.array([block.source for block in blocks])
        scores = [np.concatenate(reading.values) for reading in (original, other)]
        found = np.empty(len(blocks))
        for own in (sources == name for name in np.unique(sources)):
            placed = [placements(each[own], positive[own]) for each in scores]
            share = positive[own].mean()
            found[own] = (placed[0] - placed[1]) / np.where(positive[own], 2 * share, 2 * (1 - share))
        return [np.array([value]) for value in found]

    def loss(self, mean: Interval) -> Interval:
        return mean


def placements(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """For each example the share of the other class that it is ranked right against (ties count half)."""
    result = np.empty(len(scores))
    for mask, sign in ((positive, 1.0), (~positive, -1.0)):
        others = np.sort(sign * scores[~mask])
        mine = sign * scores[mask]
        below, upto = np.searchsorted(others, mine, "left"), np.searchsorted(others, mine, "right")
        result[mask] = (below + upto) / (2 * max(1, len(others)))
    return result


def log_normalizer(logits: np.ndarray) -> np.ndarray:
    """log of the sum of exponentials over the last axis."""
    top = logits.max(-1, keepdims=True)
    return np.asarray(top[..., 0] + np.log(np.exp(logits - top).sum(-1)))


def unit(vector: np.ndarray) -> np.ndarray:
    """The vector at length 1, float64 so that a cosine of 1 is 1."""
    wide = np.asarray(vector, np.float64).reshape(-1)
    return wide / max(float(np.linalg.norm(wide)), 1e-30)


def ruler_for(spec: Spec, *, pairs: bool = False, mask_token: int | None = None) -> Ruler:
    """The yardstick of this kind of model."""
    if spec.task == "causal-lm":
        return NextTokens()
    if spec.task == "sequence-classification":
        return Labels(spec.head.labels)
    if spec.task == "embedding":
        return Pairs() if pairs else Embeddings()
    if mask_token is None:
        raise Unsupported("this masked model's tokenizer has no mask token", "its loss cannot be measured")
    return MaskedTokens(mask_token)
