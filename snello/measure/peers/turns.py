"""Several loaded engines, measured in turn: A B C, then C B A, for every round, so that drift falls on all alike.

A worker is a process that speaks lines: it says what it is once it is loaded and warm, and answers each `go` with its
measurements. Between any two turns the memory's bandwidth is looked at: other tenants of a machine move it by half
within seconds, and a share of a bandwidth of another minute means nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from snello.errors import SnelloError

PACKAGE_ROOT = Path(__file__).resolve().parents[3]
TAIL_LINES = 5
PATIENCE_SECONDS = 30.0  # for a worker to leave

Bandwidth = Callable[[], float]  # GB/s at this moment
Told = Callable[[str], None]


class Turn(Protocol):
    """Something that can be measured. `Worker` is one."""

    ready: dict[str, Any]

    def go(self) -> dict[str, Any]: ...


class Worker:
    """A running worker; it leaves when its input is closed."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        paths = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **(variables or {}), "PYTHONPATH": os.pathsep.join(paths)},
            )
        self.ready: dict[str, Any] = {}

    def load(self) -> None:
        """Waits until it is loaded and warm."""
        self.ready = self._read()

    def go(self) -> dict[str, Any]:
        """One turn."""
        return self.ask("go")

    def score(self, prompt: Sequence[int], answer: Sequence[int], logits: Path) -> None:
        """Writes the logits (len(answer), V) from which it would have chosen this answer to this prompt."""
        self.ask(json.dumps({"prompt": list(prompt), "answer": list(answer), "logits": str(logits)}))

    def ask(self, request: str) -> dict[str, Any]:
        """Sends one line; the line that comes back."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: reading says why
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()][-TAIL_LINES:]
            said = "\n".join(f"  {line}" for line in tail) or "  nothing"
            raise SnelloError(f"{self.name} ended while it was measured", f"the end of {self.log}:\n{said}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended before
            self.process.stdin.close()
        try:
            self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@dataclass
class Series:
    """What one contender said: its last description, its speeds and the bandwidth around them, one per turn."""

    description: dict[str, Any]
    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)

    def add(self, answer: Mapping[str, Any], bandwidth: float) -> None:
        decode, prefill = answer["decode_tokens_per_second"], answer["prefill_tokens_per_second"]
        self.bandwidth += [bandwidth] * len(decode)
        self.decode += decode
        self.prefill += prefill
        self.describe(answer)

    def describe(self, answer: Mapping[str, Any]) -> None:
        figures = ("decode_tokens_per_second", "prefill_tokens_per_second", "first_tokens")
        self.description = {name: value for name, value in answer.items() if name not in figures}


def in_turn(workers: Mapping[str, Turn], rounds: int, bandwidth: Bandwidth, told: Told) -> dict[str, Series]:
    """A B C C B A, so often, with a look at the bandwidth between any two."""
    series = {name: Series({}) for name in workers}
    for number in range(rounds):
        before = bandwidth()
        for name in [*workers, *reversed(list(workers))]:
            answer = workers[name].go()
            after = bandwidth()
            series[name].add(answer, (before + after) / 2)
            before = after
        speeds = ", ".join(f"{name} {series[name].decode[-1]:.1f}" for name in workers)
        told(f"round {number + 1} of {rounds}: {speeds} tokens a second")
    return series
