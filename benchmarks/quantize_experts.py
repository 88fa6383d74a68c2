"""What calibrating experts is worth, each on the rows that it is sent: loss on held-out text.

    python -m benchmarks.quantize_experts --model FOLDER --calib train.txt --text held_out.txt [--keep DIR]

adds to benchmarks/results/quantize_experts.json, under the model's name. A mixture that was trained is too large for
this, so a trained dense model is made one (sparse upcycling, arXiv:2212.05055, before its training): every feed-forward
becomes equal copies behind a random router that sends each row to two of them and adds up by shares that sum to one. It
computes what the dense model does, so every loss is against that; routers of random directions send rows unevenly, and
each copy is then rounded for rows of its own. For each recipe the nats a token that it adds, with a two-sided 90%
interval from redrawing windows (so each end is a one-sided 95% bound). Methods are compared two by two, token by token,
by Holm's correction over all pairs. GPTQ is measured by three rules for the rows of an expert: those that it is sent
and more where they are fewer than channels (the rule of `quantize`), those that it is sent alone, and all rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quantize_methods import Row, applied, compare, cut, kept, mean, pairs, read
from snello.models import load
from snello.models.model import Model
from snello.models.spec import Experts
from snello.techniques.calibration import Routing
from snello.techniques.quantize import Quantize
from tests.twins import arrays_of, in_memory

RESULTS = Path(__file__).parent / "results" / "quantize_experts.json"
ACTIVE = 2
RULES = {
    "": Routing.rows,
    ", rows sent alone": lambda routing, expert, least: Routing.rows(routing, expert, 1),
    ", all rows": lambda routing, expert, least: Routing.rows(routing, expert, len(routing.sent)),
}
RECIPES: dict[str, tuple[Quantize, str]] = {
    "int8": (Quantize(weights="int8"), ""),
    **{f"int4, {method}": (Quantize(method=method), "") for method in ("rtn", "awq", "gptq")},
    **{f"int4, gptq{rule}": (Quantize(method="gptq"), rule) for rule in list(RULES)[1:]},
    **{f"int3, {method}": (Quantize(weights="int3", method=method), "") for method in ("rtn", "awq", "gptq")},
    **{f"int3, gptq{rule}": (Quantize(weights="int3", method="gptq"), rule) for rule in list(RULES)[1:]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--windows", type=int, default=24, help="of 512 tokens, for calibration and for the loss")
    parser.add_argument("--keep", type=Path, help="a folder for finished rows, from which a run goes on")
    args = parser.parse_args()
    dense = load(args.model)
    texts = [path.read_text(encoding="utf-8") for path in (args.calib, args.text)]
    calib, held = (cut(dense, text, args.windows) for text in texts)
    base, mixture = read(dense, held), upcycled(dense, args.experts)
    command = f"python -m benchmarks.quantize_experts --model {args.model} --calib {args.calib} --text {args.text}"
    tokens = {"tokens": sum(map(len, base.losses)), "calibration_tokens": sum(map(len, calib))}
    experts = {"experts": args.experts, "active": ACTIVE, "channels": mixture.spec.hidden_size}
    facts = {"command": command, **tokens, **experts, "original_nats": mean(base.losses)}
    rows: dict[str, Any] = {}
    losses: dict[str, list[np.ndarray]] = {}
    for name, (recipe, rule) in RECIPES.items():

        def measure(recipe: Quantize = recipe, rule: str = rule) -> Row:
            with rows_by(rule):
                found = applied(recipe, mixture, calib, held)
            return compare(base, found), found.losses

        rows[name], losses[name] = kept(args.keep, json.dumps([facts, name]), measure)
        print(name, json.dumps(rows[name]), flush=True)
    tables = [[name for name in RECIPES if name.startswith(bits)] for bits in ("int4", "int3")]
    measured = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    measured[dense.name] = {**facts, "rows": rows, "pairs": pairs(losses, tables)}
    RESULTS.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


@contextmanager
def rows_by(rule: str) -> Iterator[None]:
    """Experts are calibrated on other rows than `quantize` would take."""
    usual = Routing.rows
    Routing.rows = RULES[rule]  # type: ignore[method-assign]
    try:
        yield
    finally:
        Routing.rows = usual  # type: ignore[method-assign]


def upcycled(dense: Model, count: int, seed: int = 0) -> Model:
    """A mixture of `count` equal experts a layer that computes the same function."""
    arrays, random, layers = arrays_of(dense), np.random.default_rng(seed), []
    experts = Experts(num_experts=count, num_active=ACTIVE, normalized=True)
    for index, layer in enumerate(dense.spec.layers):
        stem = f"layers.{index}.ffn"
        for part in ("gate", "up", "down"):
            matrix = arrays.pop(f"{stem}.{part}.weight")
            arrays |= {f"{stem}.experts.{number}.{part}.weight": matrix for number in range(count)}
        size = (count, dense.spec.hidden_size)
        arrays[f"{stem}.router.weight"] = random.normal(0, size[1] ** -0.5, size).astype(np.float32)
        layers.append(dataclasses.replace(layer, feed_forward=dataclasses.replace(layer.feed_forward, experts=experts)))
    spec = dataclasses.replace(dense.spec, layers=tuple(layers))
    return in_memory(dense, spec, arrays, f"{dense.name} upcycled")


if __name__ == "__main__":
    main()
