"""What does forgetting the middle of a text cost, and what does it save?

Loss: a trained model on whole windows of its length, with some keys and values given up and without, paired token by
token; only tokens behind `keep_first + keep_last` can differ, and their loss is told apart. Speed and memory: next
tokens of a long text with random weights, with and without in turn, and the bytes of keys and values that are held.

    python -m benchmarks.eviction MODEL TEXT [--shape smollm2-135m] [--context 8192]
                                            writes benchmarks/results/eviction.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from snello.engine.native import NativeExecutor, Session
from snello.measure.machine import machine
from snello.models import load
from snello.models.shapes import random_model
from snello.models.spec import Deployment

RESULTS = Path(__file__).parent / "results" / "eviction.json"
KEPT = ((0, 256), (4, 252), (32, 224), (4, 124), (4, 508))
WINDOWS, ROUNDS, STEPS = 48, 6, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--shape", default="smollm2-135m")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    result = {
        "loss": losses(arguments.model, arguments.text),
        "speed": speeds(arguments.shape, arguments.context, arguments.threads),
        "machine": str(machine(threads=arguments.threads)),
        "threads": arguments.threads,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def losses(name: str, text: Path) -> dict[str, object]:
    """Nats a token more than with everything kept, of all tokens and of those that forget something."""
    model = load(name)
    length = model.spec.max_positions
    ids = model.tokenizer.encode(text.read_text(encoding="utf-8")[: 8 * WINDOWS * length])[: WINDOWS * length]
    windows = np.array(ids, np.int32).reshape(-1, length)
    whole = scores(name, windows, Deployment())
    rows = []
    for first, last in KEPT:
        worse = whole - scores(name, windows, Deployment(keep_first=first, keep_last=last))  # (windows, length - 1)
        behind = worse[:, first + last :]
        error = worse.mean(axis=1).std(ddof=1) / np.sqrt(len(worse))
        rows.append(
            {
                "keep_first": first,
                "keep_last": last,
                "nats_more": float(worse.mean()),
                "plus_minus_95": float(1.96 * error),
                "nats_more_behind": float(behind.mean()),
            }
        )
    nats = float(-whole.mean())
    return {"model": model.name, "tokens": int(whole.size), "length": length, "nats": nats, "rows": rows}


def scores(name: str, windows: np.ndarray, deployment: Deployment) -> np.ndarray:
    with NativeExecutor(load(name), deployment) as executor:
        return np.stack([executor.score(window).log_probabilities for window in windows])


def speeds(shape: str, context: int, threads: int) -> dict[str, object]:
    """Seconds of a next token behind `context` tokens, in turn."""
    model, room = random_model(shape, positions=context + 2 * ROUNDS * STEPS), context + 2 * ROUNDS * STEPS
    prompt = np.random.default_rng(0).integers(0, model.spec.vocab_size, context, dtype=np.int32)
    kept = {"everything": {}, "4 and the newest 1,020": {"keep_first": 4, "keep_last": 1020}}
    executors = {
        name: NativeExecutor(model, Deployment(threads=threads, context=room, **keep))  # type: ignore[arg-type]
        for name, keep in kept.items()
    }
    sessions = {name: executor.session() for name, executor in executors.items()}
    for session in sessions.values():
        session.feed(prompt)
    times: dict[str, list[float]] = {name: [] for name in kept}
    for turn in range(ROUNDS + 1):
        for name in list(kept)[:: -1 if turn % 2 else 1]:
            seconds = step(sessions[name])
            if turn:
                times[name].append(seconds)
    rows = {
        name: {
            "decode_tokens_per_second": float(1 / np.median(times[name])),
            "cache_bytes": executors[name].pages.num_held * executors[name].page_bytes,
        }
        for name in kept
    }
    everything, less = (np.array(seconds) for seconds in times.values())
    for name in kept:
        sessions[name].close()
        executors[name].close()
    return {"shape": shape, "context": context, "rows": rows, "times_as_fast": float(np.median(everything / less))}


def step(session: Session) -> float:
    """Seconds a token, of a few."""
    begin = time.perf_counter()
    for _ in range(STEPS):
        session.feed([7])
    return (time.perf_counter() - begin) / STEPS


if __name__ == "__main__":
    main()
