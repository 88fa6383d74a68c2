"""What a cheaper attention still recalls: the loss that a first copy of rare tokens saves on their second one.

    python -m benchmarks.recall --model FOLDER --text held_out.txt [--also FOLDER ...]
    python -m benchmarks.recall --model demo

adds to benchmarks/results/recall.json, under the model's name; `demo` reads modules that it has never seen. A passage
of 24 tokens stands after 16 others, is followed by text from elsewhere, and comes again; every token of the second copy
is `distance` after the first. Beside it stands the same text with another passage in the first one's place. What is
compared is the loss of the second copy's rare tokens, the third of them that the whole text has least often, with and
without the first: nats saved a token, with a two-sided 90% interval from redrawing passages. Measured of full
attention, of windows with and without sinks, and of each model of `--also`, such as one with convolutions. A window
hands on what it saw from layer to layer, so beyond it need not be nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snello.engine.native import NativeExecutor
from snello.measure.bootstrap import Clusters, mean_interval
from snello.models import load
from snello.models.demo.held_out import read_held_out
from snello.models.model import Model
from snello.models.spec import Deployment
from snello.techniques.attention import CheaperAttention
from snello.techniques.base import Context

RESULTS = Path(__file__).parent / "results" / "recall.json"
BEFORE, PASSAGE, RARE = 16, 24, 8
WINDOW, SINKS = 256, 4
DISTANCES = (32, 64, 128, 224, 288, 512, 896)


class Pair(NamedTuple):
    """Two texts of one length that end alike; `rare`: places of the rare tokens, from the end of the text."""

    copied: np.ndarray
    other: np.ndarray
    rare: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, help="for all but demo")
    parser.add_argument("--also", nargs="*", default=[], type=Path, help="models made from it, to read the same")
    parser.add_argument("--passages", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    model = load(args.model)
    text = args.text.read_text(encoding="utf-8") if args.text else "\n".join(source for _, source in read_held_out())
    texts = {distance: pairs(model, text, distance, args.passages) for distance in DISTANCES}
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = {"full attention": model}
        for sinks in (0, SINKS):
            options = CheaperAttention(window=WINDOW, sinks=sinks)
            made[f"window {WINDOW}, {sinks} sinks"] = options.apply(model, Context(output=Path(folder) / f"{sinks}"))
        for name, each in {**made, **{path.name: load(path) for path in args.also}}.items():
            with NativeExecutor(
                each, Deployment(context=BEFORE + max(DISTANCES) + PASSAGE, threads=args.threads)
            ) as run:
                rows[name] = {str(distance): saved(run, texts[distance]) for distance in DISTANCES}
            print(name, json.dumps(rows[name]), flush=True)
    file = f" --text {args.text}" if args.text else ""
    also = f" --also {' '.join(map(str, args.also))}" if args.also else ""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[Path(args.model).name] = {
        "command": f"python -m benchmarks.recall --model {args.model}{file}{also}",
        "passages": args.passages,
        "rare_tokens": RARE,
        "window": WINDOW,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def pairs(model: Model, text: str, distance: int, count: int) -> list[Pair]:
    """`count` passages, spread over the text; what stands between the copies is elsewhere in it, and the same at every
    distance as far as it goes.
    """
    ids = np.array(model.tokenizer.encode(text), np.int32)
    often = np.bincount(ids, minlength=model.spec.vocab_size)
    longest = BEFORE + 2 * PASSAGE + max(DISTANCES)
    stride = len(ids) // count
    assert stride > 2 * longest, "the text is too short for so many passages"
    found = []
    for place in range(0, count * stride, stride):
        before, passage = ids[place : place + BEFORE], ids[place + BEFORE : place + BEFORE + PASSAGE]
        other = ids[place + BEFORE + PASSAGE : place + BEFORE + 2 * PASSAGE]
        between = ids[place + longest : place + longest + distance - PASSAGE]
        rare = np.sort(np.argsort(often[passage], kind="stable")[:RARE]) - PASSAGE
        copied, control = (np.concatenate([before, first, between, passage]) for first in (passage, other))
        found.append(Pair(copied, control, rare))
    return found


def saved(executor: NativeExecutor, texts: list[Pair]) -> dict[str, float]:
    """Nats that each rare token of a second copy is likelier by, for having a first one."""
    differences = [
        executor.score(pair.copied).log_probabilities[pair.rare].astype(np.float64)
        - executor.score(pair.other).log_probabilities[pair.rare]
        for pair in texts
    ]
    found = mean_interval(Clusters.of(differences, list(range(len(differences)))), seed=0)
    return {name: round(value, 3) for name, value in found.to_json().items()}


if __name__ == "__main__":
    main()
