"""One answer: logits in, tokens and text out, until something ends it.

It owns the order of things: draw, decode to text, look for stop strings, finish. Text that may be the beginning of a
stop string or of a character is held back. It knows nothing of other answers or of where its logits come from; a draw
depends on (seed, position, logits) alone, so guesses that were verified change nothing.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from snello.engine.request import Chunk, FinishReason, SamplingParams, TokenLogprob, Usage
from snello.errors import SnelloError
from snello.models.spec import Spec
from snello.models.tokenizer import StreamDecoder
from snello.native.logits import Sampling, compare, sample, top


class Answer:
    """One answer in the making.

    Args:
        spec: of the model: its vocabulary and end tokens.
        prompt: its tokens; `context` is how long prompt and answer may be together.
        seed: of the draws. `index`: which of the `params.n` answers this is.

    Raises:
        SnelloError: `logit_bias` names a token that the model does not have.
    """

    def __init__(
        self,
        spec: Spec,
        prompt: Sequence[int],
        params: SamplingParams,
        decoder: StreamDecoder,
        *,
        context: int,
        seed: int,
        index: int = 0,
    ) -> None:
        self.params, self.index, self._decoder = params, index, decoder
        self.history = array("i", prompt)
        self.num_prompt = len(prompt)
        self.max_length = min(context, self.num_prompt + params.max_tokens)
        self.num_cached = 0
        self._sampling = _sampling(params, spec, seed)
        penalties = (params.repetition_penalty - 1, params.presence_penalty, params.frequency_penalty)
        self._penalized = any(penalties)  # only then the core looks at the history
        self.ends = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else spec.eos_tokens)
        self._matcher = None if params.grammar is None else params.grammar.start()
        self._pending = ""
        self._started = time.perf_counter()
        self._first_token_seconds = 0.0
        self.finished = False

    def take(self, logits: np.ndarray, guesses: Sequence[int] = ()) -> tuple[list[int], list[Chunk]]:
        """Draws the tokens after these rows of logits (1 + guesses, V).

        The row after a guess counts only if the guess was drawn. Returns the tokens and what can be shown of them.

        Raises:
            SnelloError: the settings exclude every token.
        """
        tokens: list[int] = []
        chunks: list[Chunk] = []
        for row, logit in enumerate(logits):
            token, logprob = self._draw(logit)
            tokens.append(token)
            chunks += self._after(token, logprob)
            if self.finished or row >= len(guesses) or token != guesses[row]:
                break
        return tokens, chunks

    def guess(self, logits: np.ndarray, ahead: Sequence[int]) -> int:
        """What would be drawn from these logits if `ahead` were said next. Nothing is said by that.

        Raises:
            SnelloError: the settings exclude every token.
        """
        if self._matcher is not None:
            logits = self._matcher.guessed(logits, ahead)
        history, num_prompt = (self.history + array("i", ahead), self.num_prompt) if self._penalized else ((), 0)
        token, _ = sample(logits, self._sampling, history, num_prompt, len(self.history) + len(ahead), scored=False)
        return token

    def fail(self, error: SnelloError) -> Chunk:
        """The last chunk of an answer that cannot go on."""
        self.finished = True
        return Chunk(text="", index=self.index, finish_reason="error", usage=self.usage(), error=error)

    def usage(self) -> Usage:
        """Tokens and seconds so far."""
        return Usage(
            prompt_tokens=self.num_prompt,
            completion_tokens=len(self.history) - self.num_prompt,
            cached_tokens=self.num_cached,
            first_token_seconds=self._first_token_seconds,
            seconds=time.perf_counter() - self._started,
        )

    def _draw(self, logits: np.ndarray) -> tuple[int, TokenLogprob | None]:
        history, num_prompt = (self.history, self.num_prompt) if self._penalized else ((), 0)
        allowed = logits if self._matcher is None else self._matcher.masked(logits)
        scored = self.params.logprobs is not None and allowed is logits
        token, logprob = sample(allowed, self._sampling, history, num_prompt, len(self.history), scored=scored)
        if not self._first_token_seconds:
            self._first_token_seconds = time.perf_counter() - self._started
        if self.params.logprobs is None:
            return token, None
        if allowed is not logits:
            logprob = _logprob(logits, token)
        return token, TokenLogprob(token_id=token, logprob=logprob, top=top_of(logits, self.params.logprobs))

    def _after(self, token: int, logprob: TokenLogprob | None) -> Iterator[Chunk]:
        self.history.append(token)
        if token in self.ends:
            yield self._finish("stop")
            return
        if self._matcher is not None:
            self._matcher.accept(token)
        self._pending += self._decoder.feed(token)
        text, stopped = self._release(final=False)
        yield Chunk(text=text, index=self.index, token_id=token, logprob=logprob)
        if stopped:
            yield self._last("", "stop")
        elif self._matcher is not None and self._matcher.finished:
            yield self._finish("stop")
        elif len(self.history) >= self.max_length:
            yield self._finish("length")

    def _finish(self, reason: FinishReason) -> Chunk:
        self._pending += self._decoder.flush()
        text, stopped = self._release(final=True)
        return self._last(text, "stop" if stopped else reason)

    def _last(self, text: str, reason: FinishReason) -> Chunk:
        self.finished = True
        return Chunk(text=text, index=self.index, finish_reason=reason, usage=self.usage())

    def _release(self, *, final: bool) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop string ended the answer."""
        cut = _find_stop(self._pending, self.params.stops)
        if cut is not None:
            start, end = cut
            text = self._pending[: end if self.params.include_stop_str_in_output else start]
            self._pending = ""
            return text, True
        held = 0 if final else _held_back(self._pending, self.params.stops)
        text = self._pending[: len(self._pending) - held]
        self._pending = self._pending[len(text) :]
        return text, False


def _sampling(params: SamplingParams, spec: Spec, seed: int) -> Sampling:
    outside = [token for token in params.logit_bias if not 0 <= token < spec.vocab_size]
    if outside:
        raise SnelloError(f"logit_bias names token {outside[0]}", f"the vocabulary has {spec.vocab_size:,} tokens")
    return Sampling(
        temperature=params.temperature,
        top_p=params.top_p,
        min_p=params.min_p,
        top_k=min(params.top_k, spec.vocab_size),
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        biases=dict(params.logit_bias),
        seed=seed,
    )


def _find_stop(text: str, stops: tuple[str, ...]) -> tuple[int, int] | None:
    """(start, end) of the stop string that comes first."""
    found = [(text.index(stop), stop) for stop in stops if stop in text]
    if not found:
        return None
    start, stop = min(found, key=lambda item: (item[0], -len(item[1])))
    return start, start + len(stop)


def _held_back(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end may be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest


def _logprob(logits: np.ndarray, token: int) -> float:
    """Of a token under logits that it was not drawn from."""
    row = logits[np.newaxis]
    return float(compare(row, row, np.array([token], np.int32)).log_probability_a[0])


def top_of(logits: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most likely tokens of a row of logits (V,) with their log-probabilities, most likely first."""
    if not count:
        return ()
    tokens, under = top(logits, count)
    return tuple(zip(tokens.tolist(), under.tolist(), strict=True))
