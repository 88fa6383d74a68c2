"""What each way of quantizing costs on a real model, on our own engine: loss and divergence on held-out text.

    python -m benchmarks.quantize_methods --model FOLDER --calib train.txt --text held_out.txt

writes benchmarks/results/quantize_methods.json: for each recipe the nats a token that it adds on the held-out windows,
with a two-sided 90% interval from redrawing windows (so each end is a one-sided 95% bound), the mean KL divergence from
the original at sampled positions, and the size of the weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snello.engine.native import NativeExecutor
from snello.measure.bootstrap import Clusters, mean_interval
from snello.measure.guards import kl
from snello.models import load
from snello.models.model import Model
from snello.models.spec import Deployment
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize

RESULTS = Path(__file__).parent / "results" / "quantize_methods.json"
WINDOW = 512
SAMPLED = 64  # positions of each window at which whole distributions are compared
RECIPES = {
    "int8": Quantize(weights="int8"),
    "int4, rtn": Quantize(),
    "int4, rtn, groups of 32": Quantize(group_size=32),
    "int4, awq": Quantize(method="awq"),
    "int4, gptq": Quantize(method="gptq"),
    "int4, gptq, groups of 32": Quantize(method="gptq", group_size=32),
    "mixed, 5 bits, rtn": Quantize(weights="mixed", bits=5),
    "mixed, 5 bits, gptq": Quantize(weights="mixed", bits=5, method="gptq"),
}


@dataclass(frozen=True)
class Reading:
    """What a model says about the held-out windows."""

    losses: list[np.ndarray]  # nats of each token
    logits: list[np.ndarray]  # (SAMPLED, V) of each window
    weights_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", required=True, type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--windows", type=int, default=24, help="of 512 tokens, for calibration and for the loss")
    args = parser.parse_args()
    original = load(args.model)
    calib, held = (windows(original, path, args.windows) for path in (args.calib, args.text))
    base = read(original, held)
    rows = {}
    for name, recipe in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            lean = recipe.apply(original, Context(output=Path(folder) / "lean", windows=calib))
            rows[name] = compare(base, read(lean, held))
        print(name, json.dumps(rows[name]), flush=True)
    command = f"python -m benchmarks.quantize_methods --model {args.model} --calib {args.calib} --text {args.text}"
    tokens = {"tokens": sum(map(len, base.losses)), "calibration_tokens": sum(map(len, calib))}
    facts = {"command": command, **tokens, "original_nats": mean(base.losses)}
    RESULTS.write_text(json.dumps({**facts, "original_bytes": base.weights_bytes, "rows": rows}, indent=1) + "\n")


def windows(model: Model, path: Path, count: int) -> list[np.ndarray]:
    """This many windows, spread over the first two million characters."""
    ids = np.array(model.tokenizer.encode(path.read_text(encoding="utf-8")[:2_000_000]), np.int32)
    return [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW, len(ids) // count)][:count]


def read(model: Model, held: list[np.ndarray]) -> Reading:
    generator = np.random.default_rng(0)
    picked = [np.sort(generator.choice(WINDOW - 1, SAMPLED, replace=False)) for _ in held]
    with NativeExecutor(model, Deployment(context=WINDOW)) as executor:
        losses = [-executor.score(window).log_probabilities.astype(np.float64) for window in held]
        logits = [executor.logits(window, rows) for window, rows in zip(held, picked, strict=True)]
        return Reading(losses, logits, executor.weights_bytes)


def compare(base: Reading, lean: Reading) -> dict[str, Any]:
    differences = [after - before for before, after in zip(base.losses, lean.losses, strict=True)]
    found = mean_interval(Clusters.of(differences, list(range(len(differences)))), seed=0)
    divergence = [kl(before, after) for before, after in zip(base.logits, lean.logits, strict=True)]
    bounds = {name: round(value, 5) for name, value in found.to_json().items()}
    return {"increase_nats": bounds, "kl_nats": round(mean(divergence), 5), "weights_bytes": lean.weights_bytes}


def mean(pieces: list[np.ndarray]) -> float:
    return float(np.concatenate(pieces).mean())


if __name__ == "__main__":
    main()
