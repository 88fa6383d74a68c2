"""Logits in, tokens and log-probabilities out: drawing, the most likely, two models compared. All in the core, whose
numbers are the same on every machine; NumPy's exponentials and logarithms are not.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from snello.errors import SnelloError
from snello.native.core import Floats, Ints, check
from snello.native.library import CSampling, last_error, library


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """See `snello_sampling` in csrc/snello.h."""

    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_k: int = 0
    biases: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    @cached_property
    def as_c(self) -> tuple[CSampling, Ints, Floats]:
        """For the core, made once for all draws, and the arrays that it points into."""
        tokens = np.array(list(self.biases), np.int32)
        values = np.array(list(self.biases.values()), np.float32)
        settings = CSampling(
            self.temperature,
            self.top_p,
            self.min_p,
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
            self.top_k,
            len(tokens),
            tokens.ctypes.data,
            values.ctypes.data,
            self.seed,
        )
        return settings, tokens, values


def sample(
    logits: Floats, sampling: Sampling, history: Sequence[int], num_prompt: int, position: int, *, scored: bool = True
) -> tuple[int, float]:
    """(token, its log-probability under the raw logits, or NaN unless `scored`). history: prompt, then answer.

    Raises:
        SnelloError: no logit is finite.
    """
    logits = np.ascontiguousarray(logits, np.float32)
    past = np.asarray(history, np.int32)
    settings, _, _ = sampling.as_c
    log_probability = np.full(1, np.nan, np.float32)
    rest = (past.ctypes.data, len(past), num_prompt, position, log_probability.ctypes.data if scored else None)
    token = library().snello_sample(logits.ctypes.data, len(logits), c.byref(settings), *rest)
    if token < 0:
        raise SnelloError(last_error(), "the sampling settings exclude every token, or the logits are not finite")
    return int(token), float(log_probability[0])


def top(logits: Floats, count: int) -> tuple[Ints, Floats]:
    """The `count` most likely tokens of one row of logits (V,), most likely first, and their log-probabilities.

    Ties go to the lowest id; fewer than `count` where there are fewer tokens.

    Raises:
        CoreError: a logit is NaN, or none is finite.
    """
    logits = np.ascontiguousarray(logits, np.float32)
    tokens, under = np.empty(count, np.int32), np.empty(count, np.float32)
    found = library().snello_top(logits.ctypes.data, len(logits), count, tokens.ctypes.data, under.ctypes.data)
    check(found)
    return tokens[:found], under[:found]


@dataclass(frozen=True)
class Comparison:
    """Per row (M,): log-probabilities of the target, KL(a || b) in nats, most likely tokens."""

    log_probability_a: Floats
    log_probability_b: Floats
    divergence: Floats
    top1_a: Ints
    top1_b: Ints


def compare(a: Floats, b: Floats, targets: Ints) -> Comparison:
    """Two sets of logits (M, V) for the same rows."""
    a, b = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)
    targets = np.ascontiguousarray(targets, np.int32)
    rows, vocabulary = a.shape
    assert b.shape == a.shape and targets.shape == (rows,)
    under_a, under_b, divergence = (np.empty(rows, np.float32) for _ in range(3))
    top1_a, top1_b = (np.empty(rows, np.int32) for _ in range(2))
    outputs = [array.ctypes.data for array in (under_a, under_b, divergence, top1_a, top1_b)]
    check(library().snello_compare(a.ctypes.data, b.ctypes.data, rows, vocabulary, targets.ctypes.data, *outputs))
    return Comparison(under_a, under_b, divergence, top1_a, top1_b)
