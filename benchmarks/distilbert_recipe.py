"""DistilBERT's own recipe, on a small BERT that learns masked words here: half the layers, taught by the whole.

    python -m benchmarks.distilbert_recipe --train train.txt --text held_out.txt --keep DIR
    python -m benchmarks.distilbert_recipe --train train.txt --text held_out.txt --keep DIR --speed

adds to benchmarks/results/distilbert_recipe.json, model by model, so that a run that was stopped goes on. The BERT has
the 6 layers of all-MiniLM-L6-v2, without the words that `--train` seldom has, and learns from that text to fill in
masked words, with a head that begins at random (from random weights a BERT would stay at the mere frequency of words
for longer than this may take). The student is every other layer of it, taught with DistilBERT's three losses: 5 times
the teacher's words at temperature 2, 2 times masked words, 1 time the cosine of the last rows. Beside it: the student
before it was taught; the BERT itself on the same tokens of text (*control*); the same half from random weights, taught
alike. Nats a hidden word and how often the likeliest word is right, on held-out windows by our own engine, the same
words hidden for all; intervals are one-sided 95% bounds from redrawing windows. Training windows share no 13 tokens in
a row with held-out ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.distilbert import ANYHOW, sizes
from benchmarks.encoders import Table, Unlearned, minilm_folder
from benchmarks.healing import unseen
from benchmarks.lora_sst2 import tell
from snello.engine.native import NativeExecutor
from snello.measure.bootstrap import Clusters, mean_interval
from snello.measure.rulers import MaskedTokens, Reading
from snello.measure.text import Block
from snello.models import load
from snello.models.fewer_layers import FewerLayers
from snello.models.model import Model, Weights
from snello.models.plain_folder import write_plain_folder
from snello.models.spec import Deployment
from snello.techniques.base import Context
from snello.techniques.distill import Distill
from snello.techniques.trim import Trim

RESULTS = Path(__file__).parent / "results" / "distilbert_recipe.json"
OFTEN, WINDOW, HELD, TURNS = 16, 128, 120, 5
RECIPE: dict[str, Any] = {"student": "alternate", "loss": "forward:5,text:2,cosine:1", "temperature": 2.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--keep", required=True, type=Path, help="where the folders are left, or found")
    parser.add_argument("--model", type=Path, help="all-MiniLM-L6-v2 [of the installed package]")
    parser.add_argument("--base-tokens", type=int, default=1_500_000, help="that the BERT learns from")
    parser.add_argument("--tokens", type=int, default=800_000, help="that everybody else learns from")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="of the student's training")
    parser.add_argument("--speed", action="store_true", help="only time what is in --keep")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(args)
    study.speed() if args.speed else study.all()


class Study:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        files = f"--train {args.train} --text {args.text} --keep DIR"
        command = f"python -m benchmarks.distilbert_recipe {files} --seeds 0 1 2, then with --speed"
        facts = {"command": command, "options": RECIPE}
        self.table = Table(RESULTS, **facts, base_tokens=args.base_tokens, tokens=args.tokens)

    def all(self) -> None:
        args = self.args
        start = self._start()
        self.held = self._windows(start, args.text, HELD)
        own = unseen(self._windows(start, args.train, (args.base_tokens + args.tokens) // WINDOW), self.held)
        part = len(own) * args.base_tokens // (args.base_tokens + args.tokens)
        first, self.more = own[:part], own[part:]
        plain = Distill(loss="text", tokens=args.base_tokens, rate=5e-4, batch_tokens=4096)
        base = self._trained("BERT", start, plain, first, None)
        self._row("BERT", base, base)
        text = dataclasses.replace(plain, tokens=args.tokens)
        self._row("control", self._trained("control", base, text, self.more, None), base)
        taught = Distill(**RECIPE, tokens=args.tokens, rate=5e-4, batch_tokens=4096)
        half = taught.plan(base.spec)
        self._row("student, not taught", self._written("not-taught", base, base.weights), base)
        for seed in args.seeds:
            name = "student" + (f", seed {seed}" if seed else "")
            self._row(name, self._trained(name, base, taught, self.more, base, seed), base)
        nothing = self._written("random-half", base, Unlearned(base.spec, 1))
        alone = dataclasses.replace(taught, student="given", rate=1e-3)
        self._row("same half from scratch", self._trained("scratch", nothing, alone, self.more, base), base)
        assert half == nothing.spec

    def _start(self) -> Model:
        """MiniLM's encoder with fewer words and a head for masked ones that learned nothing."""
        whole, path = self.args.keep / "whole", self.args.keep / "start"
        if not path.exists():
            import transformers

            torch.manual_seed(0)
            source = self.args.model or minilm_folder()
            transformers.BertForMaskedLM.from_pretrained(source).save_pretrained(whole)
            transformers.AutoTokenizer.from_pretrained(source).save_pretrained(whole)
            model = load(whole)
            count = (self.args.base_tokens + self.args.tokens) // WINDOW
            windows = self._windows(model, self.args.train, count)
            counts = np.bincount(np.concatenate(windows), minlength=model.spec.vocab_size)
            trim = Trim(keep=ANYHOW + int((counts >= OFTEN).sum()), min_count=OFTEN)
            trim.apply(model, Context(output=path, windows=windows))
        return load(path)

    def _windows(self, model: Model, path: Path, count: int) -> list[np.ndarray]:
        """This many windows, spread evenly over the first characters of the file, each between [CLS] and [SEP]."""
        with path.open(encoding="utf-8") as file:
            ids = model.tokenizer.encode(file.read(max(1_000_000, 6 * count * WINDOW)), add_special=False)
        first, last = (model.tokenizer.token_id(token) for token in ("[CLS]", "[SEP]"))
        own = WINDOW - 2
        stride = max(own, len(ids) // count)
        starts = range(0, len(ids) - own, stride)
        return [np.array([first, *ids[start : start + own], last], np.int32) for start in starts][:count]

    def _trained(
        self, name: str, start: Model, how: Distill, windows: list[np.ndarray], teacher: Model | None, seed: int = 0
    ) -> Model:
        path = self.args.keep / name
        if path.exists():
            return load(path)
        began = time.process_time()
        found = how.apply(
            start,
            Context(
                output=path,
                windows=windows,
                held_out=self.held,
                original=teacher,
                seed=seed,
                threads=1,
                progress=tell,
            ),
        )
        facts = {"train_tokens": found.history[-1]["tokens"], "cpu_seconds": round(time.process_time() - began, 1)}
        self.table.add({"scratch": "same half from scratch"}.get(name, name), facts)
        return found

    def _written(self, name: str, base: Model, weights: Weights) -> Model:
        """Every other layer of these weights."""
        path, spec = self.args.keep / name, Distill(**RECIPE).plan(base.spec)
        if not path.exists():
            fewer = FewerLayers(weights, range(0, len(base.spec.layers), 2))
            write_plain_folder(path, spec, base, base.history, fewer.values)
        return load(path)

    def _row(self, name: str, model: Model, base: Model) -> None:
        if "nats" in self.table.rows.get(name, {}):
            return
        found, beside = self._read(model), self._read(base)
        pairs = zip(found.values, beside.values, strict=True)
        differences = [own.astype(np.float64) - other for own, other in pairs]
        over = mean_interval(Clusters.of(differences, list(range(len(differences)))), seed=0)
        row = {"nats": round(float(np.concatenate(found.values).mean()), 4), "right": self._right(found)}
        bounds = {key: round(value, 4) for key, value in over.to_json().items()}
        self.table.add(name, {**row, "over_bert_nats": bounds, **sizes(model)})

    def _read(self, model: Model) -> Reading:
        mask = model.tokenizer.mask_token
        assert mask is not None
        self.ruler = MaskedTokens(mask)
        with NativeExecutor(model, Deployment(threads=1)) as executor:
            return self.ruler.read(executor, [_block(window, place) for place, window in enumerate(self.held)])

    def _right(self, found: Reading) -> float:
        """How many of the hidden words are the likeliest."""
        true = np.concatenate([window[self.ruler.hidden(window)] for window in self.held])
        return round(float((np.concatenate(found.choices) == true).mean()), 4)

    def speed(self) -> None:
        """Tokens a second of the BERT and its student, in turn."""
        base, student = load(self.args.keep / "BERT"), load(self.args.keep / "student")
        held = self._windows(base, self.args.text, HELD)
        ratios: list[float] = []
        with NativeExecutor(base, Deployment(threads=1)) as a, NativeExecutor(student, Deployment(threads=1)) as b:
            for turn in range(-1, TURNS):
                seconds = {}
                for name, executor in (("a", a), ("b", b)) if turn % 2 else (("b", b), ("a", a)):
                    began = time.perf_counter()
                    for window in held:
                        executor.encode(window)
                    seconds[name] = time.perf_counter() - began
                ratios += [seconds["a"] / seconds["b"]] if turn >= 0 else []
        times = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
        self.table.add("speed, student over BERT", {key: round(value, 3) for key, value in times.items()})


def _block(window: np.ndarray, place: int) -> Block:
    return Block(source="held", document=str(place), cluster=place, start=0, tokens=window, scored_from=0)


if __name__ == "__main__":
    main()
