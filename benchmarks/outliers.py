"""What outlier channels cost: a real model and its function-preserving twins, quantized alike, on our own engine.

Twins compute the same function with harder numbers: (scaled) 1% of channels made louder by powers of two at norm
outputs, up/down and V/O; (rotated) the residual stream turned to its principal basis. A format that handles outliers
loses on the twins what it loses on the model; one scale per row does not (`rotate` and `equalize` off).

    python -m benchmarks.outliers --model FOLDER --calib train.txt --text held_out.txt

writes benchmarks/results/outliers.json: for each model and recipe what `quantize_methods` says of one, against the
original.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quantize_methods import Reading, compare, mean, read, windows
from snello.models import load
from snello.models.model import Model
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from tests.twins import rotated_stream, scaled_channels

RESULTS = Path(__file__).parent / "results" / "outliers.json"
RECIPES = {
    "int8": Quantize(weights="int8"),
    "int8, plain rows": Quantize(weights="int8", rotate=False, equalize=False),
    "int8, smoothquant": Quantize(weights="int8", method="smoothquant"),
    "int8, smoothquant, not rotated": Quantize(weights="int8", method="smoothquant", rotate=False),
    "int8, smoothquant, not rotated, static": Quantize(
        weights="int8", method="smoothquant", rotate=False, activations="int8-static"
    ),
    "int4": Quantize(),
    "int4, hqq": Quantize(method="hqq"),
    "int4, rotate alone": Quantize(equalize=False),
    "int4, equalize alone": Quantize(rotate=False),
    "int4, plain rows": Quantize(rotate=False, equalize=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", required=True, type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument(
        "--windows", type=int, default=24, help="of 512 tokens, for the loss; four more turn the stream"
    )
    args = parser.parse_args()
    original = load(args.model)
    cut = windows(original, args.text, args.windows + 4)
    held, seen = cut[: args.windows], cut[args.windows :]
    calib = windows(original, args.calib, args.windows)
    models = {
        "original": original,
        "scaled channels": scaled_channels(original),
        "rotated stream": rotated_stream(original, seen),
    }
    base = read(original, held)
    rows = {name: measure(model, base, held, calib) for name, model in models.items()}
    command = f"python -m benchmarks.outliers --model {args.model} --calib {args.calib} --text {args.text}"
    facts = {"command": command, "tokens": sum(map(len, base.losses)), "original_nats": mean(base.losses)}
    RESULTS.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


def measure(model: Model, base: Reading, held: list[np.ndarray], calib: list[np.ndarray]) -> dict[str, Any]:
    """Every recipe on one model, against the original."""
    found = {}
    for name, recipe in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            lean = recipe.apply(model, Context(output=Path(folder) / "lean", windows=calib))
            found[name] = compare(base, read(lean, held))
        print(name, json.dumps(found[name]), flush=True)
    return found


if __name__ == "__main__":
    main()
