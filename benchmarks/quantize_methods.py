"""What each way of quantizing costs on a real model, on our own engine: loss and divergence on held-out text.

    python -m benchmarks.quantize_methods --model FOLDER --calib train.txt --text held_out.txt
    python -m benchmarks.quantize_methods --model demo

writes, under the model's name, to benchmarks/results/quantize_methods.json: for each recipe the nats a token that it
adds on the held-out windows, with a two-sided 90% interval from redrawing windows (so each end is a one-sided 95%
bound), the mean KL divergence from the original at sampled positions, and the size of the weights. The embedded model
brings its own text: modules of this Python that it has never seen, and others to calibrate on.
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
from snello.models.demo.held_out import is_held_out, read_held_out, read_source, stdlib_directory
from snello.models.model import Model
from snello.models.spec import Deployment
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize

RESULTS = Path(__file__).parent / "results" / "quantize_methods.json"
WINDOW = 512
SAMPLED = 64  # positions of each window at which whole distributions are compared
RECIPES = {
    "int8": Quantize(weights="int8"),
    "int8, smoothquant": Quantize(weights="int8", method="smoothquant"),
    "int8, smoothquant, static": Quantize(weights="int8", method="smoothquant", activations="int8-static"),
    "int8, smoothquant, not rotated": Quantize(weights="int8", method="smoothquant", rotate=False),
    "int8, smoothquant, not rotated, static": Quantize(
        weights="int8", method="smoothquant", rotate=False, activations="int8-static"
    ),
    "int4, rtn": Quantize(),
    "int4, rtn, groups of 32": Quantize(group_size=32),
    "int4, hqq": Quantize(method="hqq"),
    "int4, hqq, groups of 32": Quantize(method="hqq", group_size=32),
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
    parser.add_argument("--calib", type=Path, help="needed but for demo")
    parser.add_argument("--text", type=Path, help="needed but for demo")
    parser.add_argument("--windows", type=int, default=24, help="of 512 tokens, for calibration and for the loss")
    args = parser.parse_args()
    original = load(args.model)
    calib, held = (cut(original, text, args.windows) for text in texts(parser, args))
    base = read(original, held)
    rows = {}
    for name, recipe in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            lean = recipe.apply(original, Context(output=Path(folder) / "lean", windows=calib))
            rows[name] = compare(base, read(lean, held))
        print(name, json.dumps(rows[name]), flush=True)
    command = f"python -m benchmarks.quantize_methods --model {args.model}"
    command += "" if args.model == "demo" else f" --calib {args.calib} --text {args.text}"
    tokens = {"tokens": sum(map(len, base.losses)), "calibration_tokens": sum(map(len, calib))}
    facts = {"command": command, **tokens, "original_nats": mean(base.losses)}
    measured = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    measured[Path(args.model).name] = {**facts, "original_bytes": base.weights_bytes, "rows": rows}
    RESULTS.write_text(json.dumps(measured, indent=1) + "\n")


def texts(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[str, str]:
    """To calibrate on, and held out."""
    if args.model == "demo":
        return seen_modules(), "\n".join(source for _, source in read_held_out())
    if args.calib is None or args.text is None:
        parser.error("--calib and --text are needed, but for demo")
    return args.calib.read_text(encoding="utf-8"), args.text.read_text(encoding="utf-8")


def seen_modules() -> str:
    """Modules at the top of this Python's library that `demo` was trained on."""
    modules = (path for path in sorted(stdlib_directory().glob("*.py")) if not is_held_out(path.name))
    return "\n".join(read_source(path) for path in modules)


def windows(model: Model, path: Path, count: int) -> list[np.ndarray]:
    """`cut` of a file."""
    return cut(model, path.read_text(encoding="utf-8"), count)


def cut(model: Model, text: str, count: int) -> list[np.ndarray]:
    """This many windows, spread over the first two million characters."""
    ids = np.array(model.tokenizer.encode(text[:2_000_000]), np.int32)
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
