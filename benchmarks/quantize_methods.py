"""What each way of quantizing costs on a real model, on our own engine: loss and divergence on held-out text.

    python -m benchmarks.quantize_methods --model FOLDER --calib train.txt --text held_out.txt
    python -m benchmarks.quantize_methods --model demo

writes, under the model's name, to benchmarks/results/quantize_methods.json: for each recipe the nats a token that it
adds on the held-out windows, with a two-sided 90% interval from redrawing windows (so each end is a one-sided 95%
bound), the mean KL divergence from the original at sampled positions, and the size of the weights. Every two methods in
groups of 128 are then compared token by token: the difference with its interval, and how likely chance is as large, by
Holm's correction over all pairs of the table. Methods that calibrate also get other draws of calibration text. The
embedded model brings its own text: modules of this Python that it has never seen, and others to calibrate on. With
`--only`, the named rows join those of an earlier run on the same text, without pairs and other draws. `--twin` measures
a model of the same function with outliers that the original does not have (benchmarks/outliers.py), the rows that are
ordered alone, under a name of its own. With `--keep`, finished rows stay in a folder and a run that was cut goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from snello.engine.native import NativeExecutor
from snello.measure.bootstrap import Clusters, holm, mean_interval, two_sided_p
from snello.measure.guards import kl
from snello.models import load
from snello.models.demo.held_out import is_held_out, read_held_out, read_source, stdlib_directory
from snello.models.model import Model
from snello.models.spec import Deployment
from snello.techniques.base import Context
from snello.techniques.quantize import DATA_FREE, Method, Quantize
from tests.twins import rotated_stream, scaled_channels

RESULTS = Path(__file__).parent / "results" / "quantize_methods.json"
WINDOW = 512
SAMPLED = 64  # positions of each window at which whole distributions are compared
DRAWS = 3  # of calibration text, for the methods that read it
ORDERED: tuple[Method, ...] = ("rtn", "hqq", "awq", "gptq")  # whose order is tested, at four bits and at three
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
    **{f"int4, {method}, by row": Quantize(method=method, group_size=0) for method in ORDERED},
    **{f"int3, {method}": Quantize(weights="int3", method=method) for method in ORDERED},
    "int3, gptq, groups of 32": Quantize(weights="int3", method="gptq", group_size=32),
    "mixed, 4 bits, gptq": Quantize(weights="mixed", budget="4 bits", method="gptq"),
    "mixed, 5 bits, rtn": Quantize(weights="mixed", budget="5 bits"),
    "mixed, 5 bits, gptq": Quantize(weights="mixed", budget="5 bits", method="gptq"),
}


@dataclass(frozen=True)
class Reading:
    """What a model says about the held-out windows."""

    losses: list[np.ndarray]  # nats of each token
    logits: list[np.ndarray]  # (SAMPLED, V) of each window
    weights_bytes: int


Row = tuple[dict[str, Any], list[np.ndarray]]  # what the results say, and nats of each token
TWINS: dict[str, Callable[[Model, list[np.ndarray]], Model]] = {
    "scaled": lambda model, windows: scaled_channels(model),
    "rotated": rotated_stream,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", type=Path, help="needed but for demo")
    parser.add_argument("--text", type=Path, help="needed but for demo")
    parser.add_argument("--windows", type=int, default=24, help="of 512 tokens, for calibration and for the loss")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=[], help="of the rows: measure these anew")
    parser.add_argument("--twin", choices=TWINS, help="measure a twin of the model instead")
    parser.add_argument("--keep", type=Path, help="a folder for finished rows, from which a run goes on")
    args = parser.parse_args()
    original = load(args.model)
    seen, unseen = texts(parser, args)
    draws = [cut(original, seen, args.windows, draw) for draw in range(DRAWS)]
    calib, held = draws[0], cut(original, unseen, args.windows)
    base = read(original, held)
    command = f"python -m benchmarks.quantize_methods --model {args.model}"
    command += "" if args.model == "demo" else f" --calib {args.calib} --text {args.text}"
    command += f" --twin {args.twin}" if args.twin else ""
    tokens = {"tokens": sum(map(len, base.losses)), "calibration_tokens": sum(map(len, calib))}
    facts = {"command": command, **tokens, "original_nats": mean(base.losses), "original_bytes": base.weights_bytes}
    source = TWINS[args.twin](original, calib[:4]) if args.twin else original
    ordered = list(itertools.chain(*ordered_names()))
    rows, losses = {}, {}
    for name in args.only or (ordered if args.twin else RECIPES):
        recipe = RECIPES[name]
        reads_more = not args.only and name in ordered and recipe.method not in DATA_FREE
        others = draws[1:] if reads_more else []
        key = json.dumps([facts, repr(recipe), len(others)])
        rows[name], losses[name] = kept(args.keep, key, partial(row_of, base, recipe, source, (calib, *others), held))
        print(name, json.dumps(rows[name]), flush=True)
    write(parser, args, facts, rows, losses)


def row_of(
    base: Reading, recipe: Quantize, source: Model, draws: Sequence[list[np.ndarray]], held: list[np.ndarray]
) -> Row:
    """Against the original, by the first draw of calibration text; other draws give a number each."""
    first, *others = (applied(recipe, source, draw, held) for draw in draws)
    row = compare(base, first)
    if others:
        row["other_draws"] = [round(mean(other.losses) - mean(base.losses), 5) for other in others]
    return row, first.losses


def write(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    facts: dict[str, Any],
    rows: dict[str, Any],
    losses: Mapping[str, list[np.ndarray]],
) -> None:
    """Under the model's name; some rows join what is there."""
    measured = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    model = Path(args.model).name + (f", {args.twin} twin" if args.twin else "")
    earlier = measured.get(model, {})
    if not args.only:
        measured[model] = {**facts, "rows": rows, "pairs": pairs(losses, ordered_names())}
    elif earlier and all(earlier[fact] == value for fact, value in facts.items()):
        joined = earlier["rows"] | rows
        earlier["rows"] = {name: joined[name] for name in RECIPES if name in joined}
    else:
        parser.error("no earlier run on the same text with the same original: measure all rows")
    RESULTS.write_text(json.dumps(measured, indent=1) + "\n")


