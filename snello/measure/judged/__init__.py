"""What can be judged beside an original: a model that we run, a GGUF file in llama.cpp, a server of OpenAI's protocol.

All of them answer for the original's own tokens. What one cannot tell (a server gives no distributions) is None, never
guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from snello.measure.guards import Divergence, Habits
from snello.measure.rulers import Reading, Ruler
from snello.measure.runner import Runner, Step
from snello.measure.text import Block


class Judged(Protocol):
    """One artefact, opened. `kind` says what runs it, for people; `longest`: tokens that it reads at once, if known."""

    kind: str
    longest: int | None

    def facts(self) -> dict[str, Any]: ...
    def read(self, ruler: Ruler, blocks: Sequence[Block], step: Step) -> Reading: ...
    def divergence(self, original: Runner, blocks: Sequence[Block], *, seed: int, step: Step) -> Divergence | None: ...
    def habits(self, prompts: Sequence[Sequence[int]], *, most: int, step: Step) -> Habits: ...
    def close(self) -> None: ...
