"""What eight bits alone give, the first promise of every toolkit for small machines: a quarter of FP32's size, faster.

    python -m benchmarks.int8_headline --model ../shared/data/models/novels-16m --text held_out.txt
    python -m benchmarks.int8_headline --model demo

Three contenders in one process: the model in INT8 by round-to-nearest, which needs no text; the same engine with FP32
weights and cache; Transformers in FP32. Each is timed in turn (A B C C B A) on one answer, a prompt and a continuation
of fixed length, then all read the same held-out text. Kept in benchmarks/results/int8_headline.json, by model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.decode_vs_peers import ROOT, refuse_noise
from benchmarks.quantize_methods import WINDOW, cut, mean, texts
from snello.engine.native import NativeExecutor
from snello.interop.huggingface import hf_config, hf_tensors
from snello.measure.bootstrap import Clusters, mean_interval
from snello.measure.machine import cpu_name
from snello.measure.speed import Clock, Workload
from snello.models import load
from snello.models.model import Model
from snello.models.spec import Deployment, Format
from snello.models.tensor_writer import write_shards
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize

RESULTS = ROOT / "benchmarks" / "results" / "int8_headline.json"
INT8, FP32, TRANSFORMERS = "int8", "fp32", "transformers fp32"
MOST_BYTES = 5_000_000_000  # of a file


class Contender(Protocol):
    weights_bytes: int

    def answer(self, prompt: int, generate: int) -> tuple[float, float]:
        """Seconds to the first token, and of each later one."""

    def losses(self, windows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Nats of each token."""


class Ours:
    def __init__(self, model: Model, threads: int) -> None:
        self._executor = NativeExecutor(model, Deployment(threads=threads, context=WINDOW))
        self.weights_bytes = self._executor.weights_bytes

    def answer(self, prompt: int, generate: int) -> tuple[float, float]:
        first, between = Clock(self._executor, Workload(prompt=prompt, generate=generate)).one_stream(generate - 1)
        return first, statistics.median(between)

    def losses(self, windows: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [-self._executor.score(window).log_probabilities.astype(np.float64) for window in windows]


class Transformers:
    def __init__(self, folder: Path, threads: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.weights_bytes = sum(p.numel() * p.element_size() for p in self._model.parameters())

    @torch.inference_mode()
    def answer(self, prompt: int, generate: int) -> tuple[float, float]:
        words = self._model.config.vocab_size
        tokens = torch.from_numpy(np.random.default_rng(0).integers(0, words, (1, prompt)))
        begin = time.perf_counter()
        out = self._model(tokens, use_cache=True, logits_to_keep=1)
        moments = [time.perf_counter()]
        for _ in range(generate - 1):
            token = out.logits[:, -1:].argmax(-1)
            out = self._model(token, past_key_values=out.past_key_values, use_cache=True)
            moments.append(time.perf_counter())
        return moments[0] - begin, statistics.median(np.diff(moments).tolist())

    @torch.inference_mode()
    def losses(self, windows: Sequence[np.ndarray]) -> list[np.ndarray]:
        found = []
        for window in windows:
            tokens = torch.from_numpy(window.astype(np.int64))
            logits = self._model(tokens[None, :-1]).logits[0].double()
            found.append(torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").numpy())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, help="held out; needed but for demo")
    parser.add_argument("--windows", type=int, default=24, help="of 512 tokens, for the loss")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="each measures everybody twice")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--force", action="store_true", help="measure on a busy machine all the same")
    args = parser.parse_args()
    refuse_noise(args.force)
    args.calib = args.text  # `texts` wants both; nothing is calibrated here
    original = load(args.model)
    held = cut(original, texts(parser, args)[1], args.windows)
    with tempfile.TemporaryDirectory() as folder:
        contenders = make(original, Path(folder), args.threads)
        answers = in_turn(contenders, args)
        losses = {name: contender.losses(held) for name, contender in contenders.items()}
    facts = {
        "command": f"python -m benchmarks.int8_headline --model {args.model}"
        + (f" --text {args.text}" * bool(args.text)),
        "when": time.strftime("%Y-%m-%d"),
        "processor": cpu_name(),
        "threads": args.threads,
        "prompt": args.prompt,
        "generate": args.generate,
        "tokens": sum(map(len, losses[FP32])),
    }
    rows = {name: row(name, contenders[name], answers, losses) for name in contenders}
    measured = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    measured[Path(args.model).name] = {**facts, "rows": rows}
    RESULTS.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1))


def make(original: Model, folder: Path, threads: int) -> dict[str, Contender]:
    spec = dataclasses.replace(original.spec, default_format=Format(weights="fp32"), cache_format="fp32")
    wide = dataclasses.replace(original, spec=spec)
    lean = Quantize(weights="int8").apply(original, Context(output=folder / "lean"))
    (folder / "plain").mkdir()
    write_shards(folder / "plain", *hf_tensors(wide), "fp32", MOST_BYTES)
    (folder / "plain" / "config.json").write_text(json.dumps(hf_config(wide, "fp32")), encoding="utf-8")
    return {INT8: Ours(lean, threads), FP32: Ours(wide, threads), TRANSFORMERS: Transformers(folder / "plain", threads)}


def in_turn(contenders: dict[str, Contender], args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    names = list(contenders)
    for contender in contenders.values():
        contender.answer(args.prompt, args.generate)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for name in (names + names[::-1]) * args.rounds:
        found[name].append(contenders[name].answer(args.prompt, args.generate))
    return found


def row(
    name: str,
    contender: Contender,
    answers: dict[str, list[tuple[float, float]]],
    losses: dict[str, list[np.ndarray]],
) -> dict[str, Any]:
    """Sizes, speeds, how many times as fast INT8 is, and what is lost beside FP32 in the same engine."""
    first, between = (statistics.median(pair[i] for pair in answers[name]) for i in (0, 1))
    ratios = [[b[i] / a[i] for a, b in zip(answers[INT8], answers[name], strict=True)] for i in (0, 1)]
    differences = [after - before for before, after in zip(losses[FP32], losses[name], strict=True)]
    found = mean_interval(Clusters.of(differences, list(range(len(differences)))), seed=0)
    return {
        "weights_bytes": contender.weights_bytes,
        "first_token_seconds": first,
        "tokens_per_second": 1 / between,
        "int8_first_token_times_as_fast": spread(ratios[0]),
        "int8_decode_times_as_fast": spread(ratios[1]),
        "nats": mean(losses[name]),
        "increase_nats": {bound: round(value, 6) for bound, value in found.to_json().items()},
    }


def spread(values: list[float]) -> dict[str, float]:
    return {name: round(f(values), 3) for name, f in (("median", statistics.median), ("min", min), ("max", max))}


if __name__ == "__main__":
    main()
