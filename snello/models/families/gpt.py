"""GPT-2, OPT and GPT-NeoX (Pythia): decoders whose norms take the mean away and whose linears have biases.

All have a feed-forward of two linears. GPT-2 and OPT learn their positions; GPT-NeoX rotates the first part of each
head and, in most models, adds both halves of a block at once. GPT-2 stores (inputs, outputs) and q, k, v in one
matrix, GPT-NeoX deals that matrix head by head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from snello.errors import SnelloError
from snello.models.families.config import Config, rope
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
    Rope,
    Spec,
    Task,
)

OPT_OFFSET = 2  # rows of OPT's table of positions that stand before position 0
OPT_EPSILON = 1e-5  # never said by a config
NEOX_FRACTION = 0.25  # of each head that GPT-NeoX rotates where a config is silent

GPT2_STEMS: Mapping[str, str] = {
    "embedding.tokens": "transformer.wte",
    "embedding.positions": "transformer.wpe",
    "layers.{i}.attention.norm": "transformer.h.{i}.ln_1",
    "layers.{i}.attention.o": "transformer.h.{i}.attn.c_proj",
    "layers.{i}.ffn.norm": "transformer.h.{i}.ln_2",
    "layers.{i}.ffn.up": "transformer.h.{i}.mlp.c_fc",
    "layers.{i}.ffn.down": "transformer.h.{i}.mlp.c_proj",
    "norm": "transformer.ln_f",
}
OPT_STEMS: Mapping[str, str] = {
    "embedding.tokens": "model.decoder.embed_tokens",
    "embedding.positions": "model.decoder.embed_positions",
    "layers.{i}.attention.norm": "model.decoder.layers.{i}.self_attn_layer_norm",
    "layers.{i}.attention.q": "model.decoder.layers.{i}.self_attn.q_proj",
    "layers.{i}.attention.k": "model.decoder.layers.{i}.self_attn.k_proj",
    "layers.{i}.attention.v": "model.decoder.layers.{i}.self_attn.v_proj",
    "layers.{i}.attention.o": "model.decoder.layers.{i}.self_attn.out_proj",
    "layers.{i}.ffn.norm": "model.decoder.layers.{i}.final_layer_norm",
    "layers.{i}.ffn.up": "model.decoder.layers.{i}.fc1",
    "layers.{i}.ffn.down": "model.decoder.layers.{i}.fc2",
    "norm": "model.decoder.final_layer_norm",
}
NEOX_STEMS: Mapping[str, str] = {
    "embedding.tokens": "gpt_neox.embed_in",
    "layers.{i}.attention.norm": "gpt_neox.layers.{i}.input_layernorm",
    "layers.{i}.attention.o": "gpt_neox.layers.{i}.attention.dense",
    "layers.{i}.ffn.norm": "gpt_neox.layers.{i}.post_attention_layernorm",
    "layers.{i}.ffn.up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
    "layers.{i}.ffn.down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
    "norm": "gpt_neox.final_layer_norm",
}
QKV = ("layers.{i}.attention.q", "layers.{i}.attention.k", "layers.{i}.attention.v")


def decoder(
    config: Config,
    family: str,
    *,
    hidden: int,
    layers: int,
    heads: int,
    width: int,
    activation: Activation,
    positions: int,
    epsilon: float,
    embedding: Embedding,
    tied: bool,
    rope: Rope | None = None,
    norms: Literal["pre", "post", "parallel"] = "pre",
    attention_bias: bool = True,
    mlp_bias: bool = True,
) -> Spec:
    """The block stack that all three share."""
    vocab_size = config.integer("vocab_size")
    attention = Attention(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=_head_dim(hidden, heads),
        rope=rope,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
    )
    feed_forward = FeedForward(width=width, activation=activation, gated=False, bias=mlp_bias)
    return Spec(
        family=family,
        task="causal-lm",
        vocab_size=vocab_size,
        hidden_size=hidden,
        max_positions=positions,
        layers=(Layer(mixer=attention, feed_forward=feed_forward, norms=norms),) * layers,
        norm=Norm(kind="layer", epsilon=epsilon, bias=True),
        embedding=embedding,
        head=Head(kind="lm", tied=config.flag("tie_word_embeddings", tied)),
        default_format=Format(weights="fp32"),
        cache_format="fp32",
        final_norm=norms != "post",
        bos_token=config.token("bos_token_id", vocab_size),
        eos_tokens=config.tokens("eos_token_id", vocab_size),
        pad_token=config.token("pad_token_id", vocab_size),
    )


def _head_dim(hidden: int, heads: int) -> int:
    if hidden % heads:
        message = f"config.json: hidden size {hidden} does not divide into {heads} attention heads"
        raise SnelloError(message, "copy or download the file again")
    return hidden // heads


def _gpt2(config: Config, task: Task) -> Spec:
    hidden, positions = config.integer("n_embd"), config.integer("n_positions", 1024)
    spec = decoder(
        config,
        "gpt2",
        hidden=hidden,
        layers=config.integer("n_layer"),
        heads=config.integer("n_head"),
        width=config.integer("n_inner", 4 * hidden),
        activation=config.activation("activation_function"),
        positions=positions,
        epsilon=config.number("layer_norm_epsilon", 1e-5),
        embedding=Embedding(learned_positions=positions),
        tied=True,
    )
    return dataclasses.replace(spec, layers=_scaled(config, spec.layers))


def _scaled(config: Config, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """GPT-2's two settings of the scores' scale; unset is the usual one."""
    usual = config.flag("scale_attn_weights", True)
    by_depth = config.flag("scale_attn_by_inverse_layer_idx", False)
    if usual and not by_depth:
        return layers
    scaled = []
    for index, layer in enumerate(layers):
        assert isinstance(layer.mixer, Attention)
        scale = (layer.mixer.score_scale if usual else 1.0) / (index + 1 if by_depth else 1)
        scaled.append(dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, scale=scale)))
    return tuple(scaled)


def _opt(config: Config, task: Task) -> Spec:
    hidden, positions = config.integer("hidden_size"), config.integer("max_position_embeddings", 2048)
    config.expect("word_embed_proj_dim", hidden)
    config.expect("layer_norm_elementwise_affine", True)
    bias = config.flag("enable_bias", True)
    spec = decoder(
        config,
        "opt",
        hidden=hidden,
        layers=config.integer("num_hidden_layers"),
        heads=config.integer("num_attention_heads"),
        width=config.integer("ffn_dim"),
        activation=config.activation("activation_function"),
        positions=positions,
        epsilon=OPT_EPSILON,
        embedding=Embedding(learned_positions=positions + OPT_OFFSET, position_offset=OPT_OFFSET),
        tied=True,
        norms="pre" if config.flag("do_layer_norm_before", True) else "post",
        attention_bias=bias,
        mlp_bias=bias,
    )
    removed = config.flag("_remove_final_layer_norm", False)
    return dataclasses.replace(spec, final_norm=spec.final_norm and not removed)


def _gpt_neox(config: Config, task: Task) -> Spec:
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    rotary = rope(
        config,
        _head_dim(hidden, heads),
        fraction=NEOX_FRACTION,
        base_key="rotary_emb_base",
        fraction_key="rotary_pct",
    )
    return decoder(
        config,
        "gpt_neox",
        hidden=hidden,
        layers=config.integer("num_hidden_layers"),
        heads=heads,
        width=config.integer("intermediate_size"),
        activation=config.activation("hidden_act"),
        positions=config.integer("max_position_embeddings", 2048),
        epsilon=config.number("layer_norm_eps", 1e-5),
        embedding=Embedding(),
        tied=False,
        rope=rotary,
        norms="parallel" if config.flag("use_parallel_residual", True) else "pre",
        attention_bias=config.flag("attention_bias", True),
    )


GPT2 = Family(
    name="gpt2",
    architectures={"GPT2LMHeadModel": "causal-lm"},
    spec=_gpt2,
    stems=GPT2_STEMS,
    heads={"causal-lm": {"head": "lm_head"}},
    copies={"causal-lm": {"lm_head.weight": "embedding.tokens.weight"}},
    fused={"transformer.h.{i}.attn.c_attn": QKV},
    transposed=frozenset(
        f"transformer.h.{{i}}.{part}" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ),
    base="transformer.",
    ignored=("transformer.h.{i}.attn.bias", "transformer.h.{i}.attn.masked_bias"),
    harmless=frozenset(
        [
            "attn_pdrop",
            "embd_pdrop",
            "n_ctx",  # n_positions' older name
            "reorder_and_upcast_attn",  # scores in FP32, as they always are here
            "resid_pdrop",
            "summary_activation",
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
        ]
    ),
)
OPT = Family(
    name="opt",
    architectures={"OPTForCausalLM": "causal-lm"},
    spec=_opt,
    stems=OPT_STEMS,
    heads={"causal-lm": {"head": "lm_head"}},
    copies={"causal-lm": {"lm_head.weight": "embedding.tokens.weight"}},
    base="model.",
    harmless=frozenset(["activation_dropout", "init_std", "layerdrop"]),
)
GPT_NEOX = Family(
    name="gpt_neox",
    architectures={"GPTNeoXForCausalLM": "causal-lm"},
    spec=_gpt_neox,
    stems=NEOX_STEMS,
    heads={"causal-lm": {"head": "embed_out"}},
    copies={"causal-lm": {"embed_out.weight": "embedding.tokens.weight"}},
    fused={"gpt_neox.layers.{i}.attention.query_key_value": QKV},
    by_head=frozenset(["gpt_neox.layers.{i}.attention.query_key_value"]),
    base="gpt_neox.",
    renamed=(("embed_out.weight", "lm_head.weight"),),  # files say embed_out, some say what the modules are called
    ignored=(
        "gpt_neox.layers.{i}.attention.bias",
        "gpt_neox.layers.{i}.attention.masked_bias",
        "gpt_neox.layers.{i}.attention.rotary_emb.inv_freq",
    ),
    harmless=frozenset(["classifier_dropout", "hidden_dropout"]),
)
