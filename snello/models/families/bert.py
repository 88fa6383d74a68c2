"""BERT and DistilBERT: encoders with learned positions, a norm after each half, and three kinds of head.

Masked words (a transform, then the tied vocabulary), classification (a pooler on the first row), and pooled embeddings.
DistilBERT is the same block under other names, without token types.
"""

from __future__ import annotations

from collections.abc import Mapping

from snello.errors import SnelloError, Unsupported
from snello.models.families.config import Config
from snello.models.families.family import Family
from snello.models.spec import (
    Activation,
    Attention,
    Embedding,
    FeedForward,
    Format,
    Head,
    Layer,
    Norm,
    Spec,
    Task,
)

BERT_STEMS: Mapping[str, str] = {
    "embedding.tokens": "bert.embeddings.word_embeddings",
    "embedding.positions": "bert.embeddings.position_embeddings",
    "embedding.types": "bert.embeddings.token_type_embeddings",
    "embedding.norm": "bert.embeddings.LayerNorm",
    "layers.{i}.attention.q": "bert.encoder.layer.{i}.attention.self.query",
    "layers.{i}.attention.k": "bert.encoder.layer.{i}.attention.self.key",
    "layers.{i}.attention.v": "bert.encoder.layer.{i}.attention.self.value",
    "layers.{i}.attention.o": "bert.encoder.layer.{i}.attention.output.dense",
    "layers.{i}.attention.norm": "bert.encoder.layer.{i}.attention.output.LayerNorm",
    "layers.{i}.ffn.up": "bert.encoder.layer.{i}.intermediate.dense",
    "layers.{i}.ffn.down": "bert.encoder.layer.{i}.output.dense",
    "layers.{i}.ffn.norm": "bert.encoder.layer.{i}.output.LayerNorm",
}
DISTILBERT_STEMS: Mapping[str, str] = {
    "embedding.tokens": "distilbert.embeddings.word_embeddings",
    "embedding.positions": "distilbert.embeddings.position_embeddings",
    "embedding.norm": "distilbert.embeddings.LayerNorm",
    "layers.{i}.attention.q": "distilbert.transformer.layer.{i}.attention.q_lin",
    "layers.{i}.attention.k": "distilbert.transformer.layer.{i}.attention.k_lin",
    "layers.{i}.attention.v": "distilbert.transformer.layer.{i}.attention.v_lin",
    "layers.{i}.attention.o": "distilbert.transformer.layer.{i}.attention.out_lin",
    "layers.{i}.attention.norm": "distilbert.transformer.layer.{i}.sa_layer_norm",
    "layers.{i}.ffn.up": "distilbert.transformer.layer.{i}.ffn.lin1",
    "layers.{i}.ffn.down": "distilbert.transformer.layer.{i}.ffn.lin2",
    "layers.{i}.ffn.norm": "distilbert.transformer.layer.{i}.output_layer_norm",
}


def encoder(
    config: Config,
    family: str,
    head: Head,
    task: Task,
    *,
    hidden: int,
    layers: int,
    heads: int,
    width: int,
    activation: Activation,
    token_types: int,
    epsilon: float,
) -> Spec:
    """The block stack that both share."""
    if hidden % heads:
        message = f"config.json: hidden size {hidden} does not divide into {heads} attention heads"
        raise SnelloError(message, "copy or download the file again")
    vocab_size, positions = config.integer("vocab_size"), config.integer("max_position_embeddings", 512)
    attention = Attention(
        num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads, causal=False, qkv_bias=True, out_bias=True
    )
    feed_forward = FeedForward(width=width, activation=activation, gated=False, bias=True)
    return Spec(
        family=family,
        task=task,
        vocab_size=vocab_size,
        hidden_size=hidden,
        max_positions=positions,
        layers=(Layer(mixer=attention, feed_forward=feed_forward, norms="post"),) * layers,
        norm=Norm(kind="layer", epsilon=epsilon, bias=True),
        embedding=Embedding(learned_positions=positions, token_types=token_types, norm=True),
        head=head,
        default_format=Format(weights="fp32"),
        cache_format="fp32",
        final_norm=False,
        bos_token=config.token("bos_token_id", vocab_size),
        eos_tokens=config.tokens("eos_token_id", vocab_size),
        pad_token=config.token("pad_token_id", vocab_size),
    )


