"""What measuring asks of something that runs a model: the native executor, or anything with the same face.

Everything in `measure` is written against these two protocols, so that the same yardstick judges the native
executor, a recorded pass, a planted fault, and later a server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from snello.models.spec import Spec

Step = Callable[[int, int], None]  # (done, total)


def silent(done: int, total: int) -> None:
    """A `Step` that says nothing."""


class Scores(Protocol):
    """Of tokens[1:], each given those before it."""

    @property
    def log_probabilities(self) -> np.ndarray: ...  # (T - 1,) float32
    @property
    def top1(self) -> np.ndarray: ...  # (T - 1,) int32


class Sequences(Protocol):
    """One growing sequence."""

    def feed(self, tokens: Any, /) -> np.ndarray: ...  # logits (V,) after the last token
    def close(self) -> None: ...


class Runner(Protocol):
    """A model that runs. `NativeExecutor` is one."""

    spec: Spec
    context: int
    threads: int

    @property
    def weights_bytes(self) -> int: ...
    def bytes_per_token(self, context: int = 0) -> int: ...
    def score(self, tokens: Any, /) -> Scores: ...
    def logits(self, tokens: Any, /, rows: Any = None) -> np.ndarray: ...
    def encode(self, tokens: Any, /) -> np.ndarray: ...
    def session(self) -> Any: ...
    def step(self, sessions: Any, tokens: Sequence[int], /) -> np.ndarray: ...
    def close(self) -> None: ...
