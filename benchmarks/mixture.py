"""How fast is a mixture of experts, beside its ceiling and beside Transformers on the same weights?

Random weights in the shape of dart-v2-moe (four experts in each of four layers, two for each token). One process, the
three engines in turn, forwards and backwards; medians over all turns and the ratio of each pair of turns.

    python -m benchmarks.mixture [--threads 2] [--rounds 8]     writes benchmarks/results/mixture.json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads of one engine must not spin while another is timed

from snello.engine.native import NativeExecutor
from snello.measure.machine import ceiling, machine
from snello.measure.peers.checkpoint import shape_of, write_checkpoint
from snello.models import load
from snello.models.model import Model
from snello.models.spec import Deployment
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize

SHAPE, PROMPT, GENERATE = "dart-v2-moe", 128, 64
RESULTS = Path(__file__).parent / "results" / "mixture.json"
Timed = tuple[float, float]  # seconds of the prompt, seconds of each further token


def snello(model: Model, threads: int) -> tuple[NativeExecutor, Callable[[np.ndarray], Timed]]:
    executor = NativeExecutor(model, Deployment(threads=threads, context=PROMPT + GENERATE))

    def run(prompt: np.ndarray) -> Timed:
        with executor.session() as session:
            begin = time.perf_counter()
            token = int(session.feed(prompt).argmax())
            first = time.perf_counter()
            for _ in range(GENERATE - 1):
                token = int(session.feed([token]).argmax())
            return first - begin, (time.perf_counter() - first) / (GENERATE - 1)

    return executor, run


def transformers(folder: Path, threads: int) -> Callable[[np.ndarray], Timed]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run(prompt: np.ndarray) -> Timed:
        begin = time.perf_counter()
        out = model(torch.from_numpy(prompt.astype(np.int64))[None], use_cache=True, logits_to_keep=1)
        first = time.perf_counter()
        for _ in range(GENERATE - 1):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return first - begin, (time.perf_counter() - first) / (GENERATE - 1)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), arguments.threads, arguments.rounds)


def measure(folder: Path, threads: int, rounds: int) -> None:
    write_checkpoint(shape_of(SHAPE), folder / "original")
    original = load(folder / "original")
    lean = Quantize().apply(original, Context(output=folder / "lean"))
    here = machine(threads=threads)
    executors, runs = zip(*(snello(model, threads) for model in (original, lean)), strict=True)
    engines = {
        "Snello INT4": runs[1],
        "Snello BF16": runs[0],
        "Transformers BF16": transformers(folder / "original", threads),
    }
    prompt = np.random.default_rng(0).integers(1, original.spec.vocab_size, PROMPT).astype(np.int32)
    times: dict[str, list[Timed]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name in list(engines)[:: -1 if turn % 2 else 1]:
            seconds = engines[name](prompt)
            if turn:  # the first is to warm up
                times[name].append(seconds)
    ceilings = [ceiling(one.spec, here, prompt=PROMPT, generate=GENERATE) for one in (executors[1], executors[0])]
    theirs = np.array(times["Transformers BF16"])
    rows = {}
    for index, (name, seconds) in enumerate(times.items()):
        both = np.array(seconds)
        ratio, (prompted, each) = np.median(theirs / both, axis=0), np.median(both, axis=0)
        rows[name] = {
            "decode_tokens_per_second": 1 / each,
            "prompt_tokens_per_second": PROMPT / prompted,
            "decode_over_transformers": ratio[1],
            "prompt_over_transformers": ratio[0],
        }
        if index < len(ceilings):
            rows[name]["share_of_decode_ceiling"] = 1 / each / ceilings[index].decode_tokens_per_second
            rows[name]["bytes_per_token"] = ceilings[index].bytes_per_token
    result = {"machine": str(here), "threads": threads, "prompt": PROMPT, "answer": GENERATE, "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    for one in executors:
        one.close()


if __name__ == "__main__":
    main()
