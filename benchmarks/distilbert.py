"""DistilBERT's claims (40% smaller, 60% faster, 97% of the quality; arXiv:1910.01108) on models that fit one core.

    python -m benchmarks.distilbert literal --text english_novels_train.txt --held english_novels_valid.txt --keep DIR
    python -m benchmarks.distilbert sst2 --model all-MiniLM-L6-v2 --data FOLDER --keep DIR
    python -m benchmarks.distilbert test --model all-MiniLM-L6-v2 --data FOLDER --keep DIR
    python -m benchmarks.distilbert speed --model all-MiniLM-L6-v2 --keep DIR

adds to benchmarks/results/distilbert.json cell by cell, so that a run that was stopped goes on. `literal`: a small BERT
that is trained here by masked words on novels, and its student of every other layer, taught by the paper's triple loss
(soft targets, masked words, cosine of hidden rows: 5, 2, 1); beside it the same student untrained, by text alone, and
the same shape from random weights under the triple loss; nats and accuracy on hidden words of unseen books. `sst2`:
an encoder of six layers is fine-tuned on SST-2, cut by family (sst2.py); students of three and four of its layers learn
from it alone, without labels, and their vocabulary is trimmed; each for five seeds, chosen by nothing, accuracy on dev.
`test` reads the test sentences, once, when all cells are there: the ratio of accuracies with its one-sided 95% bound,
from redrawing seeds and sentences. `speed` needs a quiet machine for three minutes: sequences a second over the
teacher's, in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor, nn

from benchmarks.distill_after_prune import random_weights, unseen
from benchmarks.sst2 import Row, read_sst2
from snello.engine.native import NativeExecutor
from snello.errors import SnelloError
from snello.measure.timing import ratio
from snello.models import load
from snello.models.fewer_layers import FewerLayers
from snello.models.model import Model
from snello.models.plain_folder import write_plain_folder
from snello.models.reference import Reference
from snello.models.spec import Deployment
from snello.techniques.base import Context
from snello.techniques.distill import Distill
from snello.techniques.distill.apply import training_rows
from snello.techniques.distill.rollouts import StudentWeights
from snello.techniques.trim import Trim
from snello.training.data import Batch, Rows
from snello.training.loop import train
from snello.training.options import TrainOptions

RESULTS = Path(__file__).parent / "results" / "distilbert.json"
TRIPLE, TEMPERATURE = "forward:5,text:2,cosine:1", 2.0
WINDOW, HELD = 128, 120  # tokens of a window of novels; windows that judge
WORDS = 4096
SHAPE: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512,
    "max_position_embeddings": WINDOW, "type_vocab_size": 2, "vocab_size": WORDS,
}  # fmt: skip
SEEDS = range(5)
KEPT = {"3 layers": (0, 2, 4), "4 layers": (0, 2, 3, 5)}
TAUGHT = "forward:1,cosine:1"
VOCABULARY = 0.4  # share of words that stays
TRUSTED = 0.05  # one-sided
DRAWS = 10_000
LENGTHS = (16, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("literal", "sst2", "test", "speed"))
    parser.add_argument("--keep", required=True, type=Path, help="where the folders are left, or found")
    parser.add_argument("--text", type=Path, help="novels to train on")
    parser.add_argument("--held", type=Path, help="novels that judge")
    parser.add_argument("--model", type=Path, help="the encoder of six layers")
    parser.add_argument("--data", type=Path, help="the folder of sst2_train.tsv and its like")
    parser.add_argument(
        "--tokens", type=int, default=1_500_000, help="that the small BERT is trained on; a third heals"
    )
    parser.add_argument("--examples", type=int, default=6_000, help="that a seed learns from")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.keep.mkdir(parents=True, exist_ok=True)
    {"literal": literal, "sst2": sst2, "test": test, "speed": speed}[args.what](args)


class Cells:
    """Results by name, written as soon as each is known. A cell that is there is not computed again."""

    def __init__(self, args: argparse.Namespace, part: str) -> None:
        self.path: Path = args.output
        self.all = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.own: dict[str, Any] = self.all.setdefault(part, {})
        words = " ".join(Path(word).name if "/" in word else word for word in sys.argv[1:])
        self.own["command"] = f"python -m benchmarks.distilbert {words}"
        self.own["threads"] = args.threads
        self.rows: dict[str, Any] = self.own.setdefault("rows", {})

    def add(self, name: str, found: dict[str, Any]) -> None:
        self.rows.setdefault(name, {}).update(found)
        print(name, json.dumps(found), flush=True)
        self.write()

    def write(self) -> None:
        beside = self.path.with_suffix(f".{os.getpid()}.partial")
        beside.write_text(json.dumps(self.all, indent=1) + "\n")
        beside.replace(self.path)


def shapes(model: Model) -> dict[str, int]:
    """Parameters, the embedding's apart."""
    layers = sum(math.prod(model.weights.shape(name)) for name in model.weights.names() if name.startswith("layers."))
    return {"layers": len(model.spec.layers), "parameters": model.num_parameters, "layer_parameters": layers}


