"""What healing gives back after structured pruning, beside what the same training gives everybody else.

    python -m benchmarks.distill_after_prune --model FOLDER --train train.txt --text held_out.txt --keep DIR
    python -m benchmarks.distill_after_prune --model FOLDER --keep DIR --speed

adds to benchmarks/results/distill_after_prune.json, row by row, so that a run that was stopped goes on: the original;
its control (the original trained on the same tokens of text); and for each dimension and fraction the pruned model, the
same healed by the original, and the same shape from random weights on the same tokens, taught alike. All losses are
nats a token on held-out windows, with a two-sided 90% interval of the pruned model's increase from redrawing windows;
`over_the_better` compares with the original or the control, whichever is better. `--speed` needs a quiet machine and
adds decode speed over the original's, taken in turn. Training text shares no 13 tokens in a row with held-out windows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.prune_structured import NONE, compare, losses, shapes, speedup
from snello.errors import Unsupported
from snello.models import load
from snello.models.model import Floats, Model
from snello.models.overlap import ngrams, seen_ngrams
from snello.models.parameters import parameter_shapes
from snello.models.plain_folder import write_plain_folder
from snello.techniques.base import Context
from snello.techniques.distill import Distill
from snello.techniques.prune import Prune

RESULTS = Path(__file__).parent / "results" / "distill_after_prune.json"
WINDOW, CALIBRATION = 256, 24
SPREAD = 0.02  # of random weights, as GPT-2's and most after it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--keep", required=True, type=Path, help="where the folders are left, or found")
    parser.add_argument("--tokens", type=int, default=200_000, help="of training, for every row")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--windows", type=int, default=40, help="held-out windows of 256 tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=["ffn 50%", "layers 50%", "ffn 25%", "width 25%", "layers 25%"])
    parser.add_argument("--scratch", nargs="*", default=["ffn 50%"], help="rows that are also trained from nothing")
    parser.add_argument("--speed", action="store_true", help="only time what is in --keep")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    Study(args).timed() if args.speed else Study(args).all()


class Study:
    """One model's rows, written as soon as each is known."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.name = args, Path(args.model).name
        self.original, self.folder = load(args.model), args.keep / Path(args.model).name
        self.results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        self.rows: dict[str, Any] = self.results.setdefault(self.name, {"rows": {}})["rows"]

    def all(self) -> None:
        args, model = self.args, self.original
        self.held = windows(model, args.text, args.windows, 1_000_000)
        self.train = unseen(windows(model, args.train, args.tokens // WINDOW, 10 * args.tokens), self.held)
        self.base = losses(model, self.held)
        self.heal = Distill(tokens=args.tokens, rate=args.rate, batch_tokens=2048)
        self._header()
        control = self.heal.control(model.spec)
        assert control is not None
        trained = self._trained("control", model, control)
        found = losses(trained, self.held)
        self.better = min(self.base, found, key=lambda rows: float(np.concatenate(rows).mean()))
        self._row("original", model)
        self._row("control", trained)
        for row in args.only:
            self._shape(row)

    def timed(self) -> None:
        for row, found in self.rows.items():
            if row.endswith("pruned"):
                found["decode_speedup"] = speedup(self.original, load(self.folder / row))
                print(row, found["decode_speedup"], flush=True)
                self._write()

    def _shape(self, row: str) -> None:
        dimension, share = row.split()
        options: dict[str, Any] = {**NONE, dimension: float(share.rstrip("%")) / 100}
        calib = self.train[:: max(1, len(self.train) // CALIBRATION)]
        try:
            pruned = self._made(f"{row}, pruned", lambda path: self._prune(options, calib, path))
        except Unsupported as error:
            self.rows[row] = {"refused": error.message}
            return self._write()
        self._row(f"{row}, pruned", pruned)
        self._row(f"{row}, healed", self._trained(f"{row}, healed", pruned, self.heal))
        if row in self.args.scratch:
            start = self._made(f"{row}, random", lambda path: random_weights(pruned, self.original, path))
            name = f"{row}, from scratch"
            self._row(name, self._trained(name, start, self.heal))

    def _prune(self, options: dict[str, Any], calib: list[np.ndarray], path: Path) -> Model:
        return Prune(**options).apply(self.original, Context(output=path, windows=calib))

    def _made(self, name: str, make: Any) -> Model:
        path = self.folder / name
        return load(path) if path.exists() else make(path)

    def _trained(self, name: str, start: Model, how: Distill) -> Model:
        path = self.folder / name
        if path.exists():
            return load(path)
        context = Context(
            output=path,
            windows=self.train,
            held_out=self.held,
            original=self.original,
            threads=self.args.threads,
            progress=lambda message, _: print(f"{name}: {message}", flush=True),
        )
        began = time.monotonic()
        made = how.apply(start, context)
        minutes = round((time.monotonic() - began) / 60, 2)
        self.rows.setdefault(name, {}).update({"train_tokens": made.history[-1]["tokens"], "minutes": minutes})
        return made

    def _row(self, name: str, model: Model) -> None:
        found = losses(model, self.held)
        row = self.rows.setdefault(name, {})
        row |= {"nats": round(float(np.concatenate(found).mean()), 4), **compare(self.base, found), **shapes(model)}
        row["over_the_better"] = compare(self.better, found)["increase_nats"]
        print(name, json.dumps(row), flush=True)
        self._write()

    def _header(self) -> None:
        args, own = self.args, self.results[self.name]
        own["command"] = (
            f"python -m benchmarks.distill_after_prune --model {args.model} --train {args.train} --text {args.text} "
            f"--keep DIR --tokens {args.tokens} --rate {args.rate:g} --threads {args.threads}, then with --speed"
        )
        own["text"] = {"held_tokens": sum(map(len, self.base)), "train_tokens": sum(map(len, self.train))}
        own["options"] = dataclasses.asdict(self.heal)

    def _write(self) -> None:
        RESULTS.write_text(json.dumps(self.results, indent=1) + "\n")


def windows(model: Model, path: Path, count: int, characters: int) -> list[np.ndarray]:
    """This many windows, spread evenly over the file's first `characters`."""
    with path.open(encoding="utf-8") as file:
        ids = np.array(model.tokenizer.encode(file.read(characters)), np.int32)
    stride = max(WINDOW, len(ids) // count)
    return [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW, stride)][:count]


def unseen(train: list[np.ndarray], held: list[np.ndarray]) -> list[np.ndarray]:
    seen = seen_ngrams(held)
    return [window for window in train if not np.isin(ngrams(window), seen).any()]


def random_weights(like: Model, original: Model, path: Path) -> Model:
    """The same shape without anything learned: matrices drawn, gains one, biases zero."""
    generator, known = np.random.default_rng(0), parameter_shapes(like.spec)

    def values(name: str) -> Floats:
        shape = known[name]
        if len(shape) > 1:
            return (SPREAD * generator.standard_normal(shape)).astype(np.float32)
        return np.full(shape, float(name.endswith("weight")), np.float32)

    write_plain_folder(path, like.spec, original, (), values)
    return load(path)


if __name__ == "__main__":
    main()
