"""What each dimension of structured pruning costs and saves on a real model, on our own engine, without healing.

    python -m benchmarks.prune_structured --model FOLDER --calib train.txt --text held_out.txt --keep DIR
    python -m benchmarks.prune_structured --model demo --keep DIR
    python -m benchmarks.prune_structured --model demo --keep DIR --speed

adds to benchmarks/results/prune_structured.json, under the model's name: for each dimension and fraction the shapes,
the nats a token that it adds on held-out windows with a two-sided 90% interval from redrawing windows, and how far
Transformers' logits of the folder are from ours; a fraction that rounds to nothing is listed as refused. The pruned
folders stay in DIR. `--speed` needs a quiet machine for a minute and adds decode speed over the original's, taken in
turn. `demo` is measured on the modules that it has never seen and calibrated on others of this Python.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.sparsify_methods import texts
from snello.engine.native import NativeExecutor
from snello.errors import Unsupported
from snello.measure.bootstrap import Clusters, mean_interval
from snello.models import load
from snello.models.model import Model
from snello.models.reference import Reference
from snello.models.spec import Deployment
from snello.techniques.base import Context
from snello.techniques.prune import Prune

RESULTS = Path(__file__).parent / "results" / "prune_structured.json"
WINDOW, TURNS, STEPS = 256, 6, 24
NONE = {"ffn": 0.0, "heads": 0.0, "width": 0.0, "layers": 0.0}
FRACTIONS = (0.12, 0.25, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--keep", required=True, type=Path, help="where the pruned folders are left, or found")
    parser.add_argument("--windows", type=int, default=24, help="of 256 tokens, for calibration and for the loss")
    parser.add_argument("--speed", action="store_true", help="only time what is in --keep")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    name, original = Path(args.model).name, load(args.model)
    if args.speed:
        add_speed(original, args.keep / name, results[name]["rows"])
    else:
        files = f" --calib {args.calib} --text {args.text}" if args.text else ""
        command = f"python -m benchmarks.prune_structured --model {args.model}{files} --keep DIR, then with --speed"
        results[name] = {"command": command, **study(original, args, args.keep / name)}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def study(original: Model, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    calib, held = (windows(original, text, args.windows) for text in texts(args.model, args.calib, args.text))
    base = losses(original, held)
    rows: dict[str, Any] = {}
    for name, options in recipes().items():
        try:
            made = Prune(**options).apply(original, Context(output=folder / name, windows=calib))
        except Unsupported as error:
            rows[name] = {"refused": error.message}
            continue
        rows[name] = compare(base, losses(made, held)) | shapes(made) | agreement(made, held[0])
        print(name, json.dumps(rows[name]), flush=True)
    tokens = {"tokens": sum(map(len, base)), "calibration_tokens": sum(map(len, calib))}
    nats = round(float(np.concatenate(base).mean()), 5)
    return {**tokens, "original_nats": nats, "original": shapes(original), "rows": rows}


def add_speed(original: Model, folder: Path, rows: dict[str, Any]) -> None:
    for name, row in rows.items():
        if "refused" not in row and not name.endswith("as is"):  # the same shapes take the same time
            row["decode_speedup"] = speedup(original, load(folder / name))
            print(name, json.dumps(row["decode_speedup"]), flush=True)


def recipes() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for dimension in NONE:
        for fraction in FRACTIONS:
            found[f"{dimension} {fraction:.0%}"] = {**NONE, dimension: fraction}
            if dimension in ("ffn", "heads"):
                found[f"{dimension} {fraction:.0%}, as is"] = {**NONE, dimension: fraction, "compensate": False}
    return found


def windows(model: Model, text: str, count: int) -> list[np.ndarray]:
    """This many windows, spread over the first million characters."""
    ids = np.array(model.tokenizer.encode(text[:1_000_000]), np.int32)
    return [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW, len(ids) // count)][:count]


def losses(model: Model, held: list[np.ndarray]) -> list[np.ndarray]:
    with NativeExecutor(model, Deployment(context=WINDOW, threads=1)) as executor:
        return [-executor.score(window).log_probabilities.astype(np.float64) for window in held]


def compare(base: list[np.ndarray], lean: list[np.ndarray]) -> dict[str, Any]:
    differences = [after - before for before, after in zip(base, lean, strict=True)]
    found = mean_interval(Clusters.of(differences, list(range(len(differences)))), seed=0)
    return {"increase_nats": {name: round(value, 5) for name, value in found.to_json().items()}}


def shapes(model: Model) -> dict[str, Any]:
    layer: Any = model.spec.layers[0]
    heads = {"heads": layer.mixer.num_heads, "kv_heads": layer.mixer.num_kv_heads}
    sizes = {"hidden": model.spec.hidden_size, "ffn": layer.feed_forward.width, "layers": len(model.spec.layers)}
    return {"parameters": model.num_parameters, **sizes, **heads}


@torch.inference_mode()
def agreement(model: Model, window: np.ndarray) -> dict[str, Any]:
    """The largest difference between Transformers' logits of the folder and ours, and the largest logit."""
    import transformers

    tokens = torch.from_numpy(window.astype(np.int64))[None]
    stock = transformers.AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()
    theirs, ours = stock(tokens).logits, Reference.from_model(model)(tokens)
    return {
        "transformers_differs": float(f"{float((theirs - ours).abs().max()):.2g}"),
        "logit": round(float(ours.abs().max()), 1),
    }


def speedup(original: Model, lean: Model) -> dict[str, float]:
    """Seconds a decoded token, original over lean, in turn (A B B A); median of the turns and their range."""
    deployment = Deployment(context=WINDOW)
    with NativeExecutor(original, deployment) as a, NativeExecutor(lean, deployment) as b:
        decode(a), decode(b)
        ratios = []
        for turn in range(TURNS):
            first = turn % 2 == 0
            one, other = (decode(a), decode(b)) if first else tuple(reversed((decode(b), decode(a))))
            ratios.append(one / other)
    low, median, high = np.quantile(ratios, [0.0, 0.5, 1.0])
    return {"median": round(float(median), 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def decode(executor: NativeExecutor) -> float:
    session = executor.session()
    session.feed(np.arange(1, 33, dtype=np.int32))
    began = time.perf_counter()
    for step in range(STEPS):
        executor.step([session], [33 + step])
    session.close()
    return (time.perf_counter() - began) / STEPS


if __name__ == "__main__":
    main()
