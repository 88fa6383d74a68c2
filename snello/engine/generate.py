"""One stream of tokens: prompt in, chunks out, as a generator that everything consumes.

Command line, Python API and server read the same generator. It owns the order of things: feed, sample, decode to text,
look for stop strings, finish. Text that may be the beginning of a stop string or of a character is held back.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from snello.engine.native import NativeExecutor, Session
from snello.engine.request import Chunk, FinishReason, SamplingParams, TokenLogprob, Usage
from snello.errors import SnelloError
from snello.models.tokenizer import StreamDecoder
from snello.native import core


def generate(
    executor: NativeExecutor, prompt: Sequence[int], params: SamplingParams, decoder: StreamDecoder
) -> Iterator[Chunk]:
    """Draws tokens until an end token, a stop string, `max_tokens` or the end of the context.

    Yields:
        Chunk: text as it becomes certain; the last one carries `finish_reason` and `usage`.
    """
    with executor.session() as session:
        yield from _Stream(executor, session, list(prompt), params, decoder).run()


class _Stream:
    def __init__(
        self,
        executor: NativeExecutor,
        session: Session,
        prompt: list[int],
        params: SamplingParams,
        decoder: StreamDecoder,
    ) -> None:
        self.executor, self.session, self.params, self.decoder = executor, session, params, decoder
        self.history = prompt
        self.num_prompt = len(prompt)
        self.sampling = core.Sampling(
            temperature=params.temperature,
            top_p=params.top_p,
            min_p=params.min_p,
            top_k=params.top_k,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            biases=dict(params.logit_bias),
            seed=params.drawn_seed,
        )
        self.ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(executor.spec.eos_tokens))
        self.pending = ""
        self.first_token_seconds = 0.0
        self.started = time.perf_counter()

    def run(self) -> Iterator[Chunk]:
        self.check()
        logits = self.session.feed(self.history)
        self.first_token_seconds = time.perf_counter() - self.started
        while True:
            token, logprob = self.draw(logits)
            self.history.append(token)
            if token in self.ends:
                yield from self.finish("stop")
                return
            text, stopped = self.text_of(token)
            yield Chunk(text=text, token_id=token, logprob=logprob)
            if stopped:
                yield Chunk(text="", finish_reason="stop", usage=self.usage())
                return
            answered = len(self.history) - self.num_prompt
            if answered >= self.params.max_tokens or len(self.history) >= self.executor.context:
                yield from self.finish("length")
                return
            logits = self.session.feed([token])

    def check(self) -> None:
        if self.num_prompt >= self.executor.context:
            raise self.executor.overflow(self.num_prompt)
        vocabulary = self.executor.spec.vocab_size
        outside = [token for token in self.params.logit_bias if not 0 <= token < vocabulary]
        if outside:
            raise SnelloError(f"logit_bias names token {outside[0]}", f"the vocabulary has {vocabulary:,} tokens")

    def draw(self, logits: np.ndarray) -> tuple[int, TokenLogprob | None]:
        token, logprob = core.sample(logits, self.sampling, self.history, self.num_prompt, len(self.history))
        if self.params.logprobs is None:
            return token, None
        return token, TokenLogprob(token_id=token, logprob=logprob, top=_top(logits, self.params.logprobs))

    def text_of(self, token: int) -> tuple[str, bool]:
        """The text that is certain after this token, and whether a stop string ended the answer."""
        self.pending += self.decoder.feed(token)
        return self.release(final=False)

    def release(self, *, final: bool) -> tuple[str, bool]:
        cut = _find_stop(self.pending, self.params.stops)
        if cut is not None:
            start, end = cut
            text = self.pending[: end if self.params.include_stop_str_in_output else start]
            self.pending = ""
            return text, True
        held = 0 if final else _held_back(self.pending, self.params.stops)
        text = self.pending[: len(self.pending) - held]
        self.pending = self.pending[len(text) :]
        return text, False

    def finish(self, reason: FinishReason) -> Iterator[Chunk]:
        self.pending += self.decoder.flush()
        text, stopped = self.release(final=True)
        yield Chunk(text=text, finish_reason="stop" if stopped else reason, usage=self.usage())

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.num_prompt,
            completion_tokens=len(self.history) - self.num_prompt,
            first_token_seconds=self.first_token_seconds,
            seconds=time.perf_counter() - self.started,
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


def _top(logits: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    shifted = logits.astype(np.float64) - logits.max()
    normal = shifted - np.log(np.exp(shifted).sum())
    best = np.argsort(-normal, kind="stable")[:count]
    return tuple((int(token), float(normal[token])) for token in best)
