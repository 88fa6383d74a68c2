"""What the engine said, as OpenAI response bodies. Plain values in, plain values out; no clock, no network.

Bodies are tables in the order of OpenAI's reference. `created` and ids are the caller's: a server takes them from its
clock, a file of requests from the request.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from snello.engine.request import Chunk, TokenLogprob, Usage
from snello.models.tokenizer import REPLACEMENT, Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no infinity


@dataclass(frozen=True, kw_only=True)
class Head:
    """What every body begins with. `created`: seconds since 1970."""

    id: str
    model: str
    created: int = 0


@dataclass(kw_only=True)
class Choice:
    """One answer as it grows. `before`: the last token of its prompt; `prompt`: its text, where it is echoed."""

    before: int
    prompt: str = ""
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    usage: Usage | None = None

    def take(self, chunk: Chunk) -> None:
        self.pieces.append(chunk.text)
        if chunk.logprob is not None and self.logprobs is not None:
            self.logprobs.append(chunk.logprob)
        self.finish_reason, self.usage = chunk.finish_reason, chunk.usage or self.usage

    @property
    def cached_tokens(self) -> int:
        return self.usage.cached_tokens if self.usage is not None else 0

    @property
    def text(self) -> str:
        return self.prompt + "".join(self.pieces)


def chat_body(head: Head, choices: Sequence[Choice], usage: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    rows = [
        {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": None if choice.logprobs is None else chat_logprobs(choice.before, choice.logprobs, tokenizer),
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(choices)
    ]
    return body_of(head, "chat.completion", rows, usage)


def completion_body(
    head: Head, choices: Sequence[Choice], usage: Mapping[str, Any], tokenizer: Tokenizer
) -> dict[str, Any]:
    rows = [
        {
            "text": choice.text,
            "index": index,
            "logprobs": None
            if choice.logprobs is None
            else completion_logprobs(choice.before, choice.logprobs, tokenizer),
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(choices)
    ]
    return body_of(head, "text_completion", rows, usage)


def embedding_body(head: Head, vectors: Sequence[np.ndarray], num_tokens: int, *, as_base64: bool) -> dict[str, Any]:
    rows = [
        {"object": "embedding", "index": index, "embedding": _vector(vector, as_base64)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": rows, "model": head.model, "usage": usage}


def usage_body(prompt_tokens: int, completion_tokens: int, cached_tokens: int | None = None) -> dict[str, Any]:
    """Counts of tokens. `cached_tokens` is a fact of the moment, not of the request: None leaves it out."""
    counts: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    return counts if cached_tokens is None else counts | {"prompt_tokens_details": {"cached_tokens": cached_tokens}}


def body_of(head: Head, kind: str, choices: Sequence[Any], usage: Mapping[str, Any] | None) -> dict[str, Any]:
    """A whole body, or one chunk of a stream; `usage` None stands for a chunk that does not say it."""
    return {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "choices": list(choices),
        "usage": usage and dict(usage),
    }


def _vector(vector: np.ndarray, as_base64: bool) -> str | list[float]:
    if as_base64:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(str(value)) for value in vector.astype(np.float32)]  # the shortest digits that give it back


# ---- log-probabilities ----------------------------------------------------------------------------------------------


def spelling(tokenizer: Tokenizer, before: int, token: int) -> str:
    """How a token reads after the one before it; special tokens by their names."""
    first, both = (tokenizer.decode(ids, skip_special=False) for ids in ([before], [before, token]))
    if both.startswith(first) and not first.endswith(REPLACEMENT):
        return both[len(first) :]
    return tokenizer.decode([token], skip_special=False)


def chat_logprobs(before: int, logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """Of tokens that follow each other and the token `before`."""
    content = []
    for drawn in logprobs:
        top = [_entry(tokenizer, before, token, logprob) for token, logprob in drawn.top]
        content.append({**_entry(tokenizer, before, drawn.token_id, drawn.logprob), "top_logprobs": top})
        before = drawn.token_id
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, before: int, token: int, logprob: float) -> dict[str, Any]:
    """`bytes` is null for a token that holds part of a character."""
    text = spelling(tokenizer, before, token)
    return {
        "token": text,
        "logprob": max(logprob, LEAST_LOGPROB),
        "bytes": None if REPLACEMENT in text else list(text.encode()),
    }


def completion_logprobs(
    before: int, logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer, offset: int = 0
) -> dict[str, Any]:
    """Parallel lists. In `top_logprobs` the drawn token is always there; of two with one spelling the likelier.

    Args:
        offset: characters of the choice's text before these tokens.
    """
    tokens: list[str] = []
    tops: list[dict[str, float]] = []
    offsets: list[int] = []
    for drawn in logprobs:
        top: dict[str, float] = {}
        for token, logprob in [*drawn.top, (drawn.token_id, drawn.logprob)]:
            top.setdefault(spelling(tokenizer, before, token), max(logprob, LEAST_LOGPROB))
        tokens.append(spelling(tokenizer, before, drawn.token_id))
        tops.append(top)
        offsets.append(offset)
        before, offset = drawn.token_id, offset + len(tokens[-1])
    values = [max(drawn.logprob, LEAST_LOGPROB) for drawn in logprobs]
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
