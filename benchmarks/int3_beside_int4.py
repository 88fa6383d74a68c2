"""Is INT3 as fast as its bytes promise? Beside INT4, in turn, in one process.

Two things: one matrix on one thread, straight from memory with one row and from the caches with many, and whole
decodes of a published shape with random weights (INT8 head in both). Each figure is a median over rounds of A B B A,
each ratio the median of the rounds' own.

    python -m benchmarks.int3_beside_int4

writes benchmarks/results/int3_beside_int4.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.decode_vs_peers import ROOT, refuse_noise
from snello.engine.native import NativeExecutor
from snello.measure.machine import cpu_name
from snello.measure.speed import Clock, Workload
from snello.models.shapes import RandomWeights, random_model
from snello.models.spec import BITS, Deployment
from snello.native import core
from snello.native.core import Batch, Op, OpKind, Program, Register

RESULTS = ROOT / "benchmarks" / "results" / "int3_beside_int4.json"
SHAPE = "tinyllama-1.1b"
FORMATS: tuple[RandomWeights, ...] = ("int4", "int3")
ROWS, COLUMNS = 32_768, 2048  # a matrix that no cache holds
KERNEL_ROWS = (1, 4, 8, 16, 64, 256)
STREAMS = (1, 8)
PROMPT, STEPS = 32, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="each measures both formats twice")
    parser.add_argument("--threads", type=int, default=2, help="of the decodes")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine all the same")
    options = parser.parse_args()
    refuse_noise(options.force)
    result = {
        "command": "python -m benchmarks.int3_beside_int4",
        "when": time.strftime("%Y-%m-%d"),
        "processor": cpu_name(),
        "isa": core.select_isa(None),
        "matrix": [ROWS, COLUMNS],
        "products": products(options.rounds),
        "shape": SHAPE,
        "threads": options.threads,
        "decode": decodes(options.rounds, options.threads),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def products(rounds: int) -> dict[str, Any]:
    """By rows: GB/s of packed bytes and GOP/s, one thread."""
    pool = core.Pool(1)
    packed: dict[str, core.Tensor] = {name: random_tensor(name) for name in FORMATS}
    found: dict[str, Any] = {}
    for rows in KERNEL_ROWS:
        runs = {name: product(pool, tensor, rows) for name, tensor in packed.items()}
        seconds = in_turn(runs, rounds)
        found[str(rows)] = {
            **{
                f"{name}_gigabytes_per_second": round(packed[name].data.nbytes / statistics.median(s) * 1e-9, 2)
                for name, s in seconds.items()
            },
            **{
                f"{name}_gigaops": round(2e-9 * rows * ROWS * COLUMNS / statistics.median(s), 1)
                for name, s in seconds.items()
            },
            "int3_over_int4_speed": ratio(seconds),
        }
        print(f"{rows} rows", json.dumps(found[str(rows)]), flush=True)
    return found


def product(pool: core.Pool, weights: core.Tensor, rows: int) -> Callable[[], float]:
    """Seconds of one product with this many quantized rows, by the core's own clock."""
    table = core.pack_float(
        "fp32", np.random.default_rng(0).standard_normal((rows, COLUMNS)).astype(np.float32), "fp32"
    )
    registers = [Register(COLUMNS), Register(COLUMNS, "int8"), Register(ROWS), Register(ROWS)]
    ops = [
        Op(OpKind.EMBED, (), 0, (0,), f=(1.0,)),
        Op(OpKind.TRANSFORM, (0,), 1),
        Op(OpKind.LINEAR, (1,), 2, (1,)),
        Op(OpKind.GATHER, (2,), -1),
        Op(OpKind.HEAD, (2,), 3),
    ]
    program = Program(pool, ops, [table, weights], registers, None, max_rows=rows, head_rows=1)
    count, first = np.arange(rows, dtype=np.int32), np.zeros(1, np.int32)
    batch = Batch(count, count, np.zeros(rows, np.int32), np.full((1, 1), -1, np.int32), first + rows, first)

    def run() -> float:
        program.profile(True)
        program.step(batch)
        return float(program.profile(False)[2])

    return run


def random_tensor(name: str) -> core.Tensor:
    random, limit = np.random.default_rng(0), 2 ** BITS[name]
    q = random.integers(0, limit, (ROWS, COLUMNS), np.uint8)
    group_scale = random.integers(1, 16, (ROWS, COLUMNS // 128), np.uint8)
    return core.pack_grouped(name, q, group_scale, np.full(ROWS, 2.0**-10, np.float32), 128)


def decodes(rounds: int, threads: int) -> dict[str, Any]:
    """By streams: tokens a second of whole decodes, from short prompts on."""
    found: dict[str, Any] = {}
    for streams in STREAMS:
        workload = Workload(prompt=PROMPT, generate=STEPS, streams=streams)
        deployment = Deployment(threads=threads, context=PROMPT + STEPS, streams=streams)
        runners = {name: NativeExecutor(random_model(SHAPE, name), deployment) for name in FORMATS}
        seconds = in_turn({name: Clock(runner, workload).throughput for name, runner in runners.items()}, rounds)
        found[str(streams)] = {
            **{f"{name}_tokens_per_second": round(1 / statistics.median(s), 2) for name, s in seconds.items()},
            **{f"{name}_bytes_per_token": runner.bytes_per_token() for name, runner in runners.items()},
            "int3_over_int4_speed": ratio(seconds),
        }
        for runner in runners.values():
            runner.close()
        print(f"{streams} streams", json.dumps(found[str(streams)]), flush=True)
    return found


def in_turn(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, A B B A, after one run that warms up."""
    names = list(runs)
    for name in names:
        runs[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in (names + names[::-1]) * rounds:
        seconds[name].append(runs[name]())
    return seconds


def ratio(seconds: dict[str, list[float]]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(seconds["int4"], seconds["int3"], strict=True)]
    return {name: round(f(ratios), 3) for name, f in (("median", statistics.median), ("min", min), ("max", max))}


if __name__ == "__main__":
    main()
