"""How do people fare who share one machine? Requests of a real service's trace, beside OpenVINO's continuous batching.

The lengths and the gaps between arrivals are those of consecutive requests of the trace (Azure's 2023 conversation
trace: TIMESTAMP, ContextTokens, GeneratedTokens); the gaps are scaled so that the load is `--rate` requests a minute.
Requests longer than the context are left out. Prompts are random tokens, all different, so that no cache helps. Both
engines get the same requests at the same times, one engine after the other, and whoever started first starts last in
the next round. Results are kept by our instruction set: on another processor nothing can be compared.

    python -m benchmarks.mixed_load --trace AzureLLMInferenceTrace_conv.csv

OpenVINO and its model live in `build/peers` unless SNELLO_PEERS says otherwise (`snello bench --install-peers`).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decode_vs_peers import ROOT, save
from snello.measure.peers.environments import peers_folder
from snello.native import core

RESULTS = ROOT / "benchmarks" / "results" / "mixed_load.json"
VOCABULARY = 32000


def read_trace(path: Path, count: int, longest: int, skip: int) -> list[tuple[float, int, int]]:
    """(seconds since the first, prompt tokens, answer tokens) of consecutive requests that fit."""
    found: list[tuple[float, int, int]] = []
    with path.open() as file:
        for row in csv.DictReader(file):
            moment = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            prompt, answer = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            if prompt >= 1 and answer >= 2 and prompt + answer <= longest:
                found.append((moment, prompt, answer))
            if len(found) == skip + count:
                break
    found = found[skip:]
    return [(moment - found[0][0], prompt, answer) for moment, prompt, answer in found]


def requests_of(trace: list[tuple[float, int, int]], per_minute: float, seed: int) -> list[list[Any]]:
    generator = np.random.default_rng(seed)
    scale = (len(trace) - 1) / (per_minute / 60) / max(trace[-1][0], 1e-9)
    return [
        [moment * scale, generator.integers(3, VOCABULARY, prompt).tolist(), answer] for moment, prompt, answer in trace
    ]


def run(command: list[str], requests: list[list[Any]]) -> dict[str, Any]:
    document = json.dumps({"requests": requests})
    done = subprocess.run(command, input=document, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Throughput and what people wait, in seconds."""
    first = [times[0] - arrival for arrival, times in found["requests"]]
    gaps = np.concatenate([np.diff(times) for _, times in found["requests"]])
    tokens = sum(len(times) for _, times in found["requests"])
    return {
        "engine": found["engine"],
        "settings": found["settings"],
        "tokens_per_second": tokens / found["seconds"],
        "seconds": found["seconds"],
        "unloaded_step_seconds": found["step_seconds"],
        "first_token_seconds": {"p50": float(np.percentile(first, 50)), "p99": float(np.percentile(first, 99))},
        "between_tokens_seconds": {
            "p50": float(np.percentile(gaps, 50)),
            "p99": float(np.percentile(gaps, 99)),
            "max": float(gaps.max()),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--shape", default="tinyllama-1.1b")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--skip", type=int, default=0, help="requests of the trace before the first")
    parser.add_argument("--rate", type=float, default=8.0, help="requests a minute")
    parser.add_argument("--longest", type=int, default=2048, help="prompt and answer together")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--step-ms", type=float, default=50.0)
    parser.add_argument("--only", choices=("snello", "openvino"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    trace = read_trace(options.trace, options.requests, options.longest, options.skip)
    requests = requests_of(trace, options.rate, seed=0)
    worker = ["-m", "benchmarks.mixed_load_worker"]
    ours = [sys.executable, *worker, "snello", f"{options.shape}:int4", "--step-ms", str(options.step_ms)]
    ours += ["--context", str(options.longest)]
    peers = peers_folder()
    theirs = [str(peers / "openvino" / "bin" / "python"), *worker, "openvino"]
    theirs += [str(peers / "models" / "openvino" / f"{options.shape}-int4")]
    commands = {"snello": ours, "openvino": theirs}
    if options.only:
        commands = {options.only: commands[options.only]}
    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds):
        order = list(commands) if number % 2 == 0 else list(reversed(commands))
        for name in order:
            rounds.append({"round": number, "name": name, **summary(run(commands[name], requests))})
            print(json.dumps(rounds[-1]), flush=True)
    document = {
        "command": f"python -m benchmarks.mixed_load --trace TRACE {' '.join(_given(options))}".strip(),
        "requests": len(requests),
        "requests_per_minute": options.rate,
        "prompt_tokens": {"median": float(np.median([p for _, p, _ in trace])), "max": max(p for _, p, _ in trace)},
        "answer_tokens": {"median": float(np.median([a for _, _, a in trace])), "max": max(a for _, _, a in trace)},
        "runs": rounds,
    }
    save(options.output, (core.select_isa(None),), document)


def _given(options: argparse.Namespace) -> list[str]:
    names = ("shape", "requests", "skip", "rate", "longest", "rounds", "step_ms")
    return [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]


if __name__ == "__main__":
    main()
