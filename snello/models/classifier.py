"""An encoder seen as a classifier: the same body, and a head for these labels. Numpy alone.

The result has the form of Transformers' `...ForSequenceClassification`: the first row goes through the pooler (BERT's,
DistilBERT's `pre_classifier`) and a linear gives a logit for each label. What the checkpoint holds of that is taken. A
pooler that is not there begins as the identity and the last linear as zeros: before anything is learned, all labels are
equally likely.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from snello.errors import SnelloError, Unsupported
from snello.models.checkpoint import bind, read_stored
from snello.models.families import FAMILIES
from snello.models.families.family import names_for
from snello.models.families.resolve import resolve
from snello.models.files import read_json
from snello.models.model import Floats, Loadable, Model, StoredTensor
from snello.models.parameters import parameter_shapes
from snello.models.spec import BITS, Task

HEAD, POOLER = ("head.weight", "head.bias"), ("head.pooler.weight", "head.pooler.bias")
TASK: Task = "sequence-classification"


@dataclass(frozen=True)
class Classifier:
    """`fresh`: the parameters of the head that nobody has trained yet. `edits` of config.json make it one."""

    model: Model
    fresh: frozenset[str]
    edits: dict[str, Any]


def as_classifier(model: Model, labels: Sequence[str]) -> Classifier:
    """`model` with a head for `labels`, in their order; its own head where it tells exactly these apart already.

    Raises:
        Unsupported: it is no encoder, of a family without such a head, or quantized.
    """
    check_encoder(model)
    family = FAMILIES[model.spec.family]
    named = next(name for name, task in family.architectures.items() if task == TASK)
    knows = model.spec.task == TASK and set(model.spec.head.labels) == set(labels)
    ordered = list(model.spec.head.labels if knows else labels)
    edits = {
        "architectures": [named],
        "id2label": {str(number): label for number, label in enumerate(ordered)},
        "label2id": {label: number for number, label in enumerate(ordered)},
        "problem_type": "single_label_classification",
    }
    _, spec = resolve(read_json(model.path / "config.json") | edits, task=TASK, generation=model.generation)
    found: dict[str, Loadable] = dict(read_stored(model.path)[0])
    sources = names_for(family, spec, has_base=any(name.startswith(family.base) for name in found)).sources
    fresh = set()
    for name in (*POOLER, *HEAD):
        stored = sources[name].names[0]
        if stored not in found or (name in HEAD and not knows):
            found[stored] = StoredTensor.of(_beginning(name, parameter_shapes(spec)[name]))
            fresh.add(name)
    spec, weights = bind(family, spec, found, model.path)
    classifier = dataclasses.replace(model, spec=spec, weights=weights, files=())
    return Classifier(classifier, frozenset(fresh), edits)


def check_encoder(model: Model) -> None:
    """Whether this model can be given a head for labels; cheap, no weights are read.

    Raises:
        Unsupported: it cannot.
    """
    spec = model.spec
    if spec.causal:
        raise Unsupported(f"{model.name} is a decoder", "a label is an answer there, not a head")
    if TASK not in FAMILIES[spec.family].tasks:
        raise Unsupported(f"Transformers has no classifier of the family {spec.family}", "BERT and DistilBERT have one")
    formats = [spec.default_format, *dict(spec.formats).values()]
    if any(BITS[each.weights] < 16 for each in formats):
        raise Unsupported(f"{model.name} is quantized", "teach the original its labels, then quantize it")
    if not (model.path / "config.json").exists():
        raise SnelloError(f"{model.name} came without a config.json", "start from a Hugging Face folder")


def _beginning(name: str, shape: tuple[int, ...]) -> Floats:
    found = np.eye(*shape, dtype=np.float32) if name == "head.pooler.weight" else np.zeros(shape, np.float32)
    return np.asarray(found, np.float32)
