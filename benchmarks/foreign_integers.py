"""What becomes of somebody's four-bit integers here: kept with scales of two levels, or dequantized and quantized anew.

    python -m benchmarks.foreign_integers --model FOLDER --calib train.txt --text held_out.txt

writes benchmarks/results/foreign_integers.json. The checkpoint is made here as others make them: round-to-nearest, an
FP16 scale (and, asymmetric, a zero) for each group of 128 columns. Every row is the nats a token that are added to
*that* checkpoint, dequantized, on held-out windows; the first is what it added to the original.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.prune_structured import compare, losses, windows
from snello.models import load
from snello.models.model import Floats, Model
from snello.models.plain_folder import write_plain_folder
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from snello.techniques.quantize.rounding import seven_bits

RESULTS = Path(__file__).parent / "results" / "foreign_integers.json"
GROUP, TOP = 128, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    args = parser.parse_args()
    original = load(args.model)
    calib, held = (windows(original, path.read_text(), 48) for path in (args.calib, args.text))
    found: dict[str, Any] = {"tokens": sum(len(window) - 1 for window in held)}
    for symmetric in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            rows = study(original, Path(folder), calib, held, symmetric)
        found["symmetric" if symmetric else "asymmetric"] = rows
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def study(
    original: Model, folder: Path, calib: list[np.ndarray], held: list[np.ndarray], symmetric: bool
) -> dict[str, Any]:
    theirs = rewritten(original, folder / "theirs", symmetric, two_levels=False)
    base = losses(theirs, held)
    rows = {"theirs over the original": compare(losses(original, held), base)}
    if symmetric:
        kept = rewritten(original, folder / "kept", symmetric, two_levels=True)
        rows["their integers, scales of two levels"] = compare(base, losses(kept, held))
    steps = {"quantize int8": Quantize(weights="int8"), "quantize int4, rtn": Quantize()}
    steps["quantize int4, gptq"] = Quantize(method="gptq")
    steps["quantize int4, as it lies"] = Quantize(rotate=False, equalize=False)
    steps["quantize int4, as it lies, float inputs"] = Quantize(rotate=False, equalize=False, activations="float")
    for name, step in steps.items():
        lean = step.apply(theirs, Context(output=folder / name, windows=calib))
        rows[name] = compare(base, losses(lean, held))
    print(json.dumps(rows, indent=1), flush=True)
    return rows


def rewritten(original: Model, folder: Path, symmetric: bool, *, two_levels: bool) -> Model:
    """The original with the blocks' matrices on a grid of four bits."""

    def values(name: str) -> Floats:
        w = original.weights.values(name)
        return on_grid(w, symmetric, two_levels) if name.startswith("layers.") and w.ndim == 2 else w

    write_plain_folder(folder, original.spec, original, (), values)
    return load(folder)


def on_grid(w: Floats, symmetric: bool, two_levels: bool) -> Floats:
    parts = w.reshape(len(w), -1, GROUP)
    low, high = np.minimum(parts.min(-1), 0), np.maximum(parts.max(-1), 0)
    scale = 2 * np.maximum(-low, high) / TOP if symmetric else (high - low) / TOP
    scale = scale.astype(np.float16).astype(np.float32)  # (N, G)
    zero = np.full_like(scale, 8) if symmetric else np.round(-low / scale)
    q = np.clip(np.round(parts / scale[..., None]) + zero[..., None], 0, TOP) - zero[..., None]
    kept = nearest_levels(scale) if two_levels else scale
    values: Floats = (q * kept[..., None]).reshape(w.shape).astype(np.float32)
    return values


def nearest_levels(scale: Floats) -> Floats:
    """Row scale times 1..15, the row scale of seven bits that comes nearest to all groups of its row."""
    best, least = np.zeros_like(scale), np.full(len(scale), np.inf)
    for divisor in np.arange(1.0, 15.01, 0.125):
        row = seven_bits(torch.from_numpy(scale.max(1) / np.float32(divisor))).numpy()[:, None]
        tried = row * np.clip(np.round(scale / row), 1, 15)
        error = np.square(tried / scale - 1).sum(1)
        better = error < least
        best[better], least[better] = tried[better], error[better]
    return best


if __name__ == "__main__":
    main()
