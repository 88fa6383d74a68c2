"""What a correction of low rank learns of SST-2, beside nothing learned before, a head alone, and all weights.

    python -m benchmarks.lora_sst2 --data ../shared/data/eval --keep DIR
    python -m benchmarks.lora_sst2 --data ../shared/data/eval --keep DIR --test

adds to benchmarks/results/lora_sst2.json, row by row, so that a run that was stopped goes on. all-MiniLM-L6-v2 learns
from 100, 1,000, 10,000 and all training phrases of `benchmarks.sst2`'s cut, in four ways: the same shape from random
weights; frozen, only pooler and last layer; LoRA of rank 4 on all linears, with the last layer; all weights. Each way
tries three rates at 1,000, the best on `dev` is kept, there and at the other sizes.
`cpu_seconds` are of one training, all threads together. `--test` reads the test sentences, once, on our own engine,
when every row is there; each way beside `full` is the mean over the seeds that both have, its interval two one-sided
95% bounds from redrawing sentences.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.encoders import Table, classifier_of, minilm_folder, paired, right_answers, tokenized, write_classifier
from benchmarks.sst2 import read_sst2
from snello.models import load
from snello.models.adapter import Adapter
from snello.models.model import Floats
from snello.models.reference import Reference
from snello.techniques.adapt import Adapt, lora
from snello.techniques.adapt.classify import Labelled, learned, learner, score, teach

RESULTS = Path(__file__).parent / "results" / "lora_sst2.json"


class Way(NamedTuple):
    """`rates` are tried three times as large from one to the next."""

    options: dict[str, Any]
    rates: tuple[float, ...]
    random: bool = False


WAYS = {
    "from scratch": Way({"method": "full"}, (1e-4, 3e-4, 1e-3), random=True),
    "frozen + head": Way({"method": "head"}, (1e-3, 3e-3, 1e-2)),
    "LoRA": Way({"method": "lora", "rank": 4, "alpha": 8.0}, (3e-4, 1e-3, 3e-3)),
    "full": Way({"method": "full"}, (3e-5, 1e-4, 3e-4)),
}


@dataclass(frozen=True)
class Size:
    count: int | None  # None: all
    passes: float
    batch: int


SIZES = {"1,000": Size(1000, 6, 32), "100": Size(100, 15, 32), "10,000": Size(10_000, 2, 64), "all": Size(None, 1, 64)}
TUNED_AT = {"100": "1,000", "10,000": "1,000", "all": "1,000"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="the folder of sst2_{train,dev,test}.tsv")
    parser.add_argument("--model", type=Path, help="all-MiniLM-L6-v2 [of the installed package]")
    parser.add_argument("--keep", required=True, type=Path, help="where the trained folders are left, or found")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--test", action="store_true", help="read the test sentences, when every row is there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    study = Study(args)
    study.test() if args.test else study.train()


class Study:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = load(args.model or minilm_folder())
        self.splits = read_sst2(args.data)
        self.table = Table(
            RESULTS,
            command=f"python -m benchmarks.lora_sst2 --data {args.data} --keep DIR, then with --test",
            phrases={name: len(getattr(self.splits, name)) for name in ("train", "dev", "test")},
            parameters=self.model.num_parameters,
            sizes={name: dataclasses.asdict(size) for name, size in SIZES.items()},
        )

    def train(self) -> None:
        self.texts = tokenized(self.model, self.splits.train)
        self.dev = tokenized(self.model, self.splits.dev)
        for seed in range(self.args.seeds):
            for size in self.args.sizes:
                for way in self.args.ways:
                    self._row(way, size, seed)

    def _row(self, way: str, size: str, seed: int) -> None:
        """Other seeds, and all phrases, take the rate that was best."""
        name = f"{way}, {size}, seed {seed}"
        row = self.table.rows.get(name, {})
        if "dev" in row:
            return
        rates = WAYS[way].rates
        tuned = f"{way}, {TUNED_AT.get(size, size)}, seed 0"
        if tuned != name:
            rates = (self.table.rows[tuned]["rate"],)
        tried: dict[str, Any] = dict(row.get("tried", {}))
        for rate in rates:
            if f"{rate:g}" in tried:
                continue
            facts, values = self._trained(way, size, seed, rate)
            best = max((each["dev"] for each in tried.values()), default=-1.0)
            tried[f"{rate:g}"] = facts
            if facts["dev"] > best:
                classifier = classifier_of(self.model, random=WAYS[way].random, seed=seed)
                write_classifier(self._place(name), classifier, values, {"technique": "adapt", **facts})
            self.table.add(name, {"tried": tried})
        chosen = max(tried, key=lambda each: float(tried[each]["dev"]))
        self.table.add(name, {"way": way, "size": size, "seed": seed, "rate": float(chosen), **tried[chosen]})

    def _trained(self, way: str, size: str, seed: int, rate: float) -> tuple[dict[str, Any], dict[str, Floats]]:
        much = SIZES[size]
        order = np.random.default_rng(seed).permutation(len(self.texts))
        texts = [self.texts[place] for place in order[: much.count]]
        options = Adapt(**WAYS[way].options, rate=rate, epochs=much.passes, batch=much.batch)
        classifier = classifier_of(self.model, random=WAYS[way].random, seed=seed)
        module = learner(classifier, options, seed)
        began = time.process_time()
        work = self.args.keep / f".{way}, {size}, {seed}, {rate:g}".replace(" ", "-")
        how: dict[str, Any] = {"base": classifier.model.digest, "seed": seed, "work_dir": work}
        done = teach(module, texts, options, progress=tell, threads=self.args.threads, **how)
        seconds = time.process_time() - began
        parameters = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        facts = {
            "dev": accuracy(module, self.dev),
            "steps": done.steps,
            "cpu_seconds": None if done.resumed_from else round(seconds, 1),
            "threads": self.args.threads,
            "trained_parameters": parameters,
            "precision": done.precision,
            "loss": round(float(np.mean(done.losses[-20:])), 4),
        }
        return facts, merged(module, options)

    def _place(self, name: str) -> Path:
        return Path(self.args.keep / name.replace(", ", "-").replace(" ", "_"))

    def test(self) -> None:
        """Right answers, then each way beside all weights, sentence by sentence, over the seeds that both have."""
        rows = {name: row for name, row in self.table.rows.items() if "dev" in row}
        right = {name: right_answers(load(self._place(name)), self.splits.test) for name in rows}
        for name, found in right.items():
            self.table.add(name, {"test": round(float(found.mean()), 4)})
        for way, size in dict.fromkeys((row["way"], row["size"]) for row in rows.values() if row["way"] != "full"):
            names = [(f"{way}, {size}, seed {seed}", f"full, {size}, seed {seed}") for seed in range(len(rows))]
            both = [(right[own], right[full]) for own, full in names if own in right and full in right]
            if both:
                own, full = (np.mean(answers, axis=0) for answers in zip(*both, strict=True))
                self.table.add(f"{way} over full, {size}", {"seeds": len(both), "points": paired(own, full)})


def accuracy(module: Reference, texts: list[Labelled]) -> float:
    true = np.array([text.label for text in texts])
    return round(float((score(module, texts).argmax(1) == true).mean()), 4)


def merged(module: Reference, options: Adapt) -> dict[str, Floats]:
    """What was learned, corrections added to their linears, by canonical name."""
    how: dict[str, Any] = {"rank": options.rank, "alpha": options.alpha, "scale": options.scale}
    adapter = Adapter(factors=lora.factors(module), magnitudes=lora.magnitudes(module), **how)
    base = {f"{name}.weight": module.get_parameter(f"{name}.base.weight").numpy() for name in adapter.factors}
    return learned(module) | {name: adapter.merged(name.removesuffix(".weight"), base[name]) for name in base}


def tell(message: str, fraction: float) -> None:
    print(f"\r  {fraction:4.0%} {message}   ", end="", flush=True)


if __name__ == "__main__":
    main()
