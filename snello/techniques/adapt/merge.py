"""An adapter added to the weights of its base: an ordinary checkpoint, which costs nothing more to run.

A base of fewer bits is taken as what its weights mean, and the result has the type that the base was made from: to
quantize it again is a step of its own, and judged against this one.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from snello.errors import Unsupported
from snello.models import load
from snello.models.adapter import Adapter
from snello.models.classifier import as_classifier
from snello.models.model import Floats, Model
from snello.models.plain_folder import check_free, shaped_config, write_plain_folder
from snello.models.spec import CacheFormat


def merge(model: Model, adapter: Adapter, output: Path) -> Model:
    """Writes `model` with `adapter` in it at `output` and loads it.

    Raises:
        Unsupported: the adapter is a prompt, which changes no weight.
    """
    if adapter.prompt is not None:
        raise Unsupported("a prompt changes no weight: it cannot be merged", "run it beside the model: --adapter DIR")
    edits = None
    if adapter.labels:
        classifier = as_classifier(model, adapter.labels)
        model, edits, digest = classifier.model, classifier.edits, model.digest
    else:
        digest = model.digest
    kept = model.spec.default_format.weights
    cache: CacheFormat = kept if kept in ("fp32", "fp16", "bf16") else model.spec.cache_format
    spec = dataclasses.replace(model.spec, formats=(), cache_format=cache)
    check_free(output)
    shaped_config(model, spec, edits)  # what no config can say fails before a weight is read

    def values(name: str) -> Floats:
        if name in adapter.saved:
            return adapter.saved[name]
        linear = name.removesuffix(".weight")
        found = model.weights.values(name)
        return adapter.merged(linear, found) if linear in adapter.factors else found

    entry = {"technique": "adapt", "merged": True, "rank": adapter.rank, "base": digest, **adapter.facts}
    write_plain_folder(output, spec, model, (*model.history, entry), values, edits=edits)
    return load(output)
