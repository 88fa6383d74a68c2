"""What does forgetting the middle of a text cost, and what does it save?

    python -m benchmarks.eviction --model FOLDER --text held_out.txt
    python -m benchmarks.eviction --shape smollm2-135m --context 8192

add to benchmarks/results/eviction.json. `--model`: a trained model on whole windows of the length that it was trained
at, with some keys and values given up and without, paired token by token and judged by `optimize`'s own gate: the loss
L with its one-sided 95% bounds, and kept or dropped at `--max-loss`. Only tokens behind `keep_first + keep_last` can
differ; what those lose is told apart. Beside it stand the gate's own checks: everything kept again, whose loss must be
exactly zero, a planted fault of 1.1 times the budget, which must be dropped, and the smallest loss that this text can
prove. `--shape`, on a quiet machine, about 3 minutes: next tokens of a long text with random weights, with and without
in turn, and the bytes of keys and values that are held.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from snello.engine.native import NativeExecutor, Session
from snello.measure import quality
from snello.measure.machine import machine
from snello.measure.rulers import NextTokens, Reading
from snello.measure.text import Block
from snello.models import load
from snello.models.model import Model
from snello.models.shapes import random_model
from snello.models.spec import Deployment
from snello.optimize.gate import judge_quality

RESULTS = Path(__file__).parent / "results" / "eviction.json"
KEPT = ((0, 124), (4, 124), (0, 252), (4, 252), (32, 224), (4, 508), (4, 764))
WINDOWS, ROUNDS, STEPS, RULER = 96, 6, 40, NextTokens()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--max-loss", type=float, default=0.01, help="of the gate [0.01]")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of the trained length [96]")
    parser.add_argument("--shape")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if (args.shape is None) == (args.model is None) or (args.model is None) != (args.text is None):
        parser.error("give --model and --text, or --shape")
    result = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if args.model:
        command = f"python -m benchmarks.eviction --model {args.model} --text {args.text}"
        found = judged(load(args.model), args.text, args.max_loss, args.windows)
        result.setdefault("loss", {})[Path(args.model).name] = {"command": command, **found}
    else:
        command = f"python -m benchmarks.eviction --shape {args.shape} --context {args.context}"
        here = {"threads": args.threads, "machine": machine(threads=args.threads).cpu}
        found = {"command": command, **here, **speeds(args.shape, args.context, args.threads)}
        result.setdefault("speed", {})[args.shape] = found
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def judged(model: Model, text: Path, max_loss: float, count: int) -> dict[str, Any]:
    """What the gate says of each way to keep, and of itself."""
    blocks = long_blocks(model, text, count)
    whole = reading(model, blocks, Deployment())
    rows = {}
    for first, last in KEPT:
        found = reading(model, blocks, Deployment(keep_first=first, keep_last=last))
        behind = [after[first + last :] - before[first + last :] for before, after in pairs(whole, found)]
        rows[f"{first} + {last}"] = verdict(whole, found, blocks, max_loss) | {
            "nats_more_behind": round(float(np.concatenate(behind).mean()), 5)
        }
        print(f"{first} + {last}", json.dumps(rows[f"{first} + {last}"]), flush=True)
    fault = quality.plant(RULER, whole, blocks, max_loss=max_loss, seed=0)
    tokens = sum(map(len, whole.values))
    power = quality.power(RULER, whole, fault, blocks, max_loss=max_loss, total_tokens=tokens, seed=0)
    again = quality.compare(RULER, whole, reading(model, blocks, Deployment()), blocks, seed=0).loss
    return {
        "tokens": tokens,
        "length": len(blocks[0].tokens),
        "max_loss": max_loss,
        "nats": round(float(np.concatenate(whole.values).mean()), 5),
        "again": again.to_json(),
        "provable": round(power.worst, 5),
        "planted_fault": verdict(whole, fault, blocks, max_loss),
        "rows": rows,
    }


def long_blocks(model: Model, text: Path, count: int) -> list[Block]:
    """Windows as long as the model was trained, spread over the text; what is before it counts in none."""
    length = model.spec.max_positions
    ids = np.array(model.tokenizer.encode(text.read_text(encoding="utf-8")[:4_000_000]), np.int32)
    starts = range(0, len(ids) - length, max(length, len(ids) // count))
    return [
        Block(source="text", document="text", cluster=i, start=at, tokens=ids[at : at + length], scored_from=1)
        for i, at in enumerate(starts[:count])
    ]


def reading(model: Model, blocks: list[Block], deployment: Deployment) -> Reading:
    with NativeExecutor(model, deployment) as executor:
        return RULER.read(executor, blocks)


def pairs(one: Reading, other: Reading) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(zip(one.values, other.values, strict=True))


def verdict(whole: Reading, found: Reading, blocks: list[Block], max_loss: float) -> dict[str, Any]:
    loss = quality.compare(RULER, whole, found, blocks, seed=0).loss
    judgement = judge_quality(loss, max_loss)
    bounds = {name: round(value, 5) for name, value in loss.to_json().items()}
    return {"loss": bounds, "verdict": "kept" if judgement is None else f"dropped: {judgement.reason}"}


def speeds(shape: str, context: int, threads: int) -> dict[str, Any]:
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
