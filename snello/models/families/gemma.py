"""Gemma 2 and Gemma 3 (text): Llama's block with norms on both sides of each half, whose gains are stored less one.

Layers that see a window alternate with layers that see everything. Gemma 2 caps its scores and logits; Gemma 3 norms
queries and keys instead, and rotates the two kinds of layers by different bases.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from snello.errors import SnelloError, Unsupported
from snello.models.families.config import Config, agreed, rope, rope_of, rope_table, rotary_dims
from snello.models.families.family import Family
from snello.models.families.llama import IGNORED, decoder, layer_types
from snello.models.families.llama import STEMS as LLAMA_STEMS
from snello.models.spec import Attention, Embedding, Layer, Rope, Spec, Task

STEMS: Mapping[str, str] = {
    **LLAMA_STEMS,
    "layers.{i}.attention.post_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.ffn.norm": "model.layers.{i}.pre_feedforward_layernorm",
    "layers.{i}.ffn.post_norm": "model.layers.{i}.post_feedforward_layernorm",
}
FULL, SLIDING = "full_attention", "sliding_attention"
HEAD_DIM = SCORE_SCALAR = 256  # where a config is silent
FULL_BASE, SLIDING_BASE = 1_000_000.0, 10_000.0  # of Gemma 3, likewise


def _gemma(config: Config, family: str, types: list[str], ropes: Mapping[str, Rope], cap: float | None) -> Spec:
    """The block stack that both share; `ropes` by type of layer, `cap` of the scores."""
    if config.raw("num_key_value_heads") is None:
        raise SnelloError("config.json lacks num_key_value_heads", "is it the one that came with the checkpoint?")
    window, bias = config.integer("sliding_window"), config.flag("attention_bias", False)
    spec = decoder(
        config,
        family,
        qkv_bias=bias,
        out_bias=bias,
        head_dim=HEAD_DIM,
        rotary=ropes[FULL],
        activation="hidden_activation",
        tied=True,
    )
    norm = dataclasses.replace(spec.norm, gain_offset=1.0)
    scale = config.integer("query_pre_attn_scalar", SCORE_SCALAR) ** -0.5

    def layer_of(layer: Layer, kind: str) -> Layer:
        assert isinstance(layer.mixer, Attention)
        mixer = dataclasses.replace(
            layer.mixer,
            window=window if kind == SLIDING else None,
            rope=ropes[kind],
            qk_norm=norm if family == "gemma3_text" else None,
            scale=scale,
            soft_cap=cap,
        )
        return dataclasses.replace(layer, mixer=mixer, norms="both")

    return dataclasses.replace(
        spec,
        norm=norm,
        layers=tuple(layer_of(layer, kind) for layer, kind in zip(spec.layers, types, strict=True)),
        embedding=Embedding(scale=spec.hidden_size**0.5),
    )


def _alternating(config: Config, period: int) -> list[str]:
    """As said, or every `period`-th layer sees everything."""
    count = config.integer("num_hidden_layers")
    return layer_types(config, [SLIDING if (index + 1) % period else FULL for index in range(count)])


def _capped(config: Config, spec: Spec, default: float | None) -> Spec:
    cap = config.optional("final_logit_softcapping", default)
    return dataclasses.replace(spec, head=dataclasses.replace(spec.head, soft_cap=cap))


def _gemma2(config: Config, task: Task) -> Spec:
    rotary = rope(config, config.integer("head_dim", HEAD_DIM))
    cap = config.optional("attn_logit_softcapping", 50.0)
    spec = _gemma(config, "gemma2", _alternating(config, 2), {FULL: rotary, SLIDING: rotary}, cap)
    return _capped(config, spec, 30.0)


def _gemma3(config: Config, task: Task) -> Spec:
    types = _alternating(config, config.integer("sliding_window_pattern", 6))
    return _capped(config, _gemma(config, "gemma3_text", types, _ropes(config), None), None)


def _ropes(config: Config) -> dict[str, Rope]:
    """By type of layer: nested `rope_parameters` (Transformers 5), or a key for each base (before)."""
    nested = rope_table(config, "rope_parameters")
    if set(nested) - {FULL, SLIDING} or not all(isinstance(table, dict) for table in nested.values()):
        expected = f"one table for each type of layer: {FULL}, {SLIDING}"
        message = f"config.json: rope_parameters are {json.dumps(nested)[:80]}, expected {expected}"
        raise SnelloError(message, "copy or download the file again")
    before, full = rope_table(config, "rope_scaling"), nested.get(FULL, {})
    if any(full.get(key, value) != value for key, value in before.items()):
        raise SnelloError("config.json: rope_scaling and rope_parameters differ", "keep the right one")
    full = {**full, **before}
    sliding = nested.get(SLIDING, {})
    head_dim = config.integer("head_dim", HEAD_DIM)
    return {
        FULL: _rope(full, config.raw("rope_theta"), FULL_BASE, head_dim),
        SLIDING: _rope(sliding, config.raw("rope_local_base_freq"), SLIDING_BASE, head_dim),
    }


def _rope(settings: Mapping[str, Any], stated: Any, default: float, head_dim: int) -> Rope:
    left = dict(settings)
    if left.pop("partial_rotary_factor", None) not in (None, 1):
        raise Unsupported("config.json: partial_rotary_factor is not supported in Gemma 3", "its heads rotate whole")
    base = agreed("rope_theta", [left.pop("rope_theta", None), stated], default)
    return rope_of(left, base, rotary_dims(head_dim))


def _family(name: str, architecture: str, spec: Callable[[Config, Task], Spec]) -> Family:
    return Family(
        name=name,
        architectures={architecture: "causal-lm"},
        spec=spec,
        stems=STEMS,
        heads={"causal-lm": {"head": "lm_head"}},
        copies={"causal-lm": {"lm_head.weight": "embedding.tokens.weight"}},
        base="model.",
        ignored=IGNORED,
        harmless=frozenset(
            [
                "_sliding_window_pattern",  # said by layer_types
                "cache_implementation",
                "hidden_act",  # the first Gemma's key; hidden_activation is what counts
                "sliding_window_size",  # sliding_window again
            ]
        ),
    )


GEMMA2 = _family("gemma2", "Gemma2ForCausalLM", _gemma2)
GEMMA3 = _family("gemma3_text", "Gemma3ForCausalLM", _gemma3)
