"""Which text judges which model: reads what the user gave, or has the original write its own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from snello.errors import SnelloError
from snello.measure import documents, text
from snello.measure.documents import Document
from snello.measure.rulers import Ruler, ruler_for
from snello.measure.runner import Runner
from snello.measure.text import Limits, Source, Texts


def read_documents(paths: Sequence[Path], model: Any) -> list[list[Document]]:
    """The documents of each `--text`, read as this kind of model needs them.

    Raises:
        SnelloError: a text cannot be read, or there is no tokenizer to read it with.
    """
    model.tokenizer  # noqa: B018 - opened late, and needed by every text
    return [_read(path, model) for path in paths]


def _read(path: Path, model: Any) -> list[Document]:
    task = model.spec.task
    if task == "sequence-classification":
        return documents.read_labelled(path)
    if task == "embedding":
        return documents.read_labelled(path) if path.suffix == ".tsv" else documents.read_lines(path)
    return documents.read_source(path, end_token(model))


def end_token(model: Any) -> str | None:
    """The text of the model's end token, if its tokenizer can say it."""
    for token in model.spec.eos_tokens:
        spelled = model.tokenizer.decode([token], skip_special=False)
        if len(spelled.strip()) >= 3:
            return str(spelled)
    return None


def ruler_of(model: Any, sources: Sequence[Sequence[Document]]) -> Ruler:
    """The yardstick for this model and text."""
    pairs = any(document.other is not None for source in sources for document in source)
    mask = model.tokenizer.mask_token if model.spec.task == "masked-lm" else None
    return ruler_for(model.spec, pairs=pairs, mask_token=mask)


def cut(sources: Sequence[Sequence[Document]], model: Any, *, seed: int, limits: Limits, self_written: bool) -> Texts:
    """All sources cut in three; blocks that share 13 tokens with any calibration text are dropped."""
    spec, encode = model.spec, model.tokenizer.encode
    separator = spec.eos_tokens[0] if spec.eos_tokens else None
    parts: list[Source] = []
    for source in sources:
        if spec.task in ("causal-lm", "masked-lm"):
            trained = spec.max_positions
            part = text.cut_text(source, encode, trained=trained, seed=seed, limits=limits, separator=separator)
        else:
            part = text.cut_examples(source, encode, longest=spec.max_positions, seed=seed, limits=limits)
        parts.append(part)
    shared = text.drop_shared(parts) if len(parts) > 1 else tuple(parts)
    every = [document for source in sources for document in source]
    for part in shared:
        if not part.select or not part.proof:
            hint = "give a longer text: every cut needs windows of at least 80 tokens"
            if part.dropped_blocks:
                repeats = f"{part.dropped_blocks} blocks share 13 tokens in a row with the calibration part"
                hint = f"give another text: {repeats}"
            raise SnelloError(f"{part.name} leaves nothing to score after cutting", hint, exit_code=4)
    return Texts(sources=unique_names(shared), sha256=text.fingerprint(every, seed, limits), self_written=self_written)


def uncut(sources: Sequence[Sequence[Document]], model: Any, *, longest: int, seed: int, most: int) -> Texts:
    """All of each source as `proof`, in windows of at most `longest` tokens: to judge what was made elsewhere."""
    spec, encode = model.spec, model.tokenizer.encode
    separator = spec.eos_tokens[0] if spec.eos_tokens else None
    in_windows = spec.task in ("causal-lm", "masked-lm")
    parts = [
        text.uncut(source, encode, causal=in_windows, longest=longest, seed=seed, most=most, separator=separator)
        for source in sources
    ]
    for part in parts:
        if not part.proof:
            hint = "give a longer text: it is read in windows of at least 80 tokens"
            raise SnelloError(f"{part.name} leaves nothing to score", hint, exit_code=4)
    every = [document for source in sources for document in source]
    sha256 = text.fingerprint(every, seed, Limits(calib=0, select=0, proof=most))
    return Texts(sources=unique_names(parts), sha256=sha256)


def reading_speed(runner: Runner, length: int, seed: int) -> float:
    """Tokens a second when reading a window, the second time."""
    tokens = np.random.default_rng(seed).integers(0, runner.spec.vocab_size, length, dtype=np.int32)
    ask = runner.score if runner.spec.causal else runner.encode
    ask(tokens[: max(2, length // 8)])
    begin = time.perf_counter()
    ask(tokens)
    return float(length / max(time.perf_counter() - begin, 1e-9))


def unique_names(sources: Sequence[Source]) -> tuple[Source, ...]:
    """Two texts of one file name in different folders are told apart."""
    seen: dict[str, int] = {}
    renamed = []
    for source in sources:
        count = seen[source.name] = seen.get(source.name, 0) + 1
        if count > 1:
            name = f"{source.name} ({count})"
            select = tuple(dataclasses.replace(block, source=name) for block in source.select)
            proof = tuple(dataclasses.replace(block, source=name) for block in source.proof)
            source = dataclasses.replace(source, name=name, select=select, proof=proof)
        renamed.append(source)
    return tuple(renamed)
