"""Convolutions in the place of attention, beside the same attention simply deleted, before and after equal healing.

    python -m benchmarks.convolutions quality --model FOLDER --train train.txt --text held_out.txt --keep DIR
    python -m benchmarks.convolutions speed --model FOLDER --keep DIR

adds to benchmarks/results/convolutions.json, row by row, so that a run that was stopped goes on: the original; its
control (the original trained on the same tokens); and for each share of kept attention the converted model, the same
layers without any attention, and without those blocks altogether, each as made and healed alike by the original. Losses
are nats a token on held-out windows of 256 tokens, with a two-sided interval of the increase from redrawing windows.
A layer without attention is a convolution of zeros: nothing but its output's bias can learn, a constant. `speed` needs
a quiet machine and two minutes: seconds a decoded token and a prompt of 512, over the original's, in turn. Training
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
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.distill_after_prune import WINDOW, unseen, windows
from benchmarks.prune_structured import compare, losses
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
    parser.add_argument("--tokens", type=int, default=24_576, help="of healing, for every row")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--windows", type=int, default=40, help="held-out windows of 256 tokens")
    parser.add_argument("--shares", nargs="*", default=list(KEPT), choices=KEPT)
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(args)
    study.quality() if args.part == "quality" else study.speed()


class Study:
    """One model's rows, written as soon as each is known."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.name = args, Path(args.model).name
        self.original, self.folder = load(args.model), args.keep / Path(args.model).name
        self.results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        self.own = self.results.setdefault(self.name, {"rows": {}})
        self.rows: dict[str, Any] = self.own["rows"]

    def quality(self) -> None:
        args, model = self.args, self.original
        self.held = windows(model, args.text, args.windows, 1_000_000)
        self.train = unseen(windows(model, args.train, args.tokens // WINDOW, 10 * args.tokens), self.held)
        self.base = losses(model, self.held)
        self.heal = Distill(tokens=args.tokens, rate=args.rate, batch_tokens=1024)
        self.own["quality"] = self._header()
        self._row("original", model)
        control = self.heal.control(model.spec)
        assert control is not None
        self._row("control", self._healed("control", model, control))
        for share in args.shares:
            converted = self._made(f"{share} converted", lambda path, share=share: self._convert(KEPT[share], path))
            self.rows.setdefault(f"{share} converted", {})["how"] = converted.history[-1]
            gone = convolving_layers(converted.spec)
            made = {
                "converted": converted,
                "deleted": self._made(f"{share} deleted", lambda path, made=converted: without_attention(made, path)),
                "blocks deleted": self._made(
                    f"{share} blocks deleted", lambda path, gone=gone: without_blocks(model, gone, path)
                ),
            }
            for way in args.ways:
                name = f"{share} {way}"
                self._row(name, made[way])
                self._row(f"{name}, healed", self._healed(f"{name}, healed", made[way], self.heal))

    def speed(self) -> None:
        self.own["speed"] = {"command": command(), "core": core.select_isa(None)}
        for row in [row for row in self.rows if row.endswith(("converted", "blocks deleted"))]:
            self.rows[row]["speed_over_original"] = ratios(self.original, load(self.folder / place(row)))
            print(row, json.dumps(self.rows[row]["speed_over_original"]), flush=True)
            self._write()

    def _convert(self, kept: float, path: Path) -> Model:
        calib = self.train[:: max(1, len(self.train) // CALIBRATION)]
        return Convolution(keep=kept).apply(self.original, Context(output=path, windows=calib))

    def _made(self, name: str, make: Callable[[Path], Model]) -> Model:
        path = self.folder / place(name)
        return load(path) if path.exists() else make(path)

    def _healed(self, name: str, start: Model, how: Distill) -> Model:
        path = self.folder / place(name)
        if path.exists():
            return load(path)
        context = Context(output=path, windows=self.train, held_out=self.held, original=self.original, threads=1)
        began = time.monotonic()
        made = how.apply(start, context)
        minutes = round((time.monotonic() - began) / 60, 2)
        self.rows.setdefault(name, {}).update({"train_tokens": made.history[-1]["tokens"], "minutes": minutes})
        return made

    def _row(self, name: str, model: Model) -> None:
        found = losses(model, self.held)
        row = self.rows.setdefault(name, {})
        row |= {"nats": round(float(np.concatenate(found).mean()), 4), **compare(self.base, found)}
        row |= {"parameters": model.num_parameters, "cache_page_bytes": core.cache_page_bytes(cache_layers(model.spec))}
        print(name, json.dumps(row), flush=True)
        self._write()

    def _header(self) -> dict[str, Any]:
        tokens = {"held_tokens": sum(map(len, self.base)), "train_tokens": sum(map(len, self.train))}
        return {"command": command(), **tokens, "healing": dataclasses.asdict(self.heal)}

    def _write(self) -> None:
        RESULTS.write_text(json.dumps(self.results, indent=1) + "\n")


def command() -> str:
    """As it was called, but for where folders are."""
    words, hidden = sys.argv[1:], {"--model", "--train", "--text", "--keep"}
    said = [Path(word).name if before in hidden else word for before, word in zip(["", *words], words, strict=False)]
    return f"python -m benchmarks.convolutions {shlex.join(said)}"


def place(name: str) -> str:
    return name.replace("/", "-of-")


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
