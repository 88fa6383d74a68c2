"""Grouped queries from many heads: the mean of a group's heads beside its first and random ones, healed alike.

    python -m benchmarks.grouped_queries --keep DIR

adds to benchmarks/results/grouped_queries.json, row by row, so that a run that was stopped goes on: `demo` (6 key-value
heads), its control (the original trained on the same tokens of text), and for each number of heads and each way of
pooling the model as made, and healed by the original. All losses are nats a token on modules that the model has never
seen, with a two-sided 90% interval of the increase from redrawing windows; `over_the_better` compares with the original
or the control, whichever is better, and `over_the_mean` of a healed row with the mean of as many heads, healed with the
first seed. The training text is the modules that `demo` learned from; no window of it shares 13 tokens in a row with
those that judge.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from benchmarks.healing import Study
from benchmarks.prune_structured import compare
from snello.engine.lowering import cache_layers
from snello.models.model import Model
from snello.native import core
from snello.techniques.attention import CheaperAttention, Pooling
from snello.techniques.base import Context
from snello.techniques.distill import Distill

RESULTS = Path(__file__).parent / "results" / "grouped_queries.json"
POOLINGS = get_args(Pooling)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", required=True, type=Path, help="where the folders are left, or found")
    parser.add_argument("--tokens", type=int, default=500_000, help="of training, for every row")
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--windows", type=int, default=40, help="held-out windows of 256 tokens")
    parser.add_argument("--heads", nargs="*", type=int, default=[3, 2])
    parser.add_argument("--seeds", type=int, default=1, help="of healing")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.model = "demo"
    Grouped(args, RESULTS, args.threads).all()


class Grouped(Study):
    """Fewer key-value heads, by how a group of the old ones becomes one."""

    def all(self) -> None:
        args, model = self.args, self.original
        self.cut()
        self.heal = Distill(tokens=args.tokens, rate=args.rate, batch_tokens=2048)
        command = f"python -m benchmarks.grouped_queries --keep DIR --tokens {args.tokens} --rate {args.rate:g}"
        command += f" --seeds {args.seeds}"
        self.own |= {"command": command, "text": self.tokens, "options": dataclasses.asdict(self.heal)}
        control = self.control(self.heal)
        self._row("original", model)
        self._row("control", control)
        for heads in args.heads:
            self._pooled(heads)

    def _pooled(self, heads: int) -> None:
        mean: list[np.ndarray] | None = None
        for pooling in POOLINGS:
            options, name = CheaperAttention(kv_heads=heads, pooling=pooling), f"{heads}, {pooling}"
            made = self.made(name, partial(self._pool, options))
            self._row(name, made)
            for row, healed in self.healed(name, made, self.heal, self.args.seeds):
                mean = self._row(row, healed, mean)

    def _pool(self, options: CheaperAttention, path: Path) -> Model:
        return options.apply(self.original, Context(output=path))

    def _row(self, name: str, model: Model, mean: list[np.ndarray] | None = None) -> list[np.ndarray]:
        """The first healed row's losses stay what later ones are compared with."""
        mixer: Any = model.spec.layers[0].mixer
        sizes = {"kv_heads": mixer.num_kv_heads, "parameters": model.num_parameters}
        sizes["cache_page_bytes"] = core.cache_page_bytes(cache_layers(model.spec))
        own: list[np.ndarray] = []

        def facts(found: list[np.ndarray]) -> dict[str, Any]:
            own.extend(found)
            beside = {} if mean is None else {"over_the_mean": compare(mean, found)["increase_nats"]}
            return {**sizes, "over_the_better": compare(self.better, found)["increase_nats"], **beside}

        self.row(name, model, facts)
        return own if mean is None else mean


if __name__ == "__main__":
    main()
