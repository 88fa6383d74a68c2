"""An encoder seen as a classifier: its body, a head for new labels, its own head where it knows them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from snello.errors import Unsupported
from snello.models import load
from snello.models.classifier import as_classifier
from snello.models.reference import Reference
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from tests.checkpoints import make_checkpoint

TOKENS = torch.arange(3, 25)[None]


def test_before_anything_is_learned_all_labels_are_alike(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path / "bert", "bert-mlm"))
    found = as_classifier(model, ["bad", "good", "so so"])
    assert found.fresh == {"head.weight", "head.bias", "head.pooler.weight", "head.pooler.bias"}
    reference = Reference.from_model(found.model)
    assert not reference(TOKENS).any()
    body = Reference.from_model(model).hidden(TOKENS)
    assert torch.equal(reference.hidden(TOKENS), body)
    assert torch.allclose(reference.head.features(body), torch.tanh(body[:, 0]), atol=1e-6)


def test_a_head_that_knows_these_labels_stays(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path / "bert", "bert-classify"))
    labels = model.spec.head.labels
    found = as_classifier(model, sorted(labels, reverse=True))
    assert not found.fresh and found.model.spec.head.labels == labels
    logits = Reference.from_model(model)(TOKENS)
    assert torch.equal(Reference.from_model(found.model)(TOKENS), logits) and logits.any()


def test_another_task_gets_another_last_layer_and_keeps_the_pooler(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path / "bert", "bert-classify"))
    found = as_classifier(model, ["no", "yes"])
    assert found.fresh == {"head.weight", "head.bias"} and found.model.spec.head.labels == ("no", "yes")
    pooler = model.weights.values("head.pooler.weight")
    assert np.array_equal(found.model.weights.values("head.pooler.weight"), pooler)


def test_what_has_no_such_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="decoder"):
        as_classifier(load(make_checkpoint(tmp_path / "llama", "llama")), ["no", "yes"])
    bert = load(make_checkpoint(tmp_path / "bert", "bert-mlm"))
    few = Quantize(weights="int8").apply(bert, Context(output=tmp_path / "few"))
    with pytest.raises(Unsupported, match="quantized"):
        as_classifier(few, ["no", "yes"])
