"""Random configurations of the decoder families with settings of their own, three ways to the same logits.

The settings are drawn by a seed, so a failure names its configuration and comes back.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from snello.engine.native import NativeExecutor
from snello.models import load
from snello.models.reference import Reference
from snello.models.spec_json import spec_from_json
from tests.checkpoints import VARIANTS, make_checkpoint

Config = dict[str, Any]
KINDS = ["sliding_attention", "full_attention"]


def shared(draw: random.Random) -> Config:
    return {
        "vocab_size": 307,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": draw.choice([True, False]),
    }


def gpt2(draw: random.Random) -> Config:
    heads = draw.randint(1, 4)
    return shared(draw) | {
        "n_head": heads,
        "n_embd": heads * draw.choice([8, 20, 33]),
        "n_layer": draw.randint(1, 3),
        "n_inner": draw.choice([None, 40, 130]),
        "n_positions": 128,
        "activation_function": draw.choice(["gelu_new", "gelu", "relu", "silu"]),
        "layer_norm_epsilon": draw.choice([1e-5, 1e-3]),
        "scale_attn_by_inverse_layer_idx": draw.choice([True, False]),
        "scale_attn_weights": draw.choice([True, True, False]),
    }


def opt(draw: random.Random) -> Config:
    heads, head_dim = draw.randint(1, 4), draw.choice([8, 20, 33])
    return shared(draw) | {
        "num_attention_heads": heads,
        "hidden_size": heads * head_dim,
        "word_embed_proj_dim": heads * head_dim,
        "num_hidden_layers": draw.randint(1, 3),
        "ffn_dim": draw.choice([40, 130]),
        "max_position_embeddings": 128,
        "activation_function": draw.choice(["gelu", "relu"]),
        "do_layer_norm_before": draw.choice([True, False]),
        "_remove_final_layer_norm": draw.choice([True, False, False]),
        "enable_bias": draw.choice([True, False]),
    }


def gpt_neox(draw: random.Random) -> Config:
    heads = draw.randint(1, 4)
    return shared(draw) | {
        "num_attention_heads": heads,
        "hidden_size": heads * draw.choice([8, 16, 24, 32]),
        "num_hidden_layers": draw.randint(1, 3),
        "intermediate_size": draw.choice([40, 130]),
        "max_position_embeddings": 128,
        "hidden_act": draw.choice(["gelu", "gelu_fast", "relu"]),
        "use_parallel_residual": draw.choice([True, True, False]),
        "attention_bias": draw.choice([True, False]),
        "rotary_pct": draw.choice([0.25, 0.5, 1.0]),
        "rotary_emb_base": draw.choice([10000, 500]),
    }


def grouped(draw: random.Random) -> Config:
    kv_heads = draw.randint(1, 2)
    return shared(draw) | {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw.randint(1, 3),
        "num_hidden_layers": draw.randint(1, 3),
        "intermediate_size": draw.choice([40, 130]),
        "max_position_embeddings": 512,
    }


def phi3(draw: random.Random) -> Config:
    config, head_dim, fraction = grouped(draw), draw.choice([8, 16, 32]), draw.choice([1.0, 0.5, 0.75])
    config |= {"hidden_size": config["num_attention_heads"] * head_dim, "sliding_window": draw.choice([None, 9, 200])}
    rope: Config = {"rope_type": "default", "rope_theta": draw.choice([1e4, 500.0]), "partial_rotary_factor": fraction}
    if draw.choice([True, False]):
        pairs = int(head_dim * fraction) // 2
        factors = {name: [1 + draw.random() for _ in range(pairs)] for name in ("short_factor", "long_factor")}
        rope |= {"rope_type": "longrope", **factors, **draw.choice([{}, {"factor": 4.0}, {"attention_factor": 1.1}])}
        config["original_max_position_embeddings"] = 128
    return config | {"rope_parameters": rope}


def mixture(draw: random.Random) -> Config:
    config, experts = grouped(draw), draw.choice([2, 5, 8])
    return config | {
        "hidden_size": config["num_attention_heads"] * draw.choice([8, 20, 32]),
        "head_dim": draw.choice([8, 16, 32]),
        "num_experts_per_tok": draw.choice([1, 2, experts]),
        "sliding_window": draw.choice([None, 9]),
        "num_experts": experts,
    }


def mixtral(draw: random.Random) -> Config:
    config = mixture(draw)
    return config | {"num_local_experts": config.pop("num_experts"), "router_jitter_noise": 0.1}


def qwen3_moe(draw: random.Random) -> Config:
    config = mixture(draw)
    return config | {
        "moe_intermediate_size": draw.choice([24, 70]),
        "norm_topk_prob": draw.choice([True, False]),
        "decoder_sparse_step": draw.choice([1, 2]),
        "mlp_only_layers": draw.choice([None, [0]]),
        "attention_bias": draw.choice([True, False]),
        "use_sliding_window": config["sliding_window"] is not None,
        "max_window_layers": 1,
    }


def gemma(draw: random.Random) -> Config:
    config = grouped(draw)
    layers = config["num_hidden_layers"]
    return config | {
        "hidden_size": config["num_attention_heads"] * draw.choice([8, 20, 32]),
        "head_dim": draw.choice([8, 16, 32, 80]),
        "sliding_window": draw.choice([5, 9, 200]),
        "attention_bias": draw.choice([True, False]),
        "query_pre_attn_scalar": draw.choice([16, 80]),
        "final_logit_softcapping": draw.choice([None, 5.0]),
        "layer_types": draw.choice([None, [draw.choice(KINDS) for _ in range(layers)]]),
    }


def gemma2(draw: random.Random) -> Config:
    return gemma(draw) | {"attn_logit_softcapping": draw.choice([None, 2.0, 30.0])}


def gemma3(draw: random.Random) -> Config:
    full = {"rope_theta": 3000.0, "rope_type": "linear", "factor": 4.0}
    ropes = {"full_attention": full, "sliding_attention": {"rope_theta": 77.0, "rope_type": "default"}}
    config = gemma(draw) | {"rope_parameters": draw.choice([None, ropes])}
    return config | ({"sliding_window_pattern": draw.choice([2, 3])} if config["layer_types"] is None else {})


DRAWN: dict[str, Callable[[random.Random], Config]] = {
    "GPT2LMHeadModel": gpt2,
    "OPTForCausalLM": opt,
    "GPTNeoXForCausalLM": gpt_neox,
    "Phi3ForCausalLM": phi3,
    "MixtralForCausalLM": mixtral,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
}


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 20))])
@pytest.mark.parametrize("architecture", DRAWN)
def test_all_three_agree(architecture: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNELLO_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    options = DRAWN[architecture](random.Random(seed))
    monkeypatch.setitem(VARIANTS, "drawn", (architecture, options))
    path = make_checkpoint(tmp_path / "drawn", "drawn", seed=seed)
    model, tokens = load(path), np.random.default_rng(seed).integers(1, 307, 100)
    assert spec_from_json(model.spec.to_json()) == model.spec
    mixes = any(layer.feed_forward.experts for layer in model.spec.layers)
    eager: Config = {"experts_implementation": "eager"} if mixes else {}
    original = getattr(transformers, architecture).from_pretrained(path, dtype=torch.float32, **eager).eval()
    with torch.inference_mode():
        expected = original(torch.from_numpy(tokens)[None]).logits[0].numpy()
        reference = Reference.from_model(model)(torch.from_numpy(tokens)[None])[0].numpy()
    with NativeExecutor(model) as executor:
        native = executor.logits(tokens.astype(np.int32))
    size = np.abs(expected).max()
    assert np.abs(reference - expected).max() <= 2e-5 * size, options
    assert np.abs(native - expected).max() <= 5e-5 * size, options
