"""What healing gives back after structured pruning, beside what the same training gives everybody else.

    python -m benchmarks.distill_after_prune --model FOLDER --train train.txt --text held_out.txt --keep DIR
    python -m benchmarks.distill_after_prune --model demo --keep DIR
    python -m benchmarks.distill_after_prune --model FOLDER --keep DIR --speed

adds to benchmarks/results/distill_after_prune.json, row by row, so that a run that was stopped goes on: the original;
its control (the original trained on the same tokens of text); and for each dimension and fraction the pruned model, the
same healed by the original, and the same shape from random weights on the same tokens, taught alike at a rate of its
own. All losses are nats a token on held-out windows, with a two-sided 90% interval of the increase from redrawing them;
`over_the_better` compares with the original or the control, whichever is better. `--speed` needs a quiet machine and
adds decode speed over the original's, taken in turn. Training text shares no 13 tokens in a row with held-out windows.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.healing import Study
from benchmarks.prune_structured import NONE, compare, shapes, speedup
from snello.errors import Unsupported
from snello.models import load
from snello.models.model import Floats, Model
from snello.models.parameters import parameter_shapes
from snello.models.plain_folder import write_plain_folder
from snello.techniques.base import Context
from snello.techniques.distill import Distill
from snello.techniques.prune import Prune

RESULTS = Path(__file__).parent / "results" / "distill_after_prune.json"
CALIBRATION = 24
SPREAD = 0.02  # of random weights, as GPT-2's and most after it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--keep", required=True, type=Path, help="where the folders are left, or found")
    parser.add_argument("--tokens", type=int, default=200_000, help="of training, for every row")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--scratch-rate", type=float, default=1e-3, help="of what begins from random weights")
    parser.add_argument("--windows", type=int, default=40, help="held-out windows of 256 tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=["ffn 50%", "layers 50%", "ffn 25%", "width 25%", "layers 25%"])
    parser.add_argument("--scratch", nargs="*", default=["ffn 50%"], help="rows that are also trained from nothing")
    parser.add_argument("--seeds", type=int, default=1, help="of healing, of the rows in --repeat")
    parser.add_argument("--repeat", nargs="*", default=["ffn 50%"], help="rows that are healed once a seed")
    parser.add_argument("--speed", action="store_true", help="only time what is in --keep")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    study = Pruned(args, RESULTS, args.threads, f", rate {args.rate:g}, {args.tokens:,} tokens")
    study.timed() if args.speed else study.all()


class Pruned(Study):
    """Pruned shapes: each as it is, healed, and from nothing."""

    def all(self) -> None:
        args, model = self.args, self.original
        self.cut()
        self.heal = Distill(tokens=args.tokens, rate=args.rate, batch_tokens=2048)
        self._header()
        control = self.control(self.heal)
        self._row("original", model)
        self._row("control", control)
        for row in args.only:
            self._shape(row)

    def timed(self) -> None:
        for row, found in self.rows.items():
            if row.endswith("pruned"):
                found["decode_speedup"] = speedup(self.original, load(self.place(row)))
                print(row, found["decode_speedup"], flush=True)
                self.write()

    def _shape(self, row: str) -> None:
        dimension, share = row.split()
        options: dict[str, Any] = {**NONE, dimension: float(share.rstrip("%")) / 100}
        calib = self.train[:: max(1, len(self.train) // CALIBRATION)]
        try:
            pruned = self.made(f"{row}, pruned", lambda path: self._prune(options, calib, path))
        except Unsupported as error:
            self.rows[row] = {"refused": error.message}
            return self.write()
        self._row(f"{row}, pruned", pruned)
        for name, healed in self.healed(row, pruned, self.heal, self.args.seeds if row in self.args.repeat else 1):
            self._row(name, healed)
        if row in self.args.scratch:
            start = self.made(f"{row}, random", lambda path: random_weights(pruned, self.original, path))
            name = f"{row}, from scratch"
            self._row(name, self.trained(name, start, dataclasses.replace(self.heal, rate=self.args.scratch_rate)))

    def _prune(self, options: dict[str, Any], calib: list[np.ndarray], path: Path) -> Model:
        return Prune(**options).apply(self.original, Context(output=path, windows=calib))

    def _row(self, name: str, model: Model) -> None:
        def facts(found: list[np.ndarray]) -> dict[str, Any]:
            return {**shapes(model), "over_the_better": compare(self.better, found)["increase_nats"]}

        self.row(name, model, facts)

    def _header(self) -> None:
        args, own = self.args, self.own
        files = "" if args.model == "demo" else f"--train {args.train} --text {args.text} "
        own["command"] = (
            f"python -m benchmarks.distill_after_prune --model {args.model} {files}"
            f"--keep DIR --tokens {args.tokens} --rate {args.rate:g} --threads {args.threads}, then with --speed"
        )
        own["scratch_rate"] = args.scratch_rate
        own["text"] = self.tokens
        own["options"] = dataclasses.asdict(self.heal)


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
