"""Phi-3 and Phi-4-mini: Llama's block, with q, k, v in one matrix and gate, up in another.

LongRoPE turns a text that is longer than the original length by other frequencies from its first position on. A cache
holds keys as they were turned when the text was short, so such a model is served up to its original length, where it
answers as Transformers does, and no further.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from snello.errors import Unsupported
from snello.models.families.config import Config, rope
from snello.models.families.family import Family
from snello.models.families.llama import IGNORED, STEMS, decoder
from snello.models.spec import Rope, Spec, Task

FUSED: Mapping[str, tuple[str, ...]] = {
    "model.layers.{i}.self_attn.qkv_proj": (
        "layers.{i}.attention.q",
        "layers.{i}.attention.k",
        "layers.{i}.attention.v",
    ),
    "model.layers.{i}.mlp.gate_up_proj": ("layers.{i}.ffn.gate", "layers.{i}.ffn.up"),
}
LONGROPE = {"su": "longrope", "yarn": "longrope"}  # one thing under the names that Phi-3's files have given it
ORIGINAL_POSITIONS = 4096  # where a config is silent


def _phi3(config: Config, task: Task) -> Spec:
    head_dim = config.integer("head_dim", config.integer("hidden_size") // config.integer("num_attention_heads"))
    window = None if config.raw("sliding_window") is None else config.integer("sliding_window")
    original = config.integer("original_max_position_embeddings", ORIGINAL_POSITIONS)
    positions = config.integer("max_position_embeddings", ORIGINAL_POSITIONS)
    rotary = _longrope(rope(config, head_dim, fraction=1.0, called=LONGROPE), original, positions)
    windows = (window,) * config.integer("num_hidden_layers")
    spec = decoder(config, "phi3", windows=windows, rotary=rotary, epsilon=1e-5)
    return dataclasses.replace(spec, max_positions=min(positions, original) if rotary.scaling else positions)


def _longrope(rotary: Rope, original: int, positions: int) -> Rope:
    """The scaling complete: the config keeps the original length beside it, and the factor follows from both."""
    scaling = dict(rotary.scaling)
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return rotary
    if kind != "longrope":
        raise Unsupported(f"config.json: Phi-3 with RoPE scaling of type {kind}", "supported: longrope, su, yarn")
    scaling["original_max_position_embeddings"] = float(original)
    scaling.setdefault("factor", positions / original)
    return dataclasses.replace(rotary, scaling=tuple(sorted(scaling.items())))


PHI3 = Family(
    name="phi3",
    architectures={"Phi3ForCausalLM": "causal-lm"},
    spec=_phi3,
    stems={stem: stored for stem, stored in STEMS.items() if not any(stem in parts for parts in FUSED.values())},
    heads={"causal-lm": {"head": "lm_head"}},
    copies={"causal-lm": {"lm_head.weight": "embedding.tokens.weight"}},
    fused=FUSED,
    base="model.",
    ignored=IGNORED,
    # Phi-4-mini's configs say the last two; nothing reads them
    harmless=frozenset(["embd_pdrop", "resid_pdrop", "full_attn_mod", "interpolate_factor"]),
)
