"""Llama and the families that differ from it by a few settings: Mistral, Qwen2, Qwen3.

All are the same block (RMS norm before each half, rotary positions, grouped queries, a gated feed-forward). What
differs is data: which linears have biases, whether queries and keys are normalized per head, and which layers see
only a window.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace

from snello.errors import SnelloError
from snello.models.families.config import Config, rope
from snello.models.families.family import Family
from snello.models.spec import Attention, Embedding, FeedForward, Format, Head, Layer, Norm, Rope, Spec, Task

STEMS: Mapping[str, str] = {
    "embedding.tokens": "model.embed_tokens",
    "layers.{i}.attention.norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.attention.q": "model.layers.{i}.self_attn.q_proj",
    "layers.{i}.attention.k": "model.layers.{i}.self_attn.k_proj",
    "layers.{i}.attention.v": "model.layers.{i}.self_attn.v_proj",
    "layers.{i}.attention.o": "model.layers.{i}.self_attn.o_proj",
    "layers.{i}.attention.q_norm": "model.layers.{i}.self_attn.q_norm",
    "layers.{i}.attention.k_norm": "model.layers.{i}.self_attn.k_norm",
    "layers.{i}.ffn.norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.ffn.gate": "model.layers.{i}.mlp.gate_proj",
    "layers.{i}.ffn.up": "model.layers.{i}.mlp.up_proj",
    "layers.{i}.ffn.down": "model.layers.{i}.mlp.down_proj",
    "norm": "model.norm",
}
WINDOW, WINDOW_LAYERS = 4096, 28  # where a config is silent: how far layers with a window see, and the first of Qwen's
# Tables that a model recomputes from its config.
IGNORED = ("model.rotary_emb.inv_freq", "model.layers.{i}.self_attn.rotary_emb.inv_freq")


def decoder(
    config: Config,
    family: str,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    head_dim: int | None = None,
    windows: tuple[int | None, ...] | None = None,
    feed_forwards: tuple[FeedForward, ...] | None = None,
    rotary: Rope | None = None,
    activation: str = "hidden_act",
    epsilon: float = 1e-6,
    tied: bool = False,
) -> Spec:
    """A Llama block stack with a family's own settings: `activation` is a key of the config, the last two defaults.

    `windows` and `feed_forwards` are one per layer.
    """
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    vocab_size, count = config.integer("vocab_size"), config.integer("num_hidden_layers")
    norm = Norm(kind="rms", epsilon=config.number("rms_norm_eps", epsilon))
    head_dim = config.integer("head_dim", head_dim or hidden // heads)
    attention = Attention(
        num_heads=heads,
        num_kv_heads=_kv_heads(config, heads),
        head_dim=head_dim,
        rope=rotary or rope(config, head_dim),
        qk_norm=norm if qk_norm else None,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
    )
    width = config.integer("intermediate_size")
    feed_forward = FeedForward(width=width, activation=config.activation(activation), bias=mlp_bias)
    return Spec(
        family=family,
        task="causal-lm",
        vocab_size=vocab_size,
        hidden_size=hidden,
        max_positions=config.integer("max_position_embeddings", 2048),
        layers=tuple(
            Layer(mixer=replace(attention, window=window), feed_forward=feed)
            for window, feed in zip(windows or (None,) * count, feed_forwards or (feed_forward,) * count, strict=True)
        ),
        norm=norm,
        embedding=Embedding(),
        head=Head(kind="lm", tied=config.flag("tie_word_embeddings", tied)),
        default_format=Format(weights="fp32"),
        cache_format="fp32",
        bos_token=config.token("bos_token_id", vocab_size),
        eos_tokens=config.tokens("eos_token_id", vocab_size),
        pad_token=config.token("pad_token_id", vocab_size),
    )


def _kv_heads(config: Config, heads: int) -> int:
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        message = f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads evenly"
        raise SnelloError(message, "copy or download the file again")
    return kv_heads


def _llama(config: Config, task: Task) -> Spec:
    bias = config.flag("attention_bias", False)
    config.expect("rope_interleaved", False)
    mlp_bias = config.flag("mlp_bias", False)
    return decoder(config, "llama", qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)


def _mistral(config: Config, task: Task) -> Spec:
    return decoder(config, "mistral", windows=mistral_windows(config))


def mistral_windows(config: Config, silent: int | None = WINDOW) -> tuple[int | None, ...]:
    """One window for all layers, or none."""
    return (_window(config, silent),) * config.integer("num_hidden_layers")


def _window(config: Config, silent: int | None = WINDOW) -> int | None:
    """Null is none; a config without the key means `silent`."""
    stated = config.optional("sliding_window", silent) is not None
    return config.integer("sliding_window", silent) if stated else None


def _qwen2(config: Config, task: Task) -> Spec:
    config.expect("use_mrope", False)
    return decoder(config, "qwen2", qkv_bias=True, windows=qwen_windows(config))


def _qwen3(config: Config, task: Task) -> Spec:
    bias = config.flag("attention_bias", False)
    windows = qwen_windows(config)
    return decoder(config, "qwen3", qkv_bias=bias, out_bias=bias, qk_norm=True, head_dim=128, windows=windows)


def qwen_windows(config: Config) -> tuple[int | None, ...]:
    """Per layer: `layer_types` where given, else the layers from `max_window_layers` on; none unless switched on."""
    count, width = config.integer("num_hidden_layers"), None
    first = config.number("max_window_layers", WINDOW_LAYERS)
    if config.flag("use_sliding_window", False):
        width = _window(config)
    config.raw("sliding_window")
    silent = ["full_attention" if index < first else "sliding_attention" for index in range(count)]
    return tuple(width if kind == "sliding_attention" else None for kind in layer_types(config, silent))


def layer_types(config: Config, silent: list[str]) -> list[str]:
    """What each layer sees, `full_attention` or `sliding_attention`; `silent` where the config does not say."""
    count, types = config.integer("num_hidden_layers"), config.raw("layer_types")
    if types is None:
        return silent
    if not isinstance(types, list) or len(types) != count or set(types) - {"sliding_attention", "full_attention"}:
        expected = f"full_attention or sliding_attention for each of {count} layers"
        message = f"config.json: layer_types is {json.dumps(types)[:80]}, expected {expected}"
        raise SnelloError(message, "copy or download the file again")
    return types


def _family(name: str, architecture: str, spec: Callable[[Config, Task], Spec]) -> Family:
    return Family(
        name=name,
        architectures={architecture: "causal-lm"},
        spec=spec,
        stems=STEMS,
        heads={"causal-lm": {"head": "lm_head"}},
        copies={"causal-lm": {"lm_head.weight": "embedding.tokens.weight"}},  # where it is tied
        base="model.",
        ignored=IGNORED,
    )


LLAMA = _family("llama", "LlamaForCausalLM", _llama)
MISTRAL = _family("mistral", "MistralForCausalLM", _mistral)
QWEN2 = _family("qwen2", "Qwen2ForCausalLM", _qwen2)
QWEN3 = _family("qwen3", "Qwen3ForCausalLM", _qwen3)
