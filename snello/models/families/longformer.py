"""Longformer: BERT's block whose rows see a window, and a first row that sees everything by projections of its own.

Transformers leaves it to the caller which tokens are global; here it is the first one, [CLS], whatever the task: it is
what classifiers read, and the only one that every text has. `attention_window` counts both sides.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from snello.errors import SnelloError
from snello.models.families.bert import BERT, BERT_STEMS, classifier_labels, encoder
from snello.models.families.config import Config
from snello.models.families.family import Family
from snello.models.spec import Attention, Head, Layer, Spec, Task

STEMS: Mapping[str, str] = {
    **{canonical: stored.replace("bert.", "longformer.", 1) for canonical, stored in BERT_STEMS.items()},
    "layers.{i}.attention.global_q": "longformer.encoder.layer.{i}.attention.self.query_global",
    "layers.{i}.attention.global_k": "longformer.encoder.layer.{i}.attention.self.key_global",
    "layers.{i}.attention.global_v": "longformer.encoder.layer.{i}.attention.self.value_global",
}


def _longformer(config: Config, task: Task) -> Spec:
    count = config.integer("num_hidden_layers")
    spec = encoder(
        config,
        "longformer",
        _head(config, task),
        task,
        hidden=config.integer("hidden_size"),
        layers=count,
        heads=config.integer("num_attention_heads"),
        width=config.integer("intermediate_size"),
        activation=config.activation("hidden_act"),
        token_types=config.integer("type_vocab_size", 2),
        epsilon=config.number("layer_norm_eps", 1e-12),
    )
    if spec.pad_token is None:
        raise SnelloError("config.json lacks pad_token_id", "Longformer counts its positions from behind it")
    offset = spec.pad_token + 1  # as in RoBERTa: padding has a position of its own, the text begins behind it
    windows = [_row_window(window) for window in _attention_windows(config, count)]
    return dataclasses.replace(
        spec,
        max_positions=spec.max_positions - offset,
        embedding=dataclasses.replace(spec.embedding, position_offset=offset),
        layers=tuple(_near(layer, window) for layer, window in zip(spec.layers, windows, strict=True)),
    )


def _near(layer: Layer, window: int) -> Layer:
    assert isinstance(layer.mixer, Attention)
    return dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, window=window, sinks=1))


def _row_window(attention_window: int) -> int:
    """`Attention.window` of a config's: half of it to each side, and the row itself."""
    return attention_window // 2 + 1


def _attention_windows(config: Config, count: int) -> list[int]:
    stated = config.raw("attention_window")
    windows = [512 if stated is None else stated] * count if not isinstance(stated, list) else stated
    if len(windows) != count or not all(type(window) is int and window > 0 and window % 2 == 0 for window in windows):
        expected = f"an even number, or one for each of {count} layers"
        message = f"config.json: attention_window is {json.dumps(stated)[:80]}, expected {expected}"
        raise SnelloError(message, "copy or download the file again")
    return windows


def _head(config: Config, task: Task) -> Head:
    """The masked-word head is always GELU, the classifier's first linear always tanh."""
    tied = config.flag("tie_word_embeddings", True)
    if task == "masked-lm":
        return Head(kind="lm", tied=tied, bias=True, transform="gelu")
    if task == "sequence-classification":
        return Head(kind="classify", bias=True, pooler="tanh", labels=classifier_labels(config))
    return Head(kind="embed", pooling="mean")


LONGFORMER = Family(
    name="longformer",
    architectures={
        "LongformerForMaskedLM": "masked-lm",
        "LongformerForSequenceClassification": "sequence-classification",
        "LongformerModel": "embedding",
    },
    spec=_longformer,
    stems=STEMS,
    heads={
        "masked-lm": {
            "head.transform": "lm_head.dense",
            "head.transform.norm": "lm_head.layer_norm",
            "head": "lm_head.decoder",
        },
        "sequence-classification": {"head.pooler": "classifier.dense", "head": "classifier.out_proj"},
    },
    parameters={"masked-lm": {"head.bias": "lm_head.bias"}},
    copies={
        "masked-lm": {
            "lm_head.decoder.weight": "embedding.tokens.weight",
            "lm_head.decoder.bias": "head.bias",
        }
    },
    base="longformer.",
    ignored=(
        "longformer.embeddings.position_ids",
        "longformer.pooler.dense.weight",
        "longformer.pooler.dense.bias",
    ),
    harmless=BERT.harmless | {"onnx_export", "ignore_attention_mask"},
)
