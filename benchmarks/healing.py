"""What studies of healing share: text that is cut once, models that are made once and found again, rows that are kept.

A study trains for minutes a row, so each model stays in a folder of `--keep` under its row's name and each row is
written as soon as it is known: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.prune_structured import compare, losses
from benchmarks.sparsify_methods import texts
from snello.models import load
from snello.models.model import Model
from snello.models.overlap import ngrams, seen_ngrams
from snello.techniques.base import Context
from snello.techniques.distill import Distill

WINDOW = 256


class Study:
    """One model's rows in a file of results.

    Args:
        args: with `model`, `keep`, and for `cut` also `windows`, `tokens` and, for all but `demo`, `train` and `text`.
        beside: tells this study of the model from another one in the same file.
    """

    def __init__(self, args: argparse.Namespace, results: Path, threads: int, beside: str = "") -> None:
        self.args, self.name, self.threads = args, Path(args.model).name + beside, threads
        self.original, self.folder = load(args.model), args.keep / self.name
        self._path = results
        self.own = self._read().setdefault(self.name, {"rows": {}})
        self.rows: dict[str, Any] = self.own["rows"]

    def cut(self) -> None:
        """Held-out windows, training windows that share no 13 tokens in a row with them, the original's losses."""
        args, model = self.args, self.original
        train, held = self._texts()
        self.held = windows(model, held, args.windows)
        self.train = unseen(windows(model, train, args.tokens // WINDOW), self.held)
        self.base = losses(model, self.held)

    def _texts(self) -> tuple[str, str]:
        """To train on, and to judge by; of `demo` what it learned from, and the modules it has never seen."""
        args = self.args
        if args.model == "demo":
            return texts("demo", None, None)
        return beginning(args.train, 10 * args.tokens), beginning(args.text, 1_000_000)

    @property
    def tokens(self) -> dict[str, int]:
        return {"held_tokens": sum(map(len, self.base)), "train_tokens": sum(map(len, self.train))}

    def place(self, name: str) -> Path:
        return Path(self.folder / name.replace("/", "-of-"))

    def made(self, name: str, make: Callable[[Path], Model]) -> Model:
        path = self.place(name)
        return load(path) if path.exists() else make(path)

    def trained(self, name: str, start: Model, how: Distill, seed: int = 0) -> Model:
        path = self.place(name)
        if path.exists():
            return load(path)
        context = Context(
            output=path,
            windows=self.train,
            held_out=self.held,
            original=self.original,
            seed=seed,
            threads=self.threads,
            progress=lambda message, _: print(f"{name}: {message}", flush=True),
        )
        began = time.monotonic()
        found = how.apply(start, context)
        minutes = round((time.monotonic() - began) / 60, 2)
        self.rows.setdefault(name, {}).update({"train_tokens": found.history[-1]["tokens"], "minutes": minutes})
        return found

    def healed(self, name: str, start: Model, how: Distill, seeds: int) -> Iterator[tuple[str, Model]]:
        """Row and model of each seed; the first seed's row has no number, so that more seeds can be added to it."""
        for seed in range(seeds):
            row = f"{name}, healed" + (f", seed {seed}" if seed else "")
            yield row, self.trained(row, start, how, seed)

    def control(self, how: Distill) -> Model:
        """The original trained alike on the text alone. `better`: the losses of whichever of the two reads better."""
        alike = how.control(self.original.spec)
        assert alike is not None
        found = self.trained("control", self.original, alike)
        self.better = min(self.base, losses(found, self.held), key=lambda rows: float(np.concatenate(rows).mean()))
        return found

    def row(self, name: str, model: Model, facts: Callable[[list[np.ndarray]], dict[str, Any]]) -> None:
        """Nats a token and what they are above the original's; `facts` of these losses are kept beside."""
        found = losses(model, self.held)
        row = self.rows.setdefault(name, {})
        row |= {"nats": round(float(np.concatenate(found).mean()), 4), **compare(self.base, found), **facts(found)}
        print(name, json.dumps(row), flush=True)
        self.write()

    def write(self) -> None:
        """Another study may have written to the file meanwhile: what is not this one's stays."""
        results = self._read() | {self.name: self.own}
        beside = self._path.with_suffix(f".{os.getpid()}.partial")
        beside.write_text(json.dumps(results, indent=1) + "\n")
        beside.replace(self._path)

    def _read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {}
        return found


def beginning(path: Path, characters: int) -> str:
    with path.open(encoding="utf-8") as file:
        return file.read(characters)


def windows(model: Model, text: str, count: int) -> list[np.ndarray]:
    """This many windows, spread evenly over the text."""
    ids = np.array(model.tokenizer.encode(text), np.int32)
    stride = max(WINDOW, len(ids) // count)
    return [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW, stride)][:count]


def unseen(train: list[np.ndarray], held: list[np.ndarray]) -> list[np.ndarray]:
    seen = seen_ngrams(held)
    return [window for window in train if not np.isin(ngrams(window), seen).any()]
