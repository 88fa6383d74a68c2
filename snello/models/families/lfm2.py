"""LFM2: gated short convolutions in most layers, attention with normalized queries and keys in the others.

The block is Qwen3's but for names and what mixes positions, so a Qwen3 of which some layers convolve is an LFM2.
Dense models only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from snello.errors import SnelloError
from snello.models.families.config import MOST, Config, rope
from snello.models.families.family import Family
from snello.models.spec import (
    Attention,
    Embedding,
    FeedForward,
    Format,
    Head,
    Layer,
    Mixer,
    Norm,
    ShortConvolution,
    Spec,
    Task,
)

ROPE_BASE = 1_000_000.0
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache", "transformers_version")
ROTARY = ("rope_parameters", "rope_theta", "rope_scaling")

_STEMS: Mapping[str, str] = {
    "embedding.tokens": "model.embed_tokens",
    "layers.{i}.attention.norm": "model.layers.{i}.operator_norm",
    "layers.{i}.attention.q": "model.layers.{i}.self_attn.q_proj",
    "layers.{i}.attention.k": "model.layers.{i}.self_attn.k_proj",
    "layers.{i}.attention.v": "model.layers.{i}.self_attn.v_proj",
    "layers.{i}.attention.o": "model.layers.{i}.self_attn.out_proj",
    "layers.{i}.attention.q_norm": "model.layers.{i}.self_attn.q_layernorm",
    "layers.{i}.attention.k_norm": "model.layers.{i}.self_attn.k_layernorm",
    "layers.{i}.ffn.norm": "model.layers.{i}.ffn_norm",
    "layers.{i}.ffn.gate": "model.layers.{i}.feed_forward.w1",
    "layers.{i}.ffn.up": "model.layers.{i}.feed_forward.w3",
    "layers.{i}.ffn.down": "model.layers.{i}.feed_forward.w2",
    "norm": "model.embedding_norm",
}


def _spec(config: Config, task: Task) -> Spec:
    hidden, vocab_size = config.integer("hidden_size"), config.integer("vocab_size")
    norm = Norm(kind="rms", epsilon=config.number("norm_eps", 1e-5))
    _expect_what_is_said_twice(config, hidden)
    mixers = {
        "full_attention": _attention(config, hidden, norm),
        "conv": ShortConvolution(kernel=config.integer("conv_L_cache", 3), bias=config.flag("conv_bias", False)),
    }
    feed_forward = FeedForward(width=_width(config), activation="silu")
    return Spec(
        family="lfm2",
        task="causal-lm",
        vocab_size=vocab_size,
        hidden_size=hidden,
        max_positions=config.integer("max_position_embeddings", 128_000),
        layers=tuple(Layer(mixer=mixers[kind], feed_forward=feed_forward) for kind in _kinds(config)),
        norm=norm,
        embedding=Embedding(),
        head=Head(kind="lm", tied=config.flag("tie_embedding", config.flag("tie_word_embeddings", True))),
        default_format=Format(weights="fp32"),
        cache_format="fp32",
        bos_token=config.token("bos_token_id", vocab_size),
        eos_tokens=config.tokens("eos_token_id", vocab_size),
        pad_token=config.token("pad_token_id", vocab_size),
    )


def _expect_what_is_said_twice(config: Config, hidden: int) -> None:
    """Published configs keep the names of the library that trained them, of which Transformers reads none."""
    for key in ("block_dim", "conv_dim", "conv_dim_out"):
        config.expect(key, hidden)
    for key in ("block_use_swiglu", "use_pos_enc"):
        config.expect(key, True)
    config.expect("num_heads", config.integer("num_attention_heads", 32))
    config.expect("block_norm_eps", config.number("norm_eps", 1e-5))


def _attention(config: Config, hidden: int, norm: Norm) -> Mixer:
    heads, kv_heads = config.integer("num_attention_heads", 32), config.integer("num_key_value_heads", 8)
    if heads % kv_heads:
        message = f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads evenly"
        raise SnelloError(message, "copy or download the file again")
    head_dim = config.integer("head_dim", hidden // heads)
    turned = rope(config, head_dim, base=ROPE_BASE)
    return Attention(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, rope=turned, qk_norm=norm)


def _width(config: Config) -> int:
    """Unless it is said not to, the stated width is that of an ungated layer: two thirds of it, rounded up."""
    stated = config.integer("intermediate_size", 12288)
    width = config.integer("block_ff_dim", stated)
    factor, multiple = config.optional("block_ffn_dim_multiplier", 1.0), config.integer("block_multiple_of", 256)
    if not config.flag("block_auto_adjust_ff_dim", True):
        return width
    width = int(2 * width / 3)
    adjusted = width if factor is None else factor * width
    if adjusted > MOST:
        message = f"config.json: block_ffn_dim_multiplier makes feed-forwards {adjusted:g} wide"
        raise SnelloError(message, "copy or download the file again")
    return width if factor is None else -(-int(adjusted) // multiple) * multiple


def _kinds(config: Config) -> list[str]:
    """What mixes positions in each layer."""
    count, attending = config.integer("num_hidden_layers"), config.raw("full_attn_idxs")
    kinds = config.raw("layer_types")
    if kinds is None:
        indices = list(range(count)) if attending is None else attending
        if not isinstance(indices, list) or not all(type(index) is int and 0 <= index < count for index in indices):
            message = f"config.json: full_attn_idxs is {json.dumps(indices)[:80]}, expected layers of {count}"
            raise SnelloError(message, "copy or download the file again")
        return ["full_attention" if index in indices else "conv" for index in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count or set(kinds) - {"full_attention", "conv"}:
        expected = f"full_attention or conv for each of {count} layers"
        message = f"config.json: layer_types is {json.dumps(kinds)[:80]}, expected {expected}"
        raise SnelloError(message, "copy or download the file again")
    return kinds


def can_say(spec: Spec) -> bool:
    """Whether this Qwen3 is an LFM2 as soon as some of its layers convolve: no biases, no windows."""
    plain = all(
        isinstance(layer.mixer, ShortConvolution)
        or (isinstance(layer.mixer, Attention) and not (layer.mixer.qkv_bias or layer.mixer.out_bias))
        for layer in spec.layers
    )
    return (
        spec.family == "qwen3" and plain and all(getattr(layer.mixer, "window", None) is None for layer in spec.layers)
    )


def config_of(source: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """A config.json that says `spec`; what says no shape is the source's (a Qwen3's, or an LFM2's)."""
    attention = next(layer.mixer for layer in spec.layers if isinstance(layer.mixer, Attention))
    mixers = [layer.mixer for layer in spec.layers]
    convolution = next((mixer for mixer in mixers if isinstance(mixer, ShortConvolution)), ShortConvolution(kernel=3))
    return {
        **{key: source[key] for key in (*ROTARY, *CARRIED) if key in source},
        "architectures": list(LFM2.architectures),
        "model_type": LFM2.name,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.layers[0].feed_forward.width,
        "block_auto_adjust_ff_dim": False,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "max_position_embeddings": spec.max_positions,
        "norm_eps": spec.norm.epsilon,
        "tie_word_embeddings": spec.head.tied,
        "conv_L_cache": convolution.kernel,
        "conv_bias": convolution.bias,
        "layer_types": ["conv" if isinstance(mixer, ShortConvolution) else "full_attention" for mixer in mixers],
    }


def renamed(spec: Spec) -> Spec:
    return replace(spec, family=LFM2.name) if can_say(spec) else spec


LFM2 = Family(
    name="lfm2",
    architectures={"Lfm2ForCausalLM": "causal-lm"},
    spec=_spec,
    stems=_STEMS,
    heads={"causal-lm": {"head": "lm_head"}},
    copies={"causal-lm": {"lm_head.weight": "embedding.tokens.weight"}},
    base="model.",
    harmless=frozenset(
        [
            "block_mlp_init_scale",
            "block_out_init_scale",
            "block_use_xavier_init",
            "conv_use_xavier_init",
            "theta",  # rope_theta again
        ]
    ),
)
