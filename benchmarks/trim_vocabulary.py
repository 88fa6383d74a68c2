"""What fewer words cost on text like the calibration text and unlike it, and what they save by shape.

    python -m benchmarks.trim_vocabulary --model FOLDER --calib train.txt --text held_out.txt other.txt
    python -m benchmarks.trim_vocabulary --shape qwen3-0.6b
    python -m benchmarks.trim_vocabulary --shape qwen3-0.6b --speed
    python -m benchmarks.trim_vocabulary --tokenizer FOLDER --calib train.txt --text held_out.txt other.txt

adds to benchmarks/results/trim_vocabulary.json. Of a model, for each share that stays: per text the nats that a token
of the original's loses (the sum over its pieces, with a two-sided 90% interval from redrawing windows) and the tokens
that it takes for one of the original's. Of a shape: bytes that a decoded token reads, as `quantize` would leave it.
Of a tokenizer without a model: the
share of a text's tokens that left, and the tokens that it takes for one, by how many tokens of calibration text choose.
`--speed` needs a quiet machine for two minutes: seconds a decoded token, the whole over the trimmed, in turn.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from benchmarks.prune_structured import WINDOW, speedup, windows
from snello.engine.native import NativeExecutor
from snello.errors import SnelloError
from snello.measure.bootstrap import Clusters, mean_interval
from snello.measure.sizes import linear_bytes, weights_bytes
from snello.measure.translation import Translated, translation
from snello.models import load, shapes
from snello.models.model import Model
from snello.models.spec import Deployment
from snello.models.tokenizer import Tokenizer, load_tokenizer
from snello.techniques.base import Context
from snello.techniques.trim import Trim
from snello.techniques.trim.rewrite import tokenizer_table
from snello.techniques.trim.vocabulary import Vocabulary, choose

RESULTS = Path(__file__).parent / "results" / "trim_vocabulary.json"
SHARES = (0.9, 0.75, 0.5, 0.375)
OF_SHAPE = (1.0, 0.5, 0.25, 0.125)
CALIBRATION, TEXT_CHARACTERS = (32_768, 4_000_000), 1_000_000
CONTEXT = 512  # room for windows of 256 that take more tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--text", type=Path, nargs="+")
    parser.add_argument("--windows", type=int, default=48, help="of 256 tokens, of each text")
    parser.add_argument("--shape", choices=sorted(shapes.SHAPES))
    parser.add_argument("--tokenizer", type=Path, help="a folder with vocab.json and merges.txt, or tokenizer.json")
    parser.add_argument("--speed", action="store_true")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.shape:
        results.setdefault(args.shape, {}).update(of_shape(args.shape, timed=args.speed))
    elif args.tokenizer:
        results[args.tokenizer.name] = {
            str(tokens): of_tokenizer(args.tokenizer, args.calib, args.text, tokens) for tokens in CALIBRATION
        }
    else:
        results[Path(args.model).name] = study(load(args.model), args)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def study(original: Model, args: argparse.Namespace) -> dict[str, Any]:
    calib = windows(original, args.calib.read_text(), 2 * args.windows)
    held = {path.name: windows(original, path.read_text(), args.windows) for path in args.text}
    base = {name: losses(original, original, texts) for name, texts in held.items()}
    rows: dict[str, Any] = {}
    for share in SHARES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                made = Trim(keep=share).apply(original, Context(output=Path(folder) / "trimmed", windows=calib))
            except SnelloError as error:
                rows[f"{share:g}"] = {"refused": error.message}
                continue
            row: dict[str, Any] = {"tokens": made.spec.vocab_size, "parameters": made.num_parameters}
            for name, texts in held.items():
                row[name] = compare(base[name], losses(original, made, texts)) | taken(original, made, texts)
            rows[f"{share:g}"] = row
            print(share, json.dumps(row), flush=True)
    sizes = {"tokens": original.spec.vocab_size, "parameters": original.num_parameters}
    scored = {name: sum(map(len, found)) for name, found in base.items()}
    return {"calibration_tokens": sum(map(len, calib)), "scored_tokens": scored, "original": sizes, "rows": rows}


def losses(original: Model, model: Model, texts: list[np.ndarray]) -> list[np.ndarray]:
    rule = translation(original.tokenizer, model.tokenizer)
    with NativeExecutor(model, Deployment(context=CONTEXT, threads=1)) as executor:
        runner = executor if rule is None else Translated(executor, rule)
        return [-np.asarray(runner.score(text).log_probabilities, np.float64) for text in texts]


def compare(base: list[np.ndarray], lean: list[np.ndarray]) -> dict[str, Any]:
    differences = [after - before for before, after in zip(base, lean, strict=True)]
    found = mean_interval(Clusters.of(differences, list(range(len(differences)))), seed=0)
    return {"increase_nats": {name: round(value, 5) for name, value in found.to_json().items()}}


def taken(original: Model, model: Model, texts: list[np.ndarray]) -> dict[str, float]:
    rule = translation(original.tokenizer, model.tokenizer)
    assert rule is not None
    return {"tokens_for_one": round(rule.stretch(texts), 4)}


def of_shape(name: str, *, timed: bool) -> dict[str, Any]:
    whole = trimmed_shape(name, 1.0)
    rows: dict[str, Any] = {}
    for share in OF_SHAPE:
        spec = shapes.spec_of_shape(trimmed_shape(name, share), "int4")
        rows[f"{share:g}"] = {
            "tokens": spec.vocab_size,
            "decode_bytes": linear_bytes(spec),
            "weights_bytes": weights_bytes(spec),
        }
        if timed and share < 1:
            small = shapes.random_model(trimmed_shape(name, share), "int4")
            rows[f"{share:g}"]["decode_speedup"] = speedup(shapes.random_model(whole, "int4"), small)
        print(share, json.dumps(rows[f"{share:g}"]), flush=True)
    return {"by_share": rows}


def of_tokenizer(folder: Path, calib: Path, texts: list[Path], tokens: int) -> dict[str, Any]:
    whole = load_tokenizer(folder)
    vocabulary, size = Vocabulary(json.loads(whole.backend.to_str())), whole.vocab_size
    seen = whole.encode(calib.read_text()[: 6 * tokens])[:tokens]
    held = {path.name: whole.encode(path.read_text()[:TEXT_CHARACTERS]) for path in texts}
    rows: dict[str, Any] = {}
    for share in OF_SHAPE[1:]:
        count = math.ceil(share * size)
        try:
            kept = choose(vocabulary, np.bincount(seen, minlength=size), count, 1, (), ())
        except SnelloError as error:
            rows[f"{share:g}"] = {"refused": error.message}
            continue
        new = {old: place for place, old in enumerate(kept)}
        small = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(tokenizer_table(vocabulary, new))))
        row: dict[str, Any] = {"tokens": count}
        for name, ids in held.items():
            left = sum(token not in new for token in ids) / len(ids)
            now = len(small.encode(texts_of(texts, name))) / len(ids)
            row[name] = {"share_of_tokens_that_left": round(left, 5), "tokens_for_one": round(now, 5)}
        rows[f"{share:g}"] = row
        print(share, json.dumps(row), flush=True)
    return {"tokens": size, "rows": rows}


def texts_of(paths: list[Path], name: str) -> str:
    return next(path for path in paths if path.name == name).read_text()[:TEXT_CHARACTERS]


def trimmed_shape(name: str, share: float) -> str:
    """The name of this shape with so many words."""
    config = shapes.SHAPES[name]
    named: dict[str, Any] = {key: 0 for key in ("bos_token_id", "eos_token_id") if key in config}
    called = f"{name} {share:g}"
    shapes.SHAPES[called] = {**config, **named, "vocab_size": round(share * config["vocab_size"])}
    return called


if __name__ == "__main__":
    assert WINDOW < CONTEXT
    main()
