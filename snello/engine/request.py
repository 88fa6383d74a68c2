"""What is asked of a model and what comes back: sampling parameters, completions, usage.

Names and meanings are vLLM's, so that who knows them guesses right; a foreign or misspelt name is an error that says
ours. Values are checked here, once, at the edge.
"""

from __future__ import annotations

import dataclasses
import difflib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from snello.errors import SnelloError

FinishReason = Literal["stop", "length", "error"]
FOREIGN_NAMES = {"max_new_tokens": "max_tokens", "n_predict": "max_tokens", "num_predict": "max_tokens"}


class Matcher(Protocol):
    """How far one answer has come in its grammar. What is allowed is a function of the tokens so far, so neither the
    batch nor a guess changes it.
    """

    def masked(self, logits: np.ndarray) -> np.ndarray: ...  # (V,): -inf where not allowed
    def guessed(self, logits: np.ndarray, ahead: Sequence[int]) -> np.ndarray: ...  # after `ahead`; nothing is said
    def accept(self, token: int) -> None: ...
    @property
    def finished(self) -> bool: ...  # nothing but an end token may follow


class Grammar(Protocol):
    """What an answer may be; `grammar.py` has one. `source` tells it from all others."""

    @property
    def source(self) -> str: ...
    def start(self) -> Matcher: ...


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. Defaults draw from the model as it is; temperature 0 takes the most likely token.

    Attributes:
        max_tokens: most tokens of the answer.
        temperature, top_p, top_k, min_p: top_k 0 (or -1) means all.
        repetition_penalty: over prompt and answer (Keskar et al. 2019); presence and frequency: over the answer.
        seed: None draws one. The same seed gives the same tokens, whatever else runs.
        stop: strings that end the answer (not part of it unless `include_stop_str_in_output`).
        logprobs: per token the log-probability and this many alternatives; None: nothing. Always of the model itself:
            before bias, penalties, temperature and grammar.
        grammar: only its texts are drawn; the answer ends where it does.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | Sequence[str] = ()  # kept as a tuple
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    n: int = 1
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        _check("max_tokens", self.max_tokens, 1, None, whole=True)
        _check("temperature", self.temperature, 0, 100)
        _check("top_p", self.top_p, 0, 1, open_low=True)
        _check("top_k", self.top_k, 0, None, whole=True)
        _check("min_p", self.min_p, 0, 1)
        _check("repetition_penalty", self.repetition_penalty, 0, 100, open_low=True)
        _check("presence_penalty", self.presence_penalty, -2, 2)
        _check("frequency_penalty", self.frequency_penalty, -2, 2)
        _check("n", self.n, 1, 128, whole=True)
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, 0, 100, whole=True)
        if any(not text for text in self.stops):
            raise SnelloError("a stop string is empty", "leave it out: an empty string would end every answer")

    @classmethod
    def from_names(cls, names: Mapping[str, Any]) -> SamplingParams:
        """From keywords; an unknown one is an error that names the nearest of ours."""
        known = {f.name for f in dataclasses.fields(cls)}
        for name in names:
            if name not in known:
                near = FOREIGN_NAMES.get(name) or next(iter(difflib.get_close_matches(name, known, 1)), None)
                hint = f"use {near}" if near else f"known: {', '.join(sorted(known))}"
                raise SnelloError(f"unknown sampling parameter {name!r}", hint)
        return cls(**names)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return tuple(self.stop)

    @property
    def drawn_seed(self) -> int:
        """The seed, or a fresh one."""
        return secrets.randbits(63) if self.seed is None else self.seed & (2**64 - 1)


GENERATION_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def defaults_from_generation(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling defaults that a checkpoint's generation_config.json states (only where it says `do_sample`)."""
    if not generation.get("do_sample"):
        return {}
    return {name: generation[name] for name in GENERATION_NAMES if generation.get(name) is not None}


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), most likely first


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Of one answer, or of all answers to one prompt. Seconds count from when it was asked."""

    prompt_tokens: int
    completion_tokens: int
    first_token_seconds: float
    seconds: float  # of the whole answer
    cached_tokens: int = 0  # of the prompt: not computed, their keys and values were there

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first over the time they took."""
        rest = self.seconds - self.first_token_seconds
        return (self.completion_tokens - 1) / rest if rest > 0 and self.completion_tokens > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class Completion:
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Output:
    """Answer(s) to one prompt; `.text` and `.token_ids` are the first's."""

    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Completion, ...]
    usage: Usage

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.outputs[0].finish_reason


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One piece of a streamed answer; `finish_reason` and `usage` come with the last, whose text may be empty.

    `index` tells the `n` answers to one prompt apart. `error` comes with the finish reason "error".
    """

    text: str
    index: int = 0
    token_id: int | None = None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: SnelloError | None = None


def _check(
    name: str, value: float, low: float, high: float | None, *, open_low: bool = False, whole: bool = False
) -> None:
    wrong = not isinstance(value, int if whole else int | float) or isinstance(value, bool)
    if wrong or value != value or value < low or (open_low and value == low) or (high is not None and value > high):
        upper = "" if high is None else f" and at most {high:g}"
        bound = f"over {low:g}" if open_low else f"at least {low:g}"
        kind = "a whole number, " if whole else ""
        raise SnelloError(f"{name} is {value!r}", f"{name} must be {kind}{bound}{upper}")
