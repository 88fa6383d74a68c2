"""`snello embed`: one vector a text, as a JSON list a line."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from snello.cli.opening import open_model
from snello.cli.options import of_deployment
from snello.errors import SnelloError
from snello.report import numbers
from snello.terminal import Terminal

EXAMPLES = (
    'snello embed sentence-transformers/all-MiniLM-L6-v2 "a text" "another"',
    "cat texts.txt | snello embed lean/minilm > vectors.jsonl",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder or a Hugging Face name of a model that embeds")
    parser.add_argument(
        "texts", metavar="TEXT", nargs="*", help="without any: the lines of standard input, one vector each"
    )
    parser.add_argument("--truncate", action="store_true", help="of longer texts than the model reads, the beginning")
    parser.add_argument("--threads", type=of_deployment("threads"), help="[the physical cores]")


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    import time

    from snello.engine.llm import LLM
    from snello.models.loading import no_vectors

    texts = arguments.texts or [line.removesuffix("\n").removesuffix("\r") for line in sys.stdin]
    if not any(map(str.strip, texts)):
        raise SnelloError("there are no texts", 'snello embed MODEL "a text", or lines on standard input', exit_code=2)
    model = open_model(arguments.model, terminal)
    if model.spec.head.kind != "embed":
        raise no_vectors(model, arguments.model)
    with LLM(model, threads=arguments.threads) as llm:
        started = time.perf_counter()
        vectors = llm.embed(texts, truncate=arguments.truncate)  # (texts, D)
        seconds = time.perf_counter() - started
    rows = [[round(float(value), 7) for value in vector] for vector in vectors]
    for row in rows:
        terminal.product(json.dumps(row))
    terminal.say(f"{len(rows)} texts, {len(rows[0])} dimensions, {numbers.seconds(seconds)}")
    return {"model": arguments.model, "embeddings": rows, "seconds": seconds}
