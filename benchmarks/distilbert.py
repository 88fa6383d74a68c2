"""DistilBERT's claim on a real encoder: half the layers and a smaller vocabulary, taught by the whole.

    python -m benchmarks.distilbert --data ../shared/data/eval --teacher FOLDER --keep DIR
    python -m benchmarks.distilbert --data ../shared/data/eval --teacher FOLDER --keep DIR --speed
    python -m benchmarks.distilbert --data ../shared/data/eval --teacher FOLDER --keep DIR --test

adds to benchmarks/results/distilbert.json, seed by seed, so that a run that was stopped goes on. The teacher is
all-MiniLM-L6-v2 after it learned SST-2 with all weights from all phrases, as `benchmarks.lora_sst2` leaves it. Its
vocabulary is trimmed to what the training phrases hold; every other layer of that is the student, which learns from the
teacher's answers to the training phrases alone (no label is read) once through. Beside it stands the student before it
learned. `--speed` needs a quiet machine: phrases a second on our own engine, one thread, in turn. `--test` reads the
test sentences once: accuracies, and the student's over the teacher's with a two-sided 95% t-interval over seeds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.encoders import Table, paired, right_answers, tokenized
from benchmarks.lora_sst2 import tell
from benchmarks.sst2 import read_sst2
from snello.engine.native import NativeExecutor
from snello.measure.bootstrap import t_interval
from snello.models import load
from snello.models.fewer_layers import FewerLayers
from snello.models.model import Model
from snello.models.plain_folder import write_plain_folder
from snello.models.spec import Deployment
from snello.techniques.base import Context
from snello.techniques.distill import Distill
from snello.techniques.trim import Trim

RESULTS = Path(__file__).parent / "results" / "distilbert.json"
TURNS, TIMED = 5, 200  # turns of each model, and phrases of each turn
BATCH = 64
ANYHOW = 2_100  # tokens that stay whatever the text holds: single characters and special tokens
LEAST_COUNT = 2  # times that the training phrases hold a token that stays
RECIPE: dict[str, Any] = {"student": "alternate", "loss": "forward:1,cosine:1", "temperature": 2.0, "rate": 3e-4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="the folder of sst2_{train,dev,test}.tsv")
    parser.add_argument("--teacher", required=True, type=Path, help="a classifier that benchmarks.lora_sst2 left")
    parser.add_argument("--keep", required=True, type=Path, help="where the folders are left, or found")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--passes", type=float, default=1.0)
    parser.add_argument("--speed", action="store_true", help="only time what is in --keep")
    parser.add_argument("--test", action="store_true", help="only read the test sentences")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(args)
    if args.speed:
        study.speed()
    elif args.test:
        study.test()
    else:
        study.train()


class Study:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        command = f"python -m benchmarks.distilbert --data {args.data} --teacher FOLDER --keep DIR"
        facts = {"command": f"{command}, then with --speed and --test", "options": RECIPE, "passes": args.passes}
        self.table = Table(RESULTS, **facts)
        self.splits = read_sst2(args.data)
        self.teacher = load(args.teacher)

    def train(self) -> None:
        trimmed = self._trimmed()
        self._unlearned(trimmed)
        windows = [text.tokens for text in tokenized(trimmed, self.splits.train)]
        for seed in self.args.seeds:
            name = f"student, seed {seed}"
            if "dev" not in self.table.rows.get(name, {}):
                self._taught(name, seed, trimmed, windows)

    def _trimmed(self) -> Model:
        path = self.args.keep / "trimmed"
        if not path.exists():
            windows = [text.tokens for text in tokenized(self.teacher, self.splits.train)]
            counts = np.bincount(np.concatenate(windows), minlength=self.teacher.spec.vocab_size)
            keep = ANYHOW + int((counts >= LEAST_COUNT).sum())
            Trim(keep=keep, min_count=LEAST_COUNT).apply(self.teacher, Context(output=path, windows=windows))
        found = load(path)
        for name, model in (("teacher", self.teacher), ("trimmed", found)):
            self._row(name, model)
        return found

    def _unlearned(self, trimmed: Model) -> None:
        path, spec = self.args.keep / "unlearned", Distill(**RECIPE).plan(trimmed.spec)
        if not path.exists():
            weights = FewerLayers(trimmed.weights, range(0, len(trimmed.spec.layers), 2))
            write_plain_folder(path, spec, trimmed, trimmed.history, weights.values)
        self._row("every other layer, not taught", load(path))

    def _taught(self, name: str, seed: int, trimmed: Model, windows: list[np.ndarray]) -> None:
        there = sum(map(len, windows))
        how = Distill(**RECIPE, tokens=round(self.args.passes * there), batch_tokens=BATCH * there // len(windows))
        path = self.args.keep / f"student-{seed}"
        began = time.process_time()
        context = Context(output=path, windows=windows, original=trimmed, seed=seed, threads=1, progress=tell)
        found = how.apply(trimmed, context)
        seconds = round(time.process_time() - began, 1)
        self._row(name, found, train_tokens=found.history[-1]["tokens"], cpu_seconds=seconds)

    def _row(self, name: str, model: Model, **facts: Any) -> None:
        if "dev" not in self.table.rows.get(name, {}):
            dev = round(float(right_answers(model, self.splits.dev).mean()), 4)
            self.table.add(name, {"dev": dev, **sizes(model), **facts})

    def speed(self) -> None:
        """Phrases a second of teacher and student, in turn (A B B A ...), and the ratio of each turn."""
        student = load(self.args.keep / f"student-{self.args.seeds[0]}")
        rates: dict[str, list[float]] = {"teacher": [], "student": []}
        with (
            NativeExecutor(self.teacher, Deployment(threads=1)) as a,
            NativeExecutor(student, Deployment(threads=1)) as b,
        ):
            both = {"teacher": (a, self.teacher), "student": (b, student)}
            texts = {n: [t.tokens for t in tokenized(m, self.splits.dev[:TIMED])] for n, (_, m) in both.items()}
            for turn in range(-1, TURNS):
                for name in sorted(both, reverse=turn % 2 == 0):
                    began = time.perf_counter()
                    for tokens in texts[name]:
                        both[name][0].encode(tokens)
                    if turn >= 0:
                        rates[name].append(TIMED / (time.perf_counter() - began))
        ratios = [b / a for a, b in zip(rates["teacher"], rates["student"], strict=True)]
        for name, each in rates.items():
            self.table.add(f"speed, {name}", {"phrases_a_second": round(statistics.median(each), 1)})
        times = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
        self.table.add("speed, student over teacher", {key: round(value, 3) for key, value in times.items()})

    def test(self) -> None:
        test, keep = self.splits.test, self.args.keep
        teacher = right_answers(self.teacher, test)
        seeds = [seed for seed in self.args.seeds if f"student, seed {seed}" in self.table.rows]
        students = {f"student, seed {seed}": load(keep / f"student-{seed}") for seed in seeds}
        others = {"trimmed": load(keep / "trimmed"), "every other layer, not taught": load(keep / "unlearned")}
        self.table.add("teacher", {"test": round(float(teacher.mean()), 4)})
        ratios = []
        for name, model in {**others, **students}.items():
            found = right_answers(model, test)
            ratio = float(found.mean() / teacher.mean())
            ratios += [ratio] if name in students else []
            row = {"test": round(float(found.mean()), 4), "ratio": round(ratio, 4)}
            self.table.add(name, {**row, "over_teacher_points": paired(found, teacher)})
        interval = {key: round(value, 4) for key, value in t_interval(np.array(ratios)).to_json().items()}
        self.table.add("ratio over seeds", {"seeds": len(ratios), **interval})


def sizes(model: Model) -> dict[str, int]:
    """Parameters in all, and of the layers alone."""
    weights = model.weights
    layers = [name for name in weights.names() if name.startswith("layers.")]
    return {
        "parameters": model.num_parameters,
        "layer_parameters": sum(int(np.prod(weights.shape(name))) for name in layers),
        "vocabulary": model.spec.vocab_size,
        "layers": len(model.spec.layers),
    }


if __name__ == "__main__":
    main()
