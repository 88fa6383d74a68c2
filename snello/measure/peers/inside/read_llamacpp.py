"""A GGUF file asked what it makes of texts, by llama.cpp; runs in that peer's environment.

The first line says what is loaded; the pieces of its vocabulary go into a file, so that who asks can see that token ids
mean the same to both. Then each line of the input is a request, a JSON object, answered with one line:

    {"tokens": IDS, "scores": FILE}              log-probability of each token but the first, and the first choice there
    {"tokens": IDS, "rows": ROWS, "logits": FILE}   the logits (rows, V) at these positions
    {"tokens": IDS, "most": N, "ends": IDS}      the greedy answer, up to and with a token that ends it

    PYTHON read_llamacpp.py MODEL --positions 1024 --threads 2 --vocabulary FILE
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from engine_llamacpp import LlamaCpp, bytes_per_token
from worker import Setup, claim_stdout

ROWS = 256  # positions whose logits are held at once


def pieces(path: Path) -> list[str]:
    """The spelling of every token, as its file has it."""
    field = gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"]
    return [bytes(field.parts[index]).decode("utf-8", "replace") for index in field.data]


class Reader:
    """One model; every text is read from its beginning."""

    def __init__(self, engine: LlamaCpp) -> None:
        self.engine = engine

    def logits(self, tokens: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(position, logits) of every position, each valid until the next step of the model."""
        self.engine.held[0] = []
        self.engine.forget(0, 0)
        for start in range(0, len(tokens), ROWS):
            chunk = tokens[start : start + ROWS]
            self.engine.step([(token, start + i, 0, True) for i, token in enumerate(chunk)])
            for i in range(len(chunk)):
                yield start + i, self.engine.logits(i)

    def scores(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Of tokens[1:]: log-probabilities (T - 1,) and first choices (T - 1,)."""
        found, choices = np.empty(len(tokens) - 1, np.float32), np.empty(len(tokens) - 1, np.int32)
        for position, row in self.logits(tokens[:-1]):
            wide = row.astype(np.float64)
            top = wide.max()
            found[position] = wide[tokens[position + 1]] - top - np.log(np.exp(wide - top).sum())
            choices[position] = row.argmax()
        return found, choices

    def answer(self, tokens: list[int], most: int, ends: list[int]) -> list[int]:
        """Greedy, at most `most` tokens; the last is one of `ends` where it ended by itself."""
        self.engine.held[0] = []
        said = [self.engine.read(0, tokens)]
        while len(said) < most and said[-1] not in ends:
            said += self.engine.step([(said[-1], len(tokens) + len(said) - 1, 0, True)])
        return said

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        tokens = request["tokens"]
        if "scores" in request:
            log_probabilities, top1 = self.scores(tokens)
            np.savez(request["scores"], log_probabilities=log_probabilities, top1=top1)
            return {}
        if "logits" in request:
            wanted = set(request["rows"])
            rows = [row.copy() for position, row in self.logits(tokens) if position in wanted]
            np.save(request["logits"], np.stack(rows))
            return {}
        return {"answer": self.answer(tokens, request["most"], request["ends"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--positions", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--vocabulary", type=Path, required=True, metavar="FILE")
    lines, asked = claim_stdout(), parser.parse_args()
    setup = Setup(
        model=str(asked.model), prompt=asked.positions, generate=0, streams=1, threads=asked.threads, options={}
    )
    asked.vocabulary.write_text(json.dumps(pieces(asked.model)), encoding="utf-8")
    reader = Reader(LlamaCpp(setup))
    facts = {**reader.engine.describe(), "words": reader.engine.words, "bytes_per_token": bytes_per_token(asked.model)}
    lines.write(json.dumps(facts) + "\n")
    for line in sys.stdin:
        lines.write(json.dumps(reader.ask(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
