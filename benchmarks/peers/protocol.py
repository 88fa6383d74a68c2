"""How the driver talks to an engine's worker, whatever that engine is.

A worker loads its model once, says what it is in one JSON line, and then answers every `go` line on its standard
input with one JSON line of measurements, so that several engines can stay loaded and be measured in turn.  Standard
output belongs to these lines alone: whatever a library prints goes to standard error.

Decode speed is counted the same way for all: the first token ends the prefill, and the tokens after it, divided by
the time they took, are the decode speed.  Prompts are random token ids that no two measurements share, so no engine
can answer from a cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

PROMPT_IDS = range(300, 32000)  # in range for every shape, and clear of special tokens
SHOWN_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One prompt read and one answer generated."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    tokens: list[int]


class Engine(Protocol):
    """A loaded model that can be measured again and again."""

    def describe(self) -> dict[str, Any]:
        """Engine, version, settings, bytes read per token (None while unknown); resident bytes if not its own."""

    def measure(self, index: int) -> Measurement:
        """The `index`-th measurement of this worker; each has a prompt of its own."""


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every worker takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", type=int, default=32, metavar="TOKENS")
    parser.add_argument("--generate", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=1, help="measurements in answer to one `go`")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def random_prompt(length: int, seed: int, index: int) -> list[int]:
    """The prompt of one measurement, the same for every engine that is given the same seed."""
    return random.Random(seed * 1_000_003 + index).choices(PROMPT_IDS, k=length)


def resident_bytes(pid: int | str = "self") -> int:
    """What a process holds in memory now, mapped files included."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no VmRSS for process {pid}")


def claim_stdout() -> TextIO:
    """Keeps the real standard output for the protocol and points descriptor 1 at standard error."""
    protocol = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return protocol


def answer(engine: Engine, measurements: list[Measurement]) -> dict[str, Any]:
    """One line of the protocol."""
    return {
        "resident_bytes": resident_bytes(),
        **engine.describe(),
        "decode_tokens_per_second": [m.decode_tokens_per_second for m in measurements],
        "prefill_tokens_per_second": [m.prefill_tokens_per_second for m in measurements],
        "first_tokens": [m.tokens[:SHOWN_TOKENS] for m in measurements],
    }


def serve(engine: Engine, repeats: int, lines: TextIO) -> None:
    """Says what is loaded, then answers `go` until the input ends."""
    print(json.dumps(answer(engine, [])), file=lines)
    index = 0
    for line in sys.stdin:
        if line.strip() != "go":
            raise ValueError(f"expected `go`, got {line!r}")
        measurements = [engine.measure(index + i) for i in range(repeats)]
        index += repeats
        print(json.dumps(answer(engine, measurements)), file=lines)
