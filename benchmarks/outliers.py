"""What outlier channels cost: a real model and its function-preserving twins, quantized alike, on our own engine.

Twins compute the same function with harder numbers: (scaled) 1% of channels made louder by powers of two at norm
outputs, up/down and V/O; (rotated) the residual stream turned to its principal basis. A format that handles outliers
loses on the twins what it loses on the model; one scale per row does not (`rotate` and `equalize` off).

    python -m benchmarks.outliers --model FOLDER --text held_out.txt

writes benchmarks/results/outliers.json: loss in nats a token on the text, and its increase over the original.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from snello.engine.native import NativeExecutor
from snello.models import load
from snello.models.model import Model
from snello.models.spec import Deployment
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from tests.twins import rotated_stream, scaled_channels

RESULTS = Path(__file__).parent / "results" / "outliers.json"
WINDOW = 512
RECIPES = {
    "int8": Quantize(weights="int8"),
    "int4": Quantize(weights="int4"),
    "int8, plain rows": Quantize(weights="int8", rotate=False, equalize=False),
    "int4, plain rows": Quantize(weights="int4", rotate=False, equalize=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--windows", type=int, default=24)
    args = parser.parse_args()
    original = load(args.model)
    ids = np.array(original.tokenizer.encode(args.text.read_text()[:2_000_000]), np.int32)
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW, len(ids) // (args.windows + 1))]
    twins = {
        "original": original,
        "twin, scaled channels": scaled_channels(original),
        "twin, rotated stream": rotated_stream(original, windows[-4:]),
    }
    windows = windows[: args.windows]
    base = loss(original, windows)
    rows = {name: {recipe: round(quantized(twin, recipe, windows) - base, 4) for recipe in RECIPES}
            for name, twin in twins.items()}  # fmt: skip
    command = f"python -m benchmarks.outliers --model {args.model} --text {args.text}"
    result = {"command": command, "tokens": len(windows) * (WINDOW - 1), "original_nats": base, "increase_nats": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def quantized(model: Model, recipe: str, windows: list[np.ndarray]) -> float:
    """Loss of the quantized model in nats a token."""
    with tempfile.TemporaryDirectory() as folder:
        return loss(RECIPES[recipe].apply(model, Context(output=Path(folder) / "lean")), windows)


def loss(model: Model, windows: list[np.ndarray]) -> float:
    with NativeExecutor(model, Deployment(context=WINDOW)) as executor:
        return -float(np.mean([executor.score(window).log_probabilities.mean() for window in windows]))


if __name__ == "__main__":
    main()
