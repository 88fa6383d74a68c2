"""How good is the embedded model? Two questions on modules that it never saw, read from this Python.

Completion: of 200 function starts (the signature, and the docstring where there is one), how many does the model
continue to code that `ast.parse` accepts. Compression: bits per byte of the held-out source, beside `xz -9`, which has
seen nothing before, and gets the whole text at once.

    python -m benchmarks.demo_model          writes benchmarks/results/demo_model.json
"""

from __future__ import annotations

import argparse
import ast
import json
import lzma
import math
import random
import textwrap
from pathlib import Path

import snello
from snello.models.demo.held_out import read_held_out

RESULTS = Path(__file__).parent / "results" / "demo_model.json"
NUM_STARTS = 200
WINDOW = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    modules = read_held_out()
    with snello.LLM(args.model) as llm:
        result = {
            "command": "python -m benchmarks.demo_model",
            "model": args.model,
            "held_out_modules": len(modules),
            **completion(llm, modules, args.seed),
            **compression(llm, modules),
        }
    if args.model == "demo":
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def completion(llm: snello.LLM, modules: list[tuple[str, str]], seed: int) -> dict[str, object]:
    """How many of the function starts become code."""
    starts = [start for _, source in modules for start in function_starts(source)]
    chosen = random.Random(seed).sample(starts, NUM_STARTS)
    greedy = sum(parses(start, llm.generate(start, temperature=0, max_tokens=160).text) for start in chosen)
    drawn = sum(
        parses(start, llm.generate(start, temperature=0.7, top_p=0.95, seed=seed, max_tokens=160).text)
        for start in chosen
    )
    return {"function_starts": NUM_STARTS, "parse_greedy": greedy, "parse_temperature_0.7": drawn}


def function_starts(source: str) -> list[str]:
    """Signature (and docstring) of every function, dedented, ending with its line break."""
    lines, starts = source.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        if body and body[0].lineno > node.lineno:
            starts.append(textwrap.dedent("".join(lines[node.lineno - 1 : body[0].lineno - 1])))
    return [start for start in starts if start.strip() and len(start) < 1500]


def parses(start: str, continuation: str) -> bool:
    """Whether the start with the whole lines of its body is code, with at least one statement of the model's own."""
    body = []
    for line in continuation.splitlines(keepends=True):
        if line.strip() and not line[0].isspace():
            break
        body.append(line)
    else:
        body = body[:-1] if body and not body[-1].endswith("\n") else body  # a line cut off by the token limit
    if not any(line.strip() and not line.strip().startswith("#") for line in body):
        return False
    try:
        ast.parse(start + "".join(body))
    except (SyntaxError, ValueError):
        return False
    return True


def compression(llm: snello.LLM, modules: list[tuple[str, str]]) -> dict[str, object]:
    """Bits per byte of the model (each window from its own beginning) and of xz."""
    nats, size = 0.0, 0
    end = llm.model.spec.eos_tokens[0]
    for _, source in modules:
        ids = [end, *llm.tokenizer.encode(source), end]
        for first in range(0, len(ids) - 1, WINDOW - 1):
            nats -= float(llm.score(ids[first : first + WINDOW]).log_probabilities.sum(dtype="float64"))
        size += len(source.encode())
    text = "".join(source for _, source in modules).encode()
    compressed = len(lzma.compress(text, preset=9))
    return {
        "held_out_bytes": size,
        "bits_per_byte": round(nats / math.log(2) / size, 4),
        "xz_9_bits_per_byte": round(8 * compressed / len(text), 4),
    }


if __name__ == "__main__":
    main()
