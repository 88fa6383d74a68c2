"""What zeros cost on real models, on our own engine: loss on held-out text by method, share and pattern.

    python -m benchmarks.sparsify_methods --model FOLDER --calib train.txt --text held_out.txt
    python -m benchmarks.sparsify_methods --model demo

adds to benchmarks/results/sparsify_methods.json, under the model's name: for each recipe the nats a token that it adds
on the held-out windows, with a two-sided 90% interval from redrawing windows (so each end is a one-sided 95% bound),
the share of zeros in the blocks' weights, and the size of the weights as the engine holds them. Nothing is random but
which text calibrates, so what reads it is measured on three draws of it: the interval is the first's, `draws` has all.
The methods of one share or pattern are compared two by two, token by token: the difference with its interval, and how
likely chance is as large, by Holm's correction over all pairs. `demo` is measured on the modules that it has never seen
and calibrated on others of this Python. `--recipe` measures only those that are named (as often as one likes), keeps
the other rows, and compares nothing. `--twin` measures a model of the same function with outliers that the original
does not have (benchmarks/outliers.py), the rows that are compared alone, under a name of its own. With `--keep`,
finished rows stay in a folder and a run that was cut goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quantize_methods import TWINS, kept, pairs
from snello.engine.native import NativeExecutor
from snello.measure.bootstrap import Clusters, mean_interval
from snello.models import load
from snello.models.demo.held_out import is_held_out, read_held_out, read_source, stdlib_directory
from snello.models.model import Model
from snello.models.spec import Deployment
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from snello.techniques.sparsify import Sparsify
from snello.techniques.units import body_linears

RESULTS = Path(__file__).parent / "results" / "sparsify_methods.json"
WINDOW = 512
DRAWS = 3
LONGEST = 2_000_000  # characters of a text that windows are taken from

Steps = Sequence[Sparsify | Quantize]
RECIPES: dict[str, Steps] = {
    "magnitude, 50%": [Sparsify()],
    "magnitude over the whole model, 50%": [Sparsify(scope="global")],
    "wanda, 50%": [Sparsify(method="wanda")],
    "sparsegpt, 50%": [Sparsify(method="sparsegpt")],
    "magnitude, 60%": [Sparsify(sparsity=0.6)],
    "wanda, 60%": [Sparsify(method="wanda", sparsity=0.6)],
    "sparsegpt, 60%": [Sparsify(method="sparsegpt", sparsity=0.6)],
    "magnitude, 2:4": [Sparsify(pattern="2:4")],
    "wanda, 2:4": [Sparsify(method="wanda", pattern="2:4")],
    "sparsegpt, 2:4": [Sparsify(method="sparsegpt", pattern="2:4")],
    "int4": [Quantize()],
    "sparsegpt, 50%, then int4": [Sparsify(method="sparsegpt"), Quantize()],
    "sparsegpt, 50%, then int4, not rotated": [Sparsify(method="sparsegpt"), Quantize(rotate=False)],
}

ORDERED = [[f"{method}, {share}" for method in ("magnitude", "wanda", "sparsegpt")] for share in ("50%", "60%", "2:4")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=24, help="of 512 tokens, for each calibration and for the loss")
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="[all]")
    parser.add_argument("--twin", choices=TWINS, help="measure a twin of the model instead")
    parser.add_argument("--keep", type=Path, help="a folder for finished rows, from which a run goes on")
    args = parser.parse_args()
    original, (calib_text, held_text) = load(args.model), texts(args.model, args.calib, args.text)
    calib = windows(original, calib_text, DRAWS * args.windows)
    held = windows(original, held_text, args.windows)
    losses, size = read(original, held)
    files = f" --calib {args.calib} --text {args.text}" if args.text else ""
    files += f" --twin {args.twin}" if args.twin else ""
    facts = {
        "command": f"python -m benchmarks.sparsify_methods --model {args.model}{files}",
        "tokens": sum(map(len, losses)),
        "calibration_tokens": sum(map(len, calib)) // DRAWS,
        "original_nats": round(float(np.concatenate(losses).mean()), 5),
        "original_bytes": size,
    }
    model = TWINS[args.twin](original, calib[:4]) if args.twin else original
    name_of_model = original.name + (f", {args.twin} twin" if args.twin else "")
    after: dict[str, list[np.ndarray]] = {}
    for name in args.recipe or (itertools.chain(*ORDERED) if args.twin else RECIPES):
        key = json.dumps([facts, repr(RECIPES[name])])
        row, after[name] = kept(args.keep, key, partial(measure, model, RECIPES[name], calib, held, losses))
        keep(name_of_model, facts, name, row)
        print(name, json.dumps(row), flush=True)
    if not args.recipe:
        keep_pairs(name_of_model, pairs(after, ORDERED))


def texts(model: str, calib: Path | None, text: Path | None) -> tuple[str, str]:
    """(calibration, held out): the files that were named, or for `demo` what this Python has."""
    if calib is not None and text is not None:
        return calib.read_text(encoding="utf-8")[:LONGEST], text.read_text(encoding="utf-8")[:LONGEST]
    assert model == "demo", "--calib and --text say what to read"
    root = stdlib_directory()
    seen = [path for path in sorted(root.glob("*.py")) if not is_held_out(path.relative_to(root).as_posix())]
    return "\n".join(map(read_source, seen))[:LONGEST], "\n".join(source for _, source in read_held_out())


def windows(model: Model, text: str, count: int) -> list[np.ndarray]:
    """This many windows, spread over the text."""
    ids = np.array(model.tokenizer.encode(text), np.int32)
    return [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW, len(ids) // count)][:count]


def measure(
    original: Model, steps: Steps, calib: list[np.ndarray], held: list[np.ndarray], losses: list[np.ndarray]
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The row, and the losses of the first draw."""
    reads_text = any(step.method not in ("magnitude", "rtn") for step in steps)
    found = [draw(original, steps, calib[first::DRAWS], held) for first in range(DRAWS if reads_text else 1)]
    intervals = []
    for after, _, _ in found:
        differences = [new - old for old, new in zip(losses, after, strict=True)]
        intervals.append(mean_interval(Clusters.of(differences, list(range(len(differences)))), seed=0))
    _, zeros, size = found[0]
    bounds = {name: round(value, 5) for name, value in intervals[0].to_json().items()}
    draws = [round(interval.mid, 5) for interval in intervals]
    row = {"increase_nats": bounds, "draws": draws, "zeros": round(zeros, 5), "weights_bytes": size}
    return row, found[0][0]


