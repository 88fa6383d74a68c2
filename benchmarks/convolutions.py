"""Convolutions in the place of attention, beside the same attention simply deleted, before and after equal healing.

    python -m benchmarks.convolutions quality --model FOLDER --train train.txt --text held_out.txt --keep DIR
    python -m benchmarks.convolutions speed --model FOLDER --keep DIR

adds to benchmarks/results/convolutions.json, row by row, so that a run that was stopped goes on: the original; its
control (the original trained on the same tokens); and for each share of kept attention the converted model, the same
layers without any attention, and without those blocks altogether, each as made and healed alike by the original. Losses
are nats a token on held-out windows of 256 tokens, with a two-sided interval of the increase from redrawing windows.
A layer without attention is a convolution of zeros: nothing but its output's bias can learn, a constant. `speed` needs
a quiet machine: seconds a decoded token and a prompt of 512, over the original's, in turn. Training
text shares no 13 tokens in a row with held-out windows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.healing import Study
from snello.engine.lowering import cache_layers
from snello.engine.native import NativeExecutor
from snello.models import load
from snello.models.families.convolutions import convolving_layers
from snello.models.fewer_layers import FewerLayers
from snello.models.model import Model
from snello.models.plain_folder import write_plain_folder
from snello.models.spec import Deployment
from snello.native import core
from snello.techniques.base import Context
from snello.techniques.convolution import Convolution
from snello.techniques.distill import Distill

RESULTS = Path(__file__).parent / "results" / "convolutions.json"
CALIBRATION, TURNS, STEPS, PROMPT = 48, 8, 32, 512
KEPT = {"3/4": 0.75, "1/2": 0.5, "1/4": 0.25}
WAYS = ("converted", "deleted", "blocks deleted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["quality", "speed"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--keep", required=True, type=Path, help="where the folders are left, or found")
    parser.add_argument("--tokens", type=int, default=200_000, help="of healing, for every row")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--seeds", type=int, default=1, help="of healing")
    parser.add_argument("--windows", type=int, default=40, help="held-out windows of 256 tokens")
    parser.add_argument("--shares", nargs="*", default=list(KEPT), choices=KEPT)
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    study = Convolved(args, RESULTS, 1, f", rate {args.rate:g}, {args.tokens:,} tokens")
    study.quality() if args.part == "quality" else study.speed()


class Convolved(Study):
    """Converted and deleted layers by the share of attention that stays."""

    def quality(self) -> None:
        args, model = self.args, self.original
        self.cut()
        self.heal = Distill(tokens=args.tokens, rate=args.rate, batch_tokens=2048)
        self.own["quality"] = {"command": command(), **self.tokens, "healing": dataclasses.asdict(self.heal)}
        self._row("original", model)
        self._row("control", self.control(self.heal))
        for share in args.shares:
            converted = self.made(f"{share} converted", partial(self._convert, KEPT[share]))
            self.rows.setdefault(f"{share} converted", {})["how"] = converted.history[-1]
            gone = convolving_layers(converted.spec)
            made = {
                "converted": converted,
                "deleted": self.made(f"{share} deleted", partial(without_attention, converted)),
                "blocks deleted": self.made(f"{share} blocks deleted", partial(without_blocks, model, gone)),
            }
            for way in args.ways:
                name = f"{share} {way}"
                self._row(name, made[way])
                for row, healed in self.healed(name, made[way], self.heal, args.seeds):
                    self._row(row, healed)

    def speed(self) -> None:
        self.own["speed"] = {"command": command(), "core": core.select_isa(None)}
        for row in [row for row in self.rows if row.endswith(("converted", "blocks deleted"))]:
            self.rows[row]["speed_over_original"] = ratios(self.original, load(self.place(row)))
            print(row, json.dumps(self.rows[row]["speed_over_original"]), flush=True)
            self.write()

    def _convert(self, kept: float, path: Path) -> Model:
        calib = self.train[:: max(1, len(self.train) // CALIBRATION)]
        return Convolution(keep=kept).apply(self.original, Context(output=path, windows=calib))

    def _row(self, name: str, model: Model) -> None:
        size = {"parameters": model.num_parameters}
        size["cache_page_bytes"] = core.cache_page_bytes(cache_layers(model.spec))
        self.row(name, model, lambda _: size)


def command() -> str:
    """As it was called, but for where folders are."""
    words, hidden = sys.argv[1:], {"--model", "--train", "--text", "--keep"}
    said = [Path(word).name if before in hidden else word for before, word in zip(["", *words], words, strict=False)]
    return f"python -m benchmarks.convolutions {shlex.join(said)}"


def without_attention(converted: Model, path: Path) -> Model:
    """Its convolutions add nothing."""
    stems = tuple(f"layers.{index}.attention." for index in convolving_layers(converted.spec))

    def values(name: str) -> np.ndarray:
        found = converted.weights.values(name)
        return np.zeros_like(found) if name.startswith(stems) and ".norm." not in name else found

    write_plain_folder(path, converted.spec, converted, (), values)
    return load(path)


def without_blocks(original: Model, gone: list[int], path: Path) -> Model:
    kept = [index for index in range(len(original.spec.layers)) if index not in gone]
    spec = dataclasses.replace(original.spec, layers=tuple(original.spec.layers[index] for index in kept))
    write_plain_folder(path, spec, original, (), FewerLayers(original.weights, kept).values)
    return load(path)


def ratios(original: Model, lean: Model) -> dict[str, Any]:
    """Seconds of the original over those of the lean model, in turn (A B B A): median of the turns, and both ends."""
    room = original.spec.max_positions
    deployment = Deployment(context=room)
    found: dict[str, Any] = {}
    with NativeExecutor(original, deployment) as a, NativeExecutor(lean, deployment) as b:
        jobs: dict[str, Callable[[NativeExecutor], float]] = {
            "decode at 32": lambda executor: decode(executor, 32),
            f"decode at {room - STEPS}": lambda executor: decode(executor, room - STEPS),
            f"prompt of {min(PROMPT, room)}": lambda executor: prompt(executor, min(PROMPT, room)),
        }
        for name, job in jobs.items():
            job(a), job(b)
            each = []
            for turn in range(TURNS):
                one, other = (job(a), job(b)) if turn % 2 == 0 else tuple(reversed((job(b), job(a))))
                each.append(one / other)
            found[name] = [round(float(value), 3) for value in np.quantile(each, [0.5, 0.0, 1.0])]
    return found


def decode(executor: NativeExecutor, context: int) -> float:
    with executor.session() as session:
        session.feed(np.arange(context, dtype=np.int32) % 251 + 1)
        began = time.perf_counter()
        for step in range(STEPS):
            executor.step([session], [33 + step])
        return (time.perf_counter() - began) / STEPS


def prompt(executor: NativeExecutor, length: int) -> float:
    with executor.session() as session:
        began = time.perf_counter()
        session.feed(np.arange(length, dtype=np.int32) % 251 + 1)
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