def kept(folder: Path | None, key: str, measure: Callable[[], Row]) -> Row:
    """What was measured for this key (all that a row depends on but the code), from the folder if it is there."""
    if folder is None:
        return measure()
    stem = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
    row_file, losses_file = stem.with_suffix(".json"), stem.with_suffix(".npy")
    if not row_file.exists():
        row, losses = measure()
        folder.mkdir(parents=True, exist_ok=True)
        np.save(losses_file, np.stack(losses))
        beside = stem.with_suffix(".partial")
        beside.write_text(json.dumps(row), encoding="utf-8")
        beside.rename(row_file)
    return json.loads(row_file.read_text(encoding="utf-8")), list(np.load(losses_file))


def applied(recipe: Quantize, original: Model, calib: list[np.ndarray], held: list[np.ndarray]) -> Reading:
    with tempfile.TemporaryDirectory() as folder:
        return read(recipe.apply(original, Context(output=Path(folder) / "lean", windows=calib)), held)


def ordered_names() -> list[list[str]]:
    """Tables whose methods are compared: INT4 by row, INT4 and INT3 in groups."""
    tables = ("int4, {}, by row", "int4, {}", "int3, {}")
    return [[table.format(method) for method in ORDERED] for table in tables]


def pairs(losses: Mapping[str, list[np.ndarray]], tables: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Every two rows of a table: what the second loses beyond the first, in nats a token; corrected over all tables."""
    found: list[dict[str, Any]] = []
    for first, second in itertools.chain(*(itertools.combinations(names, 2) for names in tables)):
        differences = [after - before for before, after in zip(losses[first], losses[second], strict=True)]
        clusters = Clusters.of(differences, list(range(len(differences))))
        bounds = {name: round(value, 5) for name, value in mean_interval(clusters, seed=0).to_json().items()}
        found.append({"first": first, "second": second, "difference_nats": bounds, "p": two_sided_p(clusters, seed=0)})
    for row, corrected in zip(found, holm([row["p"] for row in found]), strict=True):
        row["p_holm"] = corrected
    return found


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


def cut(model: Model, text: str, count: int, draw: int = 0) -> list[np.ndarray]:
    """This many windows, spread over the first two million characters; another draw has the windows that follow."""
    ids = np.array(model.tokenizer.encode(text[:2_000_000]), np.int32)
    first = draw * WINDOW
    return [ids[start : start + WINDOW] for start in range(first, len(ids) - WINDOW, len(ids) // count)][:count]


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
