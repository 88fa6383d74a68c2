"""What does a look for a similar question cost, and for how long does a request wait for it at most?

    python -m benchmarks.similar_cost

writes benchmarks/results/similar_cost.json, in two minutes. For each embedder, on one thread: milliseconds to embed a
question (of 5 to 25 words), and to look it up, embedding included, in a cache of 1,000, 10,000 and 20,000 questions.
The questions in the cache have random vectors: what is compared costs the same, whatever it says. The two embedders
take turns, question by question. The guard has nothing to compare, since no random vector is near enough; where it has,
it takes what `guard` says.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from snello.engine.llm import LLM
from snello.measure.machine import cpu_name
from snello.serve.caches.certify import Certificate
from snello.serve.caches.embed import Embedder, EncoderEmbedder, NgramEmbedder, Vectors, minilm_folder
from snello.serve.caches.guard import Guard
from snello.serve.caches.lookup import LOOKUP_SECONDS
from snello.serve.caches.similar import SimilarAnswers, SimilarOptions

RESULTS = Path(__file__).parent / "results" / "similar_cost.json"
SIZES = (1_000, 10_000, 20_000)
QUESTIONS = 300
SPACE = b"n" * 32
WORDS = """how what why does can the a of in for is to my best way learn cook repair travel money school river garden
window engine music language history doctor winter market letter animal island bridge computer science paper""".split()


class Filled:
    """An embedder to which all that is in the cache is noise, at no cost."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder, self._source = embedder, np.random.default_rng(4)
        self.dimension, self.digest = embedder.dimension, embedder.digest

    def embed(self, texts: Sequence[str]) -> Vectors:
        if not texts[0].startswith("filler"):
            return self._embedder.embed(texts)
        noise = self._source.standard_normal((len(texts), self.dimension)).astype(np.float32)
        unit: Vectors = noise / np.linalg.norm(noise, axis=1, keepdims=True)
        return unit


def full(embedder: Embedder, size: int) -> SimilarAnswers:
    filled = Filled(embedder)
    proof = Certificate(
        threshold=0.99,
        epsilon=0.05,
        confidence=0.95,
        hits=100,
        wrong=0,
        questions=100,
        embedder=filled.digest,
        guard=Guard().digest,
    )
    similar = SimilarAnswers(filled, Guard(), proof, SimilarOptions(max_entries=size))
    for number in range(size):
        similar.keep(SPACE, f"filler {number}", b"k" * 32, finish_reason="stop")
    return similar


def _embed(embedder: Embedder, text: str) -> Vectors:
    return embedder.embed([text])


def questions(count: int, seed: int) -> list[str]:
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(5, 25))) + f" {number}?" for number in range(count)]


def in_turn(ways: dict[str, Callable[[str], Any]], texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Milliseconds of each way, text by text in turn; the first ten are not counted."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for text in texts:
        for name, way in ways.items():
            started = time.perf_counter()
            way(text)
            taken[name].append(1000 * (time.perf_counter() - started))
    return {
        name: {
            "median_ms": round(float(np.median(each[10:])), 3),
            "p99_ms": round(float(np.quantile(each[10:], 0.99)), 3),
        }
        for name, each in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", type=Path, help="a folder [the extra `similar`]")
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    with LLM(args.encoder or minilm_folder(), threads=1) as llm:
        embedders: dict[str, Embedder] = {"minilm": EncoderEmbedder(llm), "words": NgramEmbedder()}
        ways: dict[str, Callable[[str], Any]] = {}
        for name, embedder in embedders.items():
            ways[f"{name}, embed"] = partial(_embed, embedder)
            for size in SIZES:
                similar = full(embedder, size)
                ways[f"{name}, look up in {size:,}"] = partial(similar.find, SPACE)
        texts = questions(args.questions, 1)
        guard, others = Guard(), iter(questions(args.questions, 2))
        ways["guard"] = lambda text: guard.refuses(text, next(others))
        found = in_turn(ways, texts)
    results = {
        "command": "python -m benchmarks.similar_cost",
        "cpu": cpu_name(),
        "questions": args.questions,
        "a_request_waits_at_most_ms": 1000 * LOOKUP_SECONDS,
        "ways": found,
    }
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
