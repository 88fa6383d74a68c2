"""Measures one engine, whatever it is: loads its file, then answers every `go` line with one JSON line.

Standard output belongs to these lines alone: whatever a library prints goes to standard error. A worker loads its model
once and says what it is, so that several engines can stay loaded and be measured in turn.

An engine's file has `open_engine`, whose engine says when each token of each answer came. All else is counted here, the
same way for all. Prompt speed is of one prompt that nobody has seen, alone, until its first token. Decode speed is of
all streams together, over the time in which every one of them is between its first token and its last. One stream reads
a new prompt each time. Several streams, whose prompts all differ, keep theirs from one measurement to the next: the
warm-up reads them, an engine may keep what it computed of them, and only what comes after is counted.

    echo go | PYTHON worker.py engine_llamacpp.py MODEL --prompt 512 --streams 8

Where a request is a JSON object, {"prompt": IDS, "answer": IDS, "logits": FILE}, the engine is given the answer instead
of choosing it, and the logits that it would have chosen from go into the file: (len(answer), V) float32.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

FIRST_WORD = 300  # clear of special tokens in every vocabulary
MOST_WORDS = 32000
SHOWN_TOKENS = 8

Answer = tuple[list[int], list[float]]  # tokens, and the moment of `time.perf_counter` at which each came


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What an engine is opened for: lengths in tokens, prompts that are read together, and options of its own."""

    model: str
    prompt: int
    generate: int
    streams: int
    threads: int
    options: dict[str, str]


class Engine(Protocol):
    """A loaded model. Answers are greedy, of exactly `generate` tokens each; all prompts start together."""

    def describe(self) -> dict[str, Any]: ...  # engine, version, settings, bytes_per_token
    def answer(self, prompts: list[list[int]], generate: int) -> Sequence[Answer]: ...
    def score(self, prompt: list[int], answer: list[int]) -> np.ndarray: ...  # logits (len(answer), V)


@dataclass(frozen=True)
class Measurement:
    """Speeds of one prompt read and of all answers together, and how the first answer begins."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    tokens: list[int]


def random_prompt(length: int, words: int, seed: int, index: int) -> list[int]:
    """The prompt with this number, the same for every engine that is given the same seed.

    The generator starts from a text: from a number it would take the absolute value, and -1 and 1 would be one prompt.
    """
    first = min(FIRST_WORD, words // 2)
    return random.Random(f"{seed}/{index}").choices(range(first, min(words, MOST_WORDS)), k=length)


def decode_speed(answers: Sequence[Answer]) -> float:
    """Tokens a second of all answers while all of them run."""
    first = max(moments[0] for _, moments in answers)
    last = min(moments[-1] for _, moments in answers)
    if last <= first:
        raise ValueError("the answers never all ran together: ask for longer ones")
    counted = sum(first < moment <= last for _, moments in answers for moment in moments)
    return counted / (last - first)


class Work:
    """The measurements of one engine."""

    def __init__(self, engine: Engine, setup: Setup, words: int, seed: int) -> None:
        self.engine, self.setup, self.words, self.seed = engine, setup, words, seed
        self.kept = [self.prompt(-2 - stream) for stream in range(setup.streams)]

    def prompt(self, index: int) -> list[int]:
        return random_prompt(self.setup.prompt, self.words, self.seed, index)

    def run(self, prompts: list[list[int]], generate: int) -> Sequence[Answer]:
        answers = self.engine.answer(prompts, generate)
        for tokens, moments in answers:
            assert len(tokens) == len(moments) == generate, f"{len(tokens)} of {generate} tokens"
        return answers

    def warm_up(self) -> None:
        """Everything once that a measurement does; several streams first read their prompts."""
        self.run([self.prompt(-1)], self.setup.generate)
        if self.setup.streams > 1:
            self.run(self.kept, 1)
            self.run(self.kept, self.setup.generate)

    def measure(self, index: int) -> Measurement:
        fresh = [self.prompt(index)]
        alone = self.setup.streams == 1
        start = time.perf_counter()
        first = self.run(fresh, self.setup.generate if alone else 1)
        answers = first if alone else self.run(self.kept, self.setup.generate)
        (_, moments), (tokens, _) = first[0], answers[0]
        return Measurement(self.setup.prompt / (moments[0] - start), decode_speed(answers), tokens)

    def line(self, measurements: list[Measurement]) -> str:
        """One line of the protocol."""
        facts = {
            "resident_bytes": resident_bytes(),
            **self.engine.describe(),
            "decode_tokens_per_second": [one.decode_tokens_per_second for one in measurements],
            "prefill_tokens_per_second": [one.prefill_tokens_per_second for one in measurements],
            "first_tokens": [one.tokens[:SHOWN_TOKENS] for one in measurements],
        }
        return json.dumps(facts) + "\n"

    def serve(self, requests: TextIO, lines: TextIO) -> None:
        """Warms up, says what is loaded, then answers requests until the input ends."""
        self.warm_up()
        lines.write(self.line([]))
        turns = itertools.count()
        for request in requests:
            if request.startswith("{"):
                self.score(**json.loads(request))
                lines.write(self.line([]))
            elif request.strip() == "go":
                lines.write(self.line([self.measure(next(turns))]))
            else:
                raise ValueError(f"expected `go` or a JSON object, got {request!r}")

    def score(self, *, prompt: list[int], answer: list[int], logits: str) -> None:
        found = np.asarray(self.engine.score(prompt, answer), dtype=np.float32)
        assert found.shape[:1] == (len(answer),) and found.ndim == 2, f"logits of shape {found.shape}"
        np.save(logits, found)


def resident_bytes() -> int:
    """What this process holds in memory now, mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmRSS")


def claim_stdout() -> TextIO:
    """Keeps the real standard output for the protocol and points descriptor 1 at standard error."""
    protocol = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return protocol


def load_file(path: Path) -> Any:
    """The engine's file as a module."""
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=32, metavar="TOKENS")
    parser.add_argument("--generate", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--words", type=int, default=MOST_WORDS, help="size of the vocabulary")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of this engine")
    return parser.parse_args()


def main() -> None:
    lines, asked = claim_stdout(), parse()
    setup = Setup(
        model=asked.model,
        prompt=asked.prompt,
        generate=asked.generate,
        streams=asked.streams,
        threads=asked.threads,
        options=dict(option.split("=", 1) for option in asked.option),
    )
    engine: Engine = load_file(asked.engine).open_engine(setup)
    Work(engine, setup, asked.words, asked.seed).serve(sys.stdin, lines)


if __name__ == "__main__":
    main()
