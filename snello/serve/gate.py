"""Who gets in: a queue bounded by tokens, a share of it for each key, a door that closes when the server ends.

What a request may cost is known when it comes: its prompt and the most that it may be answered, for each answer. The
sum over all that are inside is bounded. Who would not fit is told so at once, with the seconds after which it would, as
tokens have left until now, instead of waiting for an answer that comes too late. A server that is idle lets any request
in.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from snello.serve.errors import RATE_LIMITED, RequestError
from snello.serve.keys import Caller

LEAST_RETRY, MOST_RETRY = 1, 60  # seconds
FIRST_GUESS = 50.0  # tokens a second, before anything was answered
LEARN = 0.1  # of each request, when there were some


class Gate:
    """The door of one model.

    Args:
        queue_tokens: that may be inside. key_share: of them, for one key; 1 where there is only one.
    """

    def __init__(self, queue_tokens: int, key_share: float = 1.0) -> None:
        self.queue_tokens, self.key_share = queue_tokens, key_share
        self.inside = 0  # tokens
        self.requests = 0  # inside
        self.closed = False
        self._by_key: Counter[str] = Counter()
        self._rate, self._learned = FIRST_GUESS, 0  # tokens that leave a second, of how many requests
        self.refused: Counter[str] = Counter()  # by reason

    @contextmanager
    def admitted(self, caller: Caller, tokens: int) -> Iterator[None]:
        """Inside as long as the block runs.

        Raises:
            RequestError: 503: the server ends, or is full; 429: this key has its share.
        """
        self._check(caller, tokens)
        self.inside += tokens
        self.requests += 1
        self._by_key[caller.salt] += tokens
        started = time.monotonic()
        try:
            yield
            self._learn(tokens, time.monotonic() - started)  # who is given up says nothing of how long an answer takes
        finally:
            self.inside -= tokens
            self.requests -= 1
            self._by_key[caller.salt] -= tokens
            if not self._by_key[caller.salt]:
                del self._by_key[caller.salt]

    def check_open(self) -> None:
        """Raises RequestError 503 where the server ends; what is known already is refused then too."""
        if self.closed:
            self.refused["draining"] += 1
            raise RequestError("the server is shutting down", code="shutting_down", status=503, retry_after=LEAST_RETRY)

    def _check(self, caller: Caller, tokens: int) -> None:
        self.check_open()
        if self.requests and self.inside + tokens > self.queue_tokens:
            self.refused["full"] += 1
            message = f"the queue is full: {self.inside:,} of {self.queue_tokens:,} tokens are asked for already"
            raise RequestError(message, code="overloaded", status=503, retry_after=self._retry(caller, tokens))
        mine, share = self._by_key[caller.salt], self._share
        if mine and mine + tokens > share:
            self.refused["key"] += 1
            message = f"this key has asked for {mine:,} tokens already, of the {share:,} that it may have in the queue"
            raise RequestError(
                message, code="rate_limit_exceeded", status=RATE_LIMITED, retry_after=self._retry(caller, tokens)
            )

    @property
    def _share(self) -> float:
        """Of one key, in tokens."""
        return int(self.queue_tokens * self.key_share) if self.key_share < 1 else math.inf

    def _learn(self, tokens: int, seconds: float) -> None:
        """Tokens that left a second, when as many were inside as are."""
        if seconds > 0:
            self._learned += 1
            self._rate += max(LEARN, 1 / self._learned) * (tokens / seconds * self.requests - self._rate)

    def _retry(self, caller: Caller, tokens: int) -> int:
        """Seconds until so many tokens have left that this request fits, of the queue and of its key's share."""
        mine = self._by_key[caller.salt]
        shares = ((self.inside, self.queue_tokens, 1.0), (mine, self._share, mine / max(1, self.inside)))
        waits = [
            min(inside, inside + tokens - most) / max(self._rate * part, 1.0)  # what is larger waits for all to leave
            for inside, most, part in shares
        ]
        return max(LEAST_RETRY, min(MOST_RETRY, math.ceil(max(waits))))