def draw(
    original: Model, steps: Steps, calib: list[np.ndarray], held: list[np.ndarray]
) -> tuple[list[np.ndarray], float, int]:
    """Losses on the held-out windows, the share of zeros, and bytes, of the model after these steps."""
    with tempfile.TemporaryDirectory() as folder:
        model = original
        for number, step in enumerate(steps):
            model = step.apply(model, Context(output=Path(folder) / str(number), windows=calib))
        losses, size = read(model, held)
        return losses, share_of_zeros(model), size


def read(model: Model, held: list[np.ndarray]) -> tuple[list[np.ndarray], int]:
    with NativeExecutor(model, Deployment(context=WINDOW)) as executor:
        losses = [-executor.score(window).log_probabilities.astype(np.float64) for window in held]
        return losses, executor.weights_bytes


def share_of_zeros(model: Model) -> float:
    counts = np.array([(int((w == 0).sum()), w.size) for w in blocks(model)]).sum(0)
    return float(counts[0] / counts[1])


def blocks(model: Model) -> Iterator[np.ndarray]:
    return (model.weights.values(f"{linear}.weight") for linear in body_linears(model.spec))


def keep(model: str, facts: dict[str, Any], name: str, row: dict[str, Any]) -> None:
    """Writes the row beside what the file has of this model, in the order of the recipes."""
    whole = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    rows = {**whole.get(model, {}).get("rows", {}), name: row}
    compared = {"pairs": whole[model]["pairs"]} if "pairs" in whole.get(model, {}) else {}
    whole[model] = {**facts, **compared, "rows": {recipe: rows[recipe] for recipe in RECIPES if recipe in rows}}
    RESULTS.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def keep_pairs(model: str, compared: list[dict[str, Any]]) -> None:
    whole = json.loads(RESULTS.read_text(encoding="utf-8"))
    whole[model]["pairs"] = compared
    RESULTS.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
