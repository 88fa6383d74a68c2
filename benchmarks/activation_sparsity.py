"""What skipping small inputs saves and what it loses.

    python -m benchmarks.activation_sparsity --shape tinyllama-1.1b --keep DIR
    python -m benchmarks.activation_sparsity --shape tinyllama-1.1b --keep DIR --speed
    python -m benchmarks.activation_sparsity --model FOLDER --calib train.txt --text held_out.txt --keep DIR
    python -m benchmarks.activation_sparsity --model demo --keep DIR

add to benchmarks/results/activation_sparsity.json. `--shape`: random INT4 weights, and copies of them that skip 25, 40
and 50% of every input, stay in DIR; with `--speed`, which needs a quiet machine for a few minutes, whole decode and its
parts, each copy in turn with the original, over 48 tokens (each has patterns of its own). `--model`: nats a token on
held-out windows added to those of the quantized model, by share, spread, rank and basis, with a two-sided 90% interval
from redrawing windows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.prune_structured import compare, losses, windows
from benchmarks.sparsify_methods import texts
from snello.engine.native import NativeExecutor
from snello.models import load
from snello.models.lean import load_lean
from snello.models.model import Model
from snello.models.shapes import random_model
from snello.models.spec import Deployment
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from snello.techniques.skip import Skip

RESULTS = Path(__file__).parent / "results" / "activation_sparsity.json"
SHARES = (0.25, 0.4, 0.5)
PROMPT, PATTERNS, TURNS, THREADS, CONTEXT = 32, 48, 6, 2, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape")
    parser.add_argument("--model")
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--keep", required=True, type=Path, help="where folders are left, or found")
    parser.add_argument("--windows", type=int, default=24, help="of 256 tokens, for calibration and for the loss")
    parser.add_argument("--speed", action="store_true", help="only time what is in --keep")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.shape and not args.speed:
        return make_shapes(args.shape, args.keep)
    if args.shape:
        command = f"python -m benchmarks.activation_sparsity --shape {args.shape} --keep DIR, then with --speed"
        results[args.shape] = {"command": command, **speed(args.shape, args.keep)}
    else:
        files = f" --calib {args.calib} --text {args.text}" if args.text else ""
        command = f"python -m benchmarks.activation_sparsity --model {args.model}{files} --keep DIR"
        results[Path(args.model).name] = {"command": command, **quality(args)}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


# ---- speed ----------------------------------------------------------------------------------------------------------


def make_shapes(shape: str, folder: Path) -> None:
    original = random_model(shape, "int4")
    texts = [np.random.default_rng(i).integers(1, original.spec.vocab_size, 64).astype(np.int32) for i in range(2)]
    for share in SHARES:
        options = Skip(share=share, shares="uniform", rank="magnitude")
        options.apply(original, Context(output=folder / f"{shape}-{share:.0%}", windows=texts))


def speed(shape: str, folder: Path) -> dict[str, Any]:
    """Of each share: decode over the original's in turn (A B B A), bytes a token, and seconds by part of the model."""
    deployment = Deployment(context=CONTEXT, threads=THREADS)
    rows: dict[str, Any] = {}
    with NativeExecutor(random_model(shape, "int4"), deployment) as original:
        for share in SHARES:
            path = folder / f"{shape}-{share:.0%}"
            with NativeExecutor(load_lean(path, path.name), deployment) as lean:
                rows[f"{share:.0%}"] = in_turn(original, lean)
            print(share, json.dumps(rows[f"{share:.0%}"]), flush=True)
    return {"threads": THREADS, "patterns": PATTERNS, "rows": rows}


def in_turn(original: NativeExecutor, lean: NativeExecutor) -> dict[str, Any]:
    decode(original), decode(lean)
    pairs = []
    for turn in range(TURNS):
        order = (original, lean) if turn % 2 == 0 else (lean, original)
        found = {id(each): decode(each) for each in order}
        pairs.append((found[id(original)], found[id(lean)]))
    ratios = sorted(before / after for before, after in pairs)
    before, after = (float(np.median(column)) for column in zip(*pairs, strict=True))
    parts = {name: parts_of(each) for name, each in (("original", original), ("skip", lean))}
    return {
        "speedup": {
            "median": round(float(np.median(ratios)), 3),
            "low": round(ratios[0], 3),
            "high": round(ratios[-1], 3),
        },
        "milliseconds": {"original": round(1e3 * before, 2), "skip": round(1e3 * after, 2)},
        "megabytes": {"original": round(original.bytes_per_token() / 1e6), "skip": round(lean.bytes_per_token() / 1e6)},
        "gigabytes_per_second": {
            "original": round(original.bytes_per_token() / before / 1e9, 1),
            "skip": round(lean.bytes_per_token() / after / 1e9, 1),
        },
        "milliseconds_by_part": parts,
    }


def decode(executor: NativeExecutor, observe: Callable[[], object] = lambda: None) -> float:
    """The median of the seconds a token."""
    ids = np.random.default_rng(7).integers(1, executor.spec.vocab_size, PROMPT + PATTERNS).astype(np.int32)
    session, seconds = executor.session(), []
    session.feed(ids[:PROMPT])
    observe()
    for token in ids[PROMPT:]:
        began = time.perf_counter()
        executor.step([session], [int(token)])
        seconds.append(time.perf_counter() - began)
    session.close()
    return float(np.median(seconds))


def parts_of(executor: NativeExecutor) -> dict[str, float]:
    """Milliseconds a token by part; each product is timed alone, so the sum is more than a token takes."""
    executor.program.profile(True)
    decode(executor, lambda: executor.program.profile(True))
    seconds = executor.program.profile(False)
    total: dict[str, float] = {}
    for part, value in zip(executor.lowered.parts, seconds, strict=True):
        total[part] = total.get(part, 0.0) + 1e3 * float(value) / PATTERNS
    return {part: round(value, 3) for part, value in sorted(total.items(), key=lambda item: -item[1])}


# ---- quality --------------------------------------------------------------------------------------------------------


def quality(args: argparse.Namespace) -> dict[str, Any]:
    original, folder = load(args.model), args.keep / Path(args.model).name
    calib, held = (windows(original, text, args.windows) for text in texts(args.model, args.calib, args.text))
    first, rows = losses(original, held), dict[str, Any]()
    for basis, rotate in (("rotated", True), ("not rotated", False)):
        quantized = Quantize(rotate=rotate).apply(original, Context(output=folder / basis, windows=calib))
        base = losses(quantized, held)
        rows[f"int4, {basis}"] = compare(first, base)
        for options in ways():
            name = f"{basis}, {options.share:.0%}, {options.shares}, {options.rank}"
            rows[name] = skipped(quantized, options, folder / name, calib, held, base)
            print(name, json.dumps(rows[name]), flush=True)
    nats = round(float(np.concatenate(first).mean()), 5)
    return {"tokens": sum(map(len, first)), "original_nats": nats, "rows": rows}


def skipped(
    quantized: Model, options: Skip, path: Path, calib: list[np.ndarray], held: list[np.ndarray], base: list[np.ndarray]
) -> dict[str, Any]:
    """Over the quantized model: what skipping alone adds."""
    return compare(base, losses(options.apply(quantized, Context(output=path, windows=calib)), held))


def ways() -> list[Skip]:
    found = [Skip(share=share, shares=shares) for share in SHARES for shares in ("greedy", "uniform")]
    return [*found, *(Skip(share=0.4, shares=shares, rank="magnitude") for shares in ("greedy", "uniform"))]


if __name__ == "__main__":
    main()
