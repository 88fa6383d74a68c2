"""Writes a model with fewer words: rows of the embedding and the head gathered, ids renumbered everywhere.

Everything else is copied tensor by tensor; the source stays memory-mapped and untouched.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from snello.errors import SnelloError, Unsupported
from snello.models import load
from snello.models.files import read_json, read_json_if_there
from snello.models.model import Floats
from snello.models.plain_folder import check_free, shaped_config, write_plain_folder
from snello.techniques.calibration import check_windows
from snello.techniques.trim import named
from snello.techniques.trim.rewrite import UNSAID, named_beside, named_in, renumbered, tokenizer_table, write_tokenizer
from snello.techniques.trim.vocabulary import Vocabulary, choose

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.techniques.base import Context
    from snello.techniques.trim import Trim


def trim(options: Trim, model: Model, context: Context) -> Model:
    planned = options.plan(model.spec)
    check_windows(model, context.windows)
    check_free(context.output)
    if not (model.path / "config.json").exists():
        raise Unsupported(f"{model.name} came without a config.json", "start from a Hugging Face folder")
    config = {**dict.fromkeys(UNSAID), **read_json(model.path / "config.json")}
    generation = read_json_if_there(model.path / "generation_config.json")
    vocabulary = Vocabulary(json.loads(model.tokenizer.backend.to_str()))
    context.progress("trim: tokens of the text", 0.0)
    counts = np.zeros(model.spec.vocab_size, np.int64)
    for window in context.windows:
        counts += np.bincount(window, minlength=len(counts))
    _check_rows(vocabulary, len(counts))
    settings = read_json_if_there(model.path / "tokenizer_config.json")
    named_ids = named_in(config) | named_in(generation) | named_beside(vocabulary.table, settings)
    needed = {number for number in named_ids if 0 <= number < len(counts)}
    kept = choose(vocabulary, counts, planned.vocab_size, options.min_count, needed, named(model.spec))
    new = {old: place for place, old in enumerate(kept)}
    edits = renumbered(config, new) | {"vocab_size": len(kept)}
    shaped_config(model, planned, edits, renumbered(generation, new))
    entry = {
        "technique": "trim",
        "options": dataclasses.asdict(options),
        "seed": context.seed,
        "tokens": [model.spec.vocab_size, len(kept)],
    }

    def small_files(folder: Path) -> None:
        table = tokenizer_table(vocabulary, new)
        write_tokenizer(model.path, folder, table, new, model.tokenizer.special_tokens)

    rows = np.array(kept)
    write_plain_folder(
        context.output,
        planned,
        model,
        (*model.history, entry),
        lambda name: _values(model, name, rows, context),
        edits=edits,
        generation=renumbered(generation, new),
        small_files=small_files,
    )
    return load(context.output)


def _values(model: Model, name: str, rows: np.ndarray[Any, Any], context: Context) -> Floats:
    context.progress(f"trim: {name}", 0.5)
    values = model.weights.values(name)
    of_words = name == "embedding.tokens.weight" or _counts_words(model, name)
    return np.ascontiguousarray(values[rows]) if of_words else values


def _counts_words(model: Model, name: str) -> bool:
    """Whether a head's parameter has a row a word: not a classifier's, nor the layers in front of the logits."""
    return model.spec.head.kind == "lm" and name in ("head.weight", "head.bias")


def _check_rows(vocabulary: Vocabulary, rows: int) -> None:
    largest = max([*vocabulary.tokens, *vocabulary.added])
    if largest >= rows:
        raise SnelloError(
            f"the tokenizer knows token {largest}, the model has rows for {rows}",
            "do the tokenizer and the model belong together?",
        )