def _head(config: Config, task: Task, activation: Activation, pooler: Activation) -> Head:
    tied = config.flag("tie_word_embeddings", True)
    if task == "masked-lm":
        return Head(kind="lm", tied=tied, bias=True, transform=activation)
    if task == "sequence-classification":
        return Head(kind="classify", bias=True, pooler=pooler, labels=classifier_labels(config))
    return Head(kind="embed", pooling="mean")


def classifier_labels(config: Config) -> tuple[str, ...]:
    """Label names in the order of their ids; two unnamed ones where the config is silent, as in Transformers."""
    named = config.raw("id2label")
    if named is None:
        count = config.integer("num_labels", 2)
        return tuple(f"LABEL_{index}" for index in range(count))
    if not isinstance(named, dict) or sorted(named, key=str) != sorted(map(str, range(len(named)))):
        message = "config.json: id2label must name each label id from 0 on"
        raise SnelloError(message, 'number them "0", "1" and so on, or remove id2label')
    return tuple(str(named[str(index)]) for index in range(len(named)))


def _bert(config: Config, task: Task) -> Spec:
    config.expect("position_embedding_type", "absolute")
    activation = config.activation("hidden_act")
    return encoder(
        config,
        "bert",
        _head(config, task, activation, "tanh"),
        task,
        hidden=config.integer("hidden_size"),
        layers=config.integer("num_hidden_layers"),
        heads=config.integer("num_attention_heads"),
        width=config.integer("intermediate_size"),
        activation=activation,
        token_types=config.integer("type_vocab_size", 2),
        epsilon=config.number("layer_norm_eps", 1e-12),
    )


def _distilbert(config: Config, task: Task) -> Spec:
    activation = config.activation("activation")
    if activation not in ("gelu", "relu"):
        raise Unsupported(f"config.json: DistilBERT with activation {activation}", "supported: gelu, relu")
    # The masked-word head applies `activation` too; DistilBERT's classifier is always ReLU, its norms always 1e-12.
    return encoder(
        config,
        "distilbert",
        _head(config, task, activation, "relu"),
        task,
        hidden=config.integer("dim"),
        layers=config.integer("n_layers"),
        heads=config.integer("n_heads"),
        width=config.integer("hidden_dim"),
        activation=activation,
        token_types=0,
        epsilon=1e-12,
    )


BERT = Family(
    name="bert",
    architectures={
        "BertForMaskedLM": "masked-lm",
        "BertForPreTraining": "masked-lm",
        "BertForSequenceClassification": "sequence-classification",
        "BertModel": "embedding",
    },
    spec=_bert,
    stems=BERT_STEMS,
    heads={
        "masked-lm": {
            "head.transform": "cls.predictions.transform.dense",
            "head.transform.norm": "cls.predictions.transform.LayerNorm",
            "head": "cls.predictions.decoder",
        },
        "sequence-classification": {"head.pooler": "bert.pooler.dense", "head": "classifier"},
    },
    parameters={"masked-lm": {"head.bias": "cls.predictions.bias"}},
    copies={
        "masked-lm": {
            "cls.predictions.decoder.weight": "embedding.tokens.weight",
            "cls.predictions.decoder.bias": "head.bias",
        }
    },
    base="bert.",
    renamed=((".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta")),
    ignored=(
        "bert.embeddings.position_ids",
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    ),
    harmless=frozenset(
        [
            "attention_probs_dropout_prob",
            "classifier_dropout",
            "directionality",
            "hidden_dropout_prob",
            "pooler_fc_size",
            "pooler_num_attention_heads",
            "pooler_num_fc_layers",
            "pooler_size_per_head",
            "pooler_type",
            "num_labels",
        ]
    ),
)
DISTILBERT = Family(
    name="distilbert",
    architectures={
        "DistilBertForMaskedLM": "masked-lm",
        "DistilBertForSequenceClassification": "sequence-classification",
        "DistilBertModel": "embedding",
    },
    spec=_distilbert,
    stems=DISTILBERT_STEMS,
    heads={
        "masked-lm": {
            "head.transform": "vocab_transform",
            "head.transform.norm": "vocab_layer_norm",
            "head": "vocab_projector",
        },
        "sequence-classification": {"head.pooler": "pre_classifier", "head": "classifier"},
    },
    copies={"masked-lm": {"vocab_projector.weight": "embedding.tokens.weight"}},
    base="distilbert.",
    ignored=("distilbert.embeddings.position_ids",),
    harmless=frozenset(["num_labels", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds", "tie_weights_"]),
)