def told(name: str) -> Callable[[str, float], None]:
    return lambda message, _: print(f"{name}: {message}", flush=True)


# ---- the literal recipe ----


def literal(args: argparse.Namespace) -> None:
    cells = Cells(args, "literal")
    start = small_bert(args)
    held = encoded(start, args.held, HELD)
    seen = unseen(encoded(start, args.text, args.tokens // WINDOW), held)
    heal = args.tokens // 3
    mlm = Distill(loss="text", tokens=args.tokens, rate=1e-3, batch_tokens=4096)
    triple = Distill(student="alternate", loss=TRIPLE, temperature=TEMPERATURE, tokens=heal, rate=5e-4)
    teacher = study(cells, args, "teacher", start, mlm, None, seen, held)
    bare = dataclasses.replace(triple, tokens=1, rate=1e-12)
    student = study(cells, args, "every other layer, untrained", teacher, bare, teacher, seen, held)
    study(cells, args, "every other layer, triple loss", teacher, triple, teacher, seen, held)
    alone = dataclasses.replace(triple, loss="text")
    study(cells, args, "every other layer, text alone", teacher, alone, None, seen, held)
    path = args.keep / "random"
    scratch = load(path) if path.exists() else random_weights(student, teacher, path)
    given = dataclasses.replace(triple, student="given")
    study(cells, args, "same shape from random, triple loss", scratch, given, teacher, seen, held)


def small_bert(args: argparse.Namespace) -> Model:
    """A BERT of random weights with a vocabulary of its own, made from the text."""
    path = args.keep / "start"
    if not path.exists():
        words = BertWordPieceTokenizer(lowercase=True)
        with args.text.open(encoding="utf-8") as file:
            text = file.read(8_000_000)
        words.train_from_iterator(text.splitlines(), vocab_size=WORDS, min_frequency=2, show_progress=False)
        torch.manual_seed(0)
        model = transformers.BertForMaskedLM(transformers.BertConfig(**SHAPE))
        beside = path.with_name(".start.partial")
        model.save_pretrained(beside)
        words.save(str(beside / "vocabulary.json"))
        backend = Tokenizer.from_file(str(beside / "vocabulary.json"))
        transformers.BertTokenizerFast(tokenizer_object=backend).save_pretrained(beside)
        (beside / "vocabulary.json").unlink()
        beside.rename(path)
    return load(path)


def encoded(model: Model, path: Path, count: int) -> list[np.ndarray]:
    """This many windows from all over the file, each between the tokens that open and close a text."""
    first, last = (model.tokenizer.token_id(text) for text in ("[CLS]", "[SEP]"))
    size, found = path.stat().st_size, list[np.ndarray]()
    with path.open("rb") as file:
        for number in range(count):
            file.seek(size * number // count)
            text = file.read(WINDOW * 8).decode("utf-8", "ignore").partition(" ")[2]
            ids = model.tokenizer.encode(text, add_special=False)[: WINDOW - 2]
            found.append(np.array([first, *ids, last], np.int32))
    return [window for window in found if len(window) == WINDOW]


def study(
    cells: Cells,
    args: argparse.Namespace,
    name: str,
    start: Model,
    how: Distill,
    teacher: Model | None,
    seen: list[np.ndarray],
    held: list[np.ndarray],
) -> Model:
    """One model: made if it is not there, then judged."""
    path = args.keep / name.replace(" ", "-").replace(",", "")
    found: dict[str, Any] = {}
    if not path.exists():
        began = time.monotonic()
        context = Context(
            output=path, windows=seen, held_out=held, original=teacher, threads=args.threads, progress=told(name)
        )
        how.apply(start, context)
        found["minutes"] = round((time.monotonic() - began) / 60, 2)
    made = load(path)
    if "nats" not in cells.rows.get(name, {}):
        tokens = made.history[-1]["tokens"] if how.rate > 1e-9 else 0
        cells.add(name, {**found, "tokens": tokens, **shapes(made), **hidden_words(made, held)})
    return made


@torch.inference_mode()
def hidden_words(model: Model, held: list[np.ndarray]) -> dict[str, float]:
    """Nats and accuracy on the same hidden words for every model."""
    module = Reference.from_model(model).eval()
    rows = training_rows(Distill(batch_tokens=8 * WINDOW), model, Context(output=Path("none"), windows=held, seed=99))
    nats, right, count = 0.0, 0, 0
    for step in range(len(held) // rows.batch):
        batch = rows.at(step)
        logits, targets = module(batch["tokens"]).flatten(0, 1), batch["targets"].flatten()
        nats += float(F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
        right += int((logits.argmax(-1) == targets).sum())
        count += int((targets != -100).sum())
    return {"nats": round(nats / count, 4), "accuracy": round(right / count, 4), "hidden_words": count}


# ---- SST-2 ----


class Labelled(Rows):
    """Rows of which each has a label."""

    def __init__(self, rows: Sequence[np.ndarray], labels: Sequence[int], batch: int, seed: int) -> None:
        super().__init__(rows, batch, seed)
        object.__setattr__(self, "labels", torch.tensor(labels))

    labels: Tensor

    def at(self, step: int) -> dict[str, Tensor]:
        return {**super().at(step), "labels": self.labels[self.places(step)]}


def sst2(args: argparse.Namespace) -> None:
    cells, splits = Cells(args, "sst2"), read_sst2(args.data)
    cells.own["examples"] = {"train": args.examples, "of": len(splits.train), "dev": len(splits.dev)}
    base = classifier(args)
    dev = splits.dev
    for seed in range(args.seeds):
        order = np.random.default_rng(seed).permutation(len(splits.train))[: args.examples]
        chosen = [splits.train[i] for i in order]
        teacher = cell(cells, args, f"teacher, seed {seed}", dev, partial(tuned, base, chosen, seed, args))
        for name, kept in KEPT.items():
            how = partial(taught, teacher, kept, chosen, seed, args)
            student = cell(cells, args, f"{name}, seed {seed}", dev, how)
            cell(cells, args, f"{name} trimmed, seed {seed}", dev, partial(trimmed, student, chosen, seed))


def classifier(args: argparse.Namespace) -> Model:
    """The encoder with an untrained answer of two labels."""
    path = args.keep / "base"
    if not path.exists():
        labels = {0: "negative", 1: "positive"}
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification.from_pretrained(args.model, id2label=labels, dtype="float32")
        beside = path.with_name(".base.partial")
        model.save_pretrained(beside)
        transformers.AutoTokenizer.from_pretrained(args.model).save_pretrained(beside)
        beside.rename(path)
    return load(path)


def cell(
    cells: Cells, args: argparse.Namespace, name: str, rows: Sequence[Row], make: Callable[[Path], object]
) -> Model:
    path, found = args.keep / name.replace(" ", "-").replace(",", ""), dict[str, Any]()
    if not path.exists():
        began = time.monotonic()
        make(path)
        found["minutes"] = round((time.monotonic() - began) / 60, 2)
    model = load(path)
    if "dev" not in cells.rows.get(name, {}):
        entry = model.history[-1] if model.history else {}
        right = answers(model, rows)
        cells.add(name, {**found, "tokens": entry.get("tokens", 0), **shapes(model), "dev": round(right.mean(), 4)})
    return model


def tuned(base: Model, rows: Sequence[Row], seed: int, args: argparse.Namespace, path: Path) -> None:
    """All weights learn the labels: two passes."""
    module = Reference.from_model(base)
    batches = Labelled([tokens(base, row) for row in rows], [row.label for row in rows], 32, seed)
    steps = 2 * len(rows) // 32
    options = TrainOptions(
        steps=steps, rate=1e-4, schedule="linear", warmup_steps=steps // 20, seed=seed, threads=args.threads
    )
    folder = path.with_name(f".{path.name}.training")
    done = train(module, batches, label_loss, options, progress=told(path.name), checkpoint_dir=folder)
    entry = {"technique": "fine-tuning", "tokens": done.tokens, "seed": seed}
    write_plain_folder(path, base.spec, base, (entry,), StudentWeights(module).values)


def label_loss(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch["tokens"], mask=batch.get("mask")), batch["labels"])


def taught(
    teacher: Model, kept: Sequence[int], rows: Sequence[Row], seed: int, args: argparse.Namespace, path: Path
) -> None:
    """Some of the teacher's layers, healed by the teacher on the same phrases: two passes, no labels."""
    spec = dataclasses.replace(teacher.spec, layers=tuple(teacher.spec.layers[i] for i in kept))
    bare = path.with_name(f".{path.name}.bare")
    if not bare.exists():
        write_plain_folder(bare, spec, teacher, (), FewerLayers(teacher.weights, kept).values)
    windows = [tokens(teacher, row) for row in rows]
    total = sum(map(len, windows))
    how = Distill(
        loss=TAUGHT, temperature=TEMPERATURE, tokens=2 * total, rate=1e-4, batch_tokens=32 * total // len(windows)
    )
    context = Context(
        output=path, windows=windows, original=teacher, seed=seed, threads=args.threads, progress=told(path.name)
    )
    how.apply(load(bare), context)


def trimmed(student: Model, rows: Sequence[Row], seed: int, path: Path) -> None:
    windows = [tokens(student, row) for row in rows]
    Trim(keep=VOCABULARY).apply(student, Context(output=path, windows=windows, seed=seed))


def tokens(model: Model, row: Row) -> np.ndarray:
    return np.array(model.tokenizer.encode(row.text)[: model.spec.max_positions], np.int32)


def answers(model: Model, rows: Sequence[Row]) -> np.ndarray:
    """Whether each row is answered right, by the engine."""
    with NativeExecutor(model, Deployment()) as executor:
        said = [int(np.argmax(executor.encode(tokens(model, row)))) for row in rows]
    return np.array([answer == row.label for answer, row in zip(said, rows, strict=True)], float)


def test(args: argparse.Namespace) -> None:
    """The test sentences, read when every cell is there, and never twice."""
    cells, splits = Cells(args, "test"), read_sst2(args.data)
    if cells.rows:
        raise SnelloError("the test was read already", f"its results are in {args.output}")
    names = ["teacher", *(f"{name}{kind}" for name in KEPT for kind in ("", " trimmed"))]
    folders = {
        n: [args.keep / f"{n}, seed {s}".replace(" ", "-").replace(",", "") for s in range(args.seeds)] for n in names
    }
    absent = [path.name for paths in folders.values() for path in paths if not path.exists()]
    if absent:
        raise SnelloError(f"{len(absent)} cells are missing, such as {absent[0]}", "run the sst2 part to its end")
    right = {n: np.stack([answers(load(path), splits.test) for path in paths]) for n, paths in folders.items()}
    teacher = right["teacher"]
    for name, found in right.items():
        seeds = [round(float(each), 4) for each in found.mean(1)]
        row = {"accuracy": round(float(found.mean()), 4), "by_seed": seeds, "sentences": found.shape[1]}
        if name != "teacher":
            row |= {"of_teacher": round(float(found.mean() / teacher.mean()), 4), "at_least": lower(found, teacher)}
        cells.add(name, row)


def lower(student: np.ndarray, teacher: np.ndarray) -> float:
    """The one-sided 95% lower bound of the ratio of accuracies: seeds and sentences redrawn, both models alike."""
    generator = np.random.default_rng(0)
    seeds, count = student.shape
    ratios = []
    for _ in range(DRAWS):
        chosen, rows = generator.integers(0, seeds, seeds), generator.integers(0, count, count)
        ratios.append(student[np.ix_(chosen, rows)].mean() / teacher[np.ix_(chosen, rows)].mean())
    return round(float(np.quantile(ratios, TRUSTED)), 4)


def speed(args: argparse.Namespace) -> None:
    """Sequences a second over the teacher's, in turn."""
    cells = Cells(args, "speed")
    pairs = [("teacher, seed 0", f"{name}{kind}, seed 0") for name in KEPT for kind in ("", " trimmed")]
    pairs.append(("teacher", "every other layer, triple loss"))
    for one, other in pairs:
        paths = [args.keep / name.replace(" ", "-").replace(",", "") for name in (one, other)]
        if not all(path.exists() for path in paths):
            continue
        with NativeExecutor(load(paths[0]), Deployment()) as a, NativeExecutor(load(paths[1]), Deployment()) as b:
            found = {}
            for length in LENGTHS:
                count = min(length, a.context)
                timed = ratio(lambda n=count: encode(a, n), lambda n=count: encode(b, n)).interval.inverse()
                found[f"{length} tokens"] = {"low": timed.low, "median": timed.mid, "high": timed.high}
        cells.add(f"{other} over {one}", found)


def encode(executor: NativeExecutor, count: int) -> float:
    """Seconds of many texts of so many tokens."""
    generator = np.random.default_rng(0)
    began = time.perf_counter()
    for _ in range(max(4, 1024 // count)):
        executor.encode(generator.integers(5, executor.spec.vocab_size, count).astype(np.int32))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
