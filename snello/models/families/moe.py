"""Mixtures of experts: Mixtral and Qwen3-MoE, which are Mistral and Qwen3 with experts in the place of feed-forwards.

Checkpoints hold experts in one of two ways: each matrix by itself, as they were published and as Transformers saves
them, or all of a layer stacked in two tensors, as Transformers 5 holds them in memory.
"""

from __future__ import annotations

import json
from dataclasses import replace

from snello.errors import SnelloError
from snello.models.families.config import Config, rope
from snello.models.families.family import ExpertStems, Family
from snello.models.families.llama import IGNORED, STEMS, decoder, mistral_windows
from snello.models.spec import Experts, FeedForward, Spec, Task

# What only training and its losses look at.
HARMLESS = frozenset(["output_router_logits", "router_aux_loss_coef", "router_jitter_noise"])
MOST_EXPERTS = 200_000  # of all layers, before their names fill the memory
MIXTRAL_ROPE_BASE = 1_000_000.0  # where a config is silent
FUSED = {
    "model.layers.{i}.mlp.experts.gate_up_proj": ("gate", "up"),
    "model.layers.{i}.mlp.experts.down_proj": ("down",),
}


def experts(config: Config, *, normalized: bool) -> Experts:
    """How many there are (Qwen3-MoE's key was `num_experts` before Transformers 5) and how many a row goes to."""
    stated = [key for key in ("num_local_experts", "num_experts") if config.raw(key) is not None]
    count, active = config.integer(stated[0] if stated else "num_local_experts"), config.integer("num_experts_per_tok")
    if any(config.integer(key) != count for key in stated):
        raise SnelloError("config.json: num_local_experts and num_experts differ", "keep the right one")
    if active > count:
        message = f"config.json: each token goes to {active} of {count} experts"
        raise SnelloError(message, "copy or download the file again")
    if count * config.integer("num_hidden_layers") > MOST_EXPERTS:
        message = f"config.json: {count:,} experts in each layer, expected at most {MOST_EXPERTS:,} in all"
        raise SnelloError(message, "copy or download the file again")
    return Experts(num_experts=count, num_active=active, normalized=normalized)


def _mixtral(config: Config, task: Task) -> Spec:
    feed_forward = FeedForward(
        width=config.integer("intermediate_size"),
        activation=config.activation("hidden_act"),
        experts=experts(config, normalized=True),
    )
    head_dim = config.integer("head_dim", config.integer("hidden_size") // config.integer("num_attention_heads"))
    return decoder(
        config,
        "mixtral",
        windows=mistral_windows(config, silent=None),
        feed_forwards=(feed_forward,) * config.integer("num_hidden_layers"),
        rotary=rope(config, head_dim, base=MIXTRAL_ROPE_BASE),
        epsilon=1e-5,
    )


def _qwen3_moe(config: Config, task: Task) -> Spec:
    bias = config.flag("attention_bias", False)
    return decoder(
        config,
        "qwen3_moe",
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        windows=_qwen3_windows(config),
        feed_forwards=_qwen3_feed_forwards(config),
    )


def _qwen3_windows(config: Config) -> tuple[int | None, ...]:
    """One window for all layers, or none. Transformers 5 does not look at `max_window_layers` here, as it does in dense
    Qwen models.
    """
    config.raw("max_window_layers")
    if config.flag("use_sliding_window", False):
        return mistral_windows(config)
    config.raw("sliding_window")
    return (None,) * config.integer("num_hidden_layers")


def _qwen3_feed_forwards(config: Config) -> tuple[FeedForward, ...]:
    """Experts in every `decoder_sparse_step`-th layer that `mlp_only_layers` does not name; the others are dense."""
    count, step = config.integer("num_hidden_layers"), config.integer("decoder_sparse_step", 1)
    dense = config.raw("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(index) is int for index in dense):
        message = f"config.json: mlp_only_layers is {json.dumps(dense)[:80]}, expected a list of layers"
        raise SnelloError(message, "copy or download the file again")
    plain = FeedForward(width=config.integer("intermediate_size"), activation=config.activation("hidden_act"))
    mixture = replace(
        plain,
        width=config.integer("moe_intermediate_size"),
        experts=experts(config, normalized=config.flag("norm_topk_prob", False)),
    )
    return tuple(plain if index in dense or (index + 1) % step else mixture for index in range(count))


MIXTRAL = Family(
    name="mixtral",
    architectures={"MixtralForCausalLM": "causal-lm"},
    spec=_mixtral,
    stems=STEMS,
    heads={"causal-lm": {"head": "lm_head"}},
    copies={"causal-lm": {"lm_head.weight": "embedding.tokens.weight"}},
    base="model.",
    ignored=IGNORED,
    harmless=HARMLESS,
    experts=ExpertStems(
        router="model.layers.{i}.block_sparse_moe.gate",
        apart={
            "gate": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
            "up": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
            "down": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
        },
        fused_router="model.layers.{i}.mlp.gate",
        fused=FUSED,
    ),
)
QWEN3_MOE = replace(
    MIXTRAL,
    name="qwen3_moe",
    architectures={"Qwen3MoeForCausalLM": "causal-lm"},
    spec=_qwen3_moe,
    experts=ExpertStems(
        router="model.layers.{i}.mlp.gate",
        apart={part: f"model.layers.{{i}}.mlp.experts.{{e}}.{part}_proj" for part in ("gate", "up", "down")},
        fused_router="model.layers.{i}.mlp.gate",
        fused=FUSED,
    ),
)
