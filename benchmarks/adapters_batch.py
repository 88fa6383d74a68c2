"""What adapters cost where many streams decode at once: none, one for all, one for each.

    python -m benchmarks.adapters_batch

writes benchmarks/results/adapters_batch.json. A published shape with random INT4 weights, and random adapters of rank
16 on all linears of its blocks, in BF16. Eight streams begin with 32 tokens and go on with 24, whole times of the
engine in turn (A B B A): opened without adapters; opened with eight, none of them named; all streams with one; each
with its own. Ratios are seconds over those without adapters: the median of the rounds' own, and their range. Needs a
quiet machine for some minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decode_vs_peers import refuse_noise
from snello.engine.engine import Engine, EngineOptions
from snello.engine.native import NativeExecutor
from snello.engine.request import SamplingParams
from snello.measure.machine import cpu_name
from snello.models import load
from snello.models.adapter import Adapter
from snello.models.model import Floats, Model
from snello.models.shapes import random_model
from snello.models.spec import Deployment, linear_shape
from snello.native import core
from snello.techniques.adapt import Adapt

RESULTS = Path(__file__).parent / "results" / "adapters_batch.json"
STREAMS, RANK, PROMPT, STEPS = 8, 16, 32, 24
NAMES = tuple(f"task {number}" for number in range(STREAMS))
WAYS: dict[str, list[str | None]] = {
    "opened without adapters": [None] * STREAMS,
    "opened with eight, none named": [None] * STREAMS,
    "one for all streams": [NAMES[0]] * STREAMS,
    "one for each stream": list(NAMES),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tinyllama-1.1b")
    parser.add_argument("--rounds", type=int, default=4, help="each measures every way twice")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--force", action="store_true", help="measure on a busy machine all the same")
    args = parser.parse_args()
    refuse_noise(args.force)
    model = random_model(args.shape, "int4")
    adapters = {name: random_adapter(model, seed) for seed, name in enumerate(NAMES)}
    deployment = Deployment(threads=args.threads, context=PROMPT + STEPS, streams=STREAMS, max_num_seqs=STREAMS)
    with NativeExecutor(model, deployment) as bare, NativeExecutor(model, deployment, adapters=adapters) as many:
        executors = dict.fromkeys(WAYS, many) | {"opened without adapters": bare}
        seconds = in_turn(executors, args.rounds)
        num_bytes = many.adapters.num_bytes // STREAMS
        weights = many.weights_bytes
    base = seconds["opened without adapters"]
    rows = {
        name: {"tokens_per_second": round(STREAMS * STEPS / statistics.median(own), 1), "over_none": ratio(own, base)}
        for name, own in seconds.items()
    }
    result = {
        "command": f"python -m benchmarks.adapters_batch --shape {args.shape}",
        "when": time.strftime("%Y-%m-%d"),
        "processor": cpu_name(),
        "isa": core.select_isa(None),
        "shape": args.shape,
        "threads": args.threads,
        "rank": RANK,
        "adapter_bytes": num_bytes,
        "weights_bytes": weights,
        "rows": rows,
    }
    print(json.dumps(rows, indent=1))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def random_adapter(model: Model, seed: int) -> Adapter:
    random = np.random.default_rng(seed)
    factors = {}
    for linear in Adapt(rank=RANK).linears(model.spec):
        outputs, inputs = linear_shape(model.spec, linear)
        a, b = random.standard_normal((RANK, inputs)), random.standard_normal((outputs, RANK))
        factors[linear] = (in_bf16(inputs**-0.5 * a), in_bf16(0.01 * b))
    return Adapter(factors=factors, rank=RANK, alpha=2.0 * RANK, scale=2.0, base=None)


def in_bf16(values: Any) -> Floats:
    """FP32 numbers that BF16 can say: the engine stores such factors in half the bytes."""
    narrow = np.asarray(values, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    found: Floats = narrow.view(np.float32)
    return found


def in_turn(executors: dict[str, NativeExecutor], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, A B B A, after one run that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for name in WAYS:
        once(executors[name], WAYS[name], 0)
    for number, name in enumerate((list(WAYS) + list(WAYS)[::-1]) * rounds):
        seconds[name].append(once(executors[name], WAYS[name], number + 1))
    return seconds


def once(executor: NativeExecutor, names: list[str | None], seed: int) -> float:
    """Seconds of all streams, from prompts that nobody has seen."""
    random = np.random.default_rng([1, seed])
    engine = Engine(executor, load("demo").tokenizer, EngineOptions(max_num_seqs=STREAMS))  # its texts are not read
    params = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True)
    for name in names:
        engine.add(random.integers(20, executor.spec.vocab_size, PROMPT).tolist(), params, adapter=name)
    began = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - began


def ratio(own: list[float], base: list[float]) -> dict[str, float]:
    each = [a / b for a, b in zip(own, base, strict=True)]
    return {name: round(f(each), 3) for name, f in (("median", statistics.median), ("min", min), ("max", max))}


if __name__ == "__main__":
    main()
