"""config.json to `Spec`: both dialects, every setting that changes the meaning, and nothing ignored in silence."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers

from snello.errors import SnelloError, Unsupported
from snello.models.families import FAMILIES
from snello.models.families.config import HARMLESS
from snello.models.families.resolve import spec_from_config
from snello.models.shapes import SHAPES, spec_of_shape
from snello.models.spec import Attention, Experts, Rope, Spec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_act": "silu",
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 8}
BERT = LLAMA | {"architectures": ["BertForMaskedLM"], "hidden_act": "gelu"}
DISTILBERT: dict[str, Any] = {
    "architectures": ["DistilBertForMaskedLM"],
    "vocab_size": 100,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "activation": "gelu",
}


def attention(spec: Spec, layer: int = 0) -> Attention:
    mixer = spec.layers[layer].mixer
    assert isinstance(mixer, Attention)
    return mixer


def test_llama_settings() -> None:
    spec = spec_from_config(LLAMA | {"num_key_value_heads": 2, "attention_bias": True, "rms_norm_eps": 1e-5})
    mixer = attention(spec)
    assert (spec.family, spec.task, len(spec.layers), spec.norm.epsilon) == ("llama", "causal-lm", 3, 1e-5)
    assert (mixer.num_heads, mixer.num_kv_heads, mixer.head_dim) == (4, 2, 8)
    assert mixer.qkv_bias and mixer.out_bias and not spec.layers[0].feed_forward.bias
    assert not spec.head.tied and spec.final_norm and spec.layers[0].norms == "pre"
    assert attention(spec_from_config(LLAMA | {"head_dim": 80})).head_dim == 80
    assert spec_from_config(LLAMA | {"mlp_bias": True}).layers[2].feed_forward.bias


def test_mistral_window_is_in_every_layer() -> None:
    assert [attention(spec_from_config(MISTRAL | {"sliding_window": 7}), i).window for i in range(3)] == [7, 7, 7]
    assert attention(spec_from_config(MISTRAL | {"sliding_window": None})).window is None


@pytest.mark.parametrize("base", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_qwen_windows(base: dict[str, Any]) -> None:
    def windows(**settings: Any) -> list[int | None]:
        spec = spec_from_config(base | {"sliding_window": 7} | settings)
        return [attention(spec, index).window for index in range(3)]

    types = ["full_attention", "sliding_attention", "full_attention"]
    assert windows() == windows(use_sliding_window=False, layer_types=types) == [None] * 3
    assert windows(use_sliding_window=True, max_window_layers=1) == [None, 7, 7]
    assert windows(use_sliding_window=True, max_window_layers=28) == [None] * 3
    assert windows(use_sliding_window=True, layer_types=types) == [None, 7, None]
    with pytest.raises(SnelloError, match="layer_types"):
        windows(layer_types=["full_attention"])
    with pytest.raises(SnelloError, match="layer_types"):
        windows(layer_types=["full_attention", "chunked_attention", "full_attention"])


def test_windows_where_a_config_is_silent() -> None:
    """What Transformers takes; null says that there is none."""
    assert attention(spec_from_config(MISTRAL)).window == 4096
    assert attention(spec_from_config(MIXTRAL)).window is None
    for base in (QWEN2, QWEN3):
        deep = base | {"use_sliding_window": True, "num_hidden_layers": 30}
        seen = [attention(spec_from_config(deep | {"sliding_window": 7}), index).window for index in range(30)]
        assert seen == [None] * 28 + [7] * 2
        assert attention(spec_from_config(deep | {"max_window_layers": 0})).window == 4096
        assert attention(spec_from_config(deep | {"max_window_layers": 0, "sliding_window": None})).window is None
        with pytest.raises(SnelloError, match="max_window_layers"):
            spec_from_config(deep | {"max_window_layers": "28"})
    moe = QWEN3_MOE | {"use_sliding_window": True}
    assert attention(spec_from_config(moe)).window == 4096


def test_qwen_biases_and_norms() -> None:
    two, three = attention(spec_from_config(QWEN2)), attention(spec_from_config(QWEN3))
    assert (two.qkv_bias, two.out_bias, two.qk_norm) == (True, False, None)
    assert (three.qkv_bias, three.out_bias) == (False, False) and three.qk_norm is not None
    assert attention(spec_from_config({k: v for k, v in QWEN3.items() if k != "head_dim"})).head_dim == 128


GPT2 = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 100, "n_embd": 32, "n_layer": 3, "n_head": 4}
GPT2 |= {"activation_function": "gelu_new"}
OPT = {key: value for key, value in LLAMA.items() if key not in ("intermediate_size", "hidden_act")}
OPT |= {"architectures": ["OPTForCausalLM"], "ffn_dim": 48, "activation_function": "relu"}
NEOX = LLAMA | {"architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu"}


def test_gpt2_settings() -> None:
    spec = spec_from_config(GPT2 | {"n_positions": 64, "n_ctx": 64})
    assert (spec.max_positions, spec.embedding.learned_positions, spec.embedding.position_offset) == (64, 64, 0)
    assert spec.head.tied and spec.final_norm and spec.norm.kind == "layer" and attention(spec).rope is None
    assert (spec.layers[0].feed_forward.width, spec.layers[0].feed_forward.activation) == (128, "gelu_tanh")
    assert attention(spec).scale is None
    deeper = spec_from_config(GPT2 | {"scale_attn_by_inverse_layer_idx": True})
    assert [attention(deeper, i).score_scale for i in range(3)] == [8**-0.5 / (i + 1) for i in range(3)]
    assert attention(spec_from_config(GPT2 | {"scale_attn_weights": False})).score_scale == 1.0


def test_opt_settings() -> None:
    spec = spec_from_config(OPT | {"max_position_embeddings": 64, "word_embed_proj_dim": 32})
    assert (spec.max_positions, spec.embedding.learned_positions, spec.embedding.position_offset) == (64, 66, 2)
    assert (spec.layers[0].norms, spec.final_norm, spec.head.tied) == ("pre", True, True)
    after = spec_from_config(OPT | {"do_layer_norm_before": False})
    assert (after.layers[0].norms, after.final_norm) == ("post", False)
    bare = spec_from_config(OPT | {"enable_bias": False, "_remove_final_layer_norm": True})
    assert not (attention(bare).qkv_bias or bare.layers[0].feed_forward.bias or bare.final_norm)


def test_gpt_neox_settings() -> None:
    spec = spec_from_config(NEOX)
    assert (spec.layers[0].norms, spec.head.tied, attention(spec).rope) == ("parallel", False, Rope(base=1e4, dims=2))
    assert spec_from_config(NEOX | {"use_parallel_residual": False}).layers[0].norms == "pre"
    rotary = {"rotary_pct": 0.5, "rotary_emb_base": 500}
    assert attention(spec_from_config(NEOX | rotary)).rope == Rope(base=500.0, dims=4)
    both = rotary | {"rope_parameters": {"rope_theta": 500, "partial_rotary_factor": 0.5, "rope_type": "default"}}
    assert attention(spec_from_config(NEOX | both)).rope == Rope(base=500.0, dims=4)


MIXTRAL = LLAMA | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN3_MOE = LLAMA | {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2}
QWEN3_MOE |= {"moe_intermediate_size": 24}


def widths(spec: Spec) -> list[int]:
    """Of each layer: of its experts, or as a negative number of its dense feed-forward."""
    feeds = [layer.feed_forward for layer in spec.layers]
    return [feed.width if feed.experts else -feed.width for feed in feeds]


def test_mixture_settings() -> None:
    mixtral, qwen3 = spec_from_config(MIXTRAL), spec_from_config(QWEN3_MOE)
    assert mixtral.layers[0].feed_forward.experts == Experts(num_experts=8, num_active=2, normalized=True)
    assert qwen3.layers[0].feed_forward.experts == Experts(num_experts=8, num_active=2, normalized=False)
    assert attention(qwen3).qk_norm is not None and attention(mixtral).qk_norm is None
    dense = LLAMA["intermediate_size"]
    assert widths(mixtral) == [dense] * 3 and widths(qwen3) == [24] * 3
    assert widths(spec_from_config(QWEN3_MOE | {"decoder_sparse_step": 2})) == [-dense, 24, -dense]
    assert widths(spec_from_config(QWEN3_MOE | {"mlp_only_layers": [0, 2]})) == [-dense, 24, -dense]
    normalized = spec_from_config(QWEN3_MOE | {"norm_topk_prob": True}).layers[0].feed_forward.experts
    assert normalized is not None and normalized.normalized


def test_rotation_of_mixtures_where_a_config_is_silent() -> None:
    """Mixtral's base is not that of others."""
    for settings in ({}, {"rope_parameters": {"rope_type": "default"}}):
        assert attention(spec_from_config(MIXTRAL | settings)).rope == Rope(base=1e6, dims=8)
        assert attention(spec_from_config(QWEN3_MOE | settings)).rope == Rope(base=1e4, dims=8)
    assert attention(spec_from_config(MIXTRAL | {"rope_theta": 500})).rope == Rope(base=500.0, dims=8)


def test_a_mixture_of_qwens_has_one_window_for_all_layers() -> None:
    """As Transformers 5 reads it, which does not look at `max_window_layers` here."""

    def windows(**settings: Any) -> set[int | None]:
        return {layer.mixer.window for layer in spec_from_config(QWEN3_MOE | settings).layers}  # type: ignore[union-attr]

    assert windows(sliding_window=7) == windows(use_sliding_window=True, sliding_window=None) == {None}
    assert windows(use_sliding_window=True, sliding_window=7, max_window_layers=1) == {7}


@pytest.mark.parametrize("base", [MIXTRAL, QWEN3_MOE])
def test_experts_are_counted_under_either_name(base: dict[str, Any]) -> None:
    plain = {key: value for key, value in base.items() if key not in ("num_experts", "num_local_experts")}
    for name in ("num_experts", "num_local_experts"):
        assert spec_from_config(plain | {name: 8}) == spec_from_config(base)
    for settings, message in (
        ({}, "lacks num_local_experts"),
        ({"num_experts": 8, "num_local_experts": 4}, "num_local_experts and num_experts differ"),
        ({"num_local_experts": 1}, "each token goes to 2 of 1 experts"),
        ({"num_local_experts": 0}, "num_local_experts is 0"),
        ({"num_local_experts": 8, "num_experts_per_tok": None}, "lacks num_experts_per_tok"),
        ({"num_local_experts": 8, "shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size = 64"),
    ):
        with pytest.raises(SnelloError, match=message):
            spec_from_config(plain | settings)


def test_dense_layers_must_be_a_list() -> None:
    with pytest.raises(SnelloError, match="mlp_only_layers is"):
        spec_from_config(QWEN3_MOE | {"mlp_only_layers": "0"})


GEMMA = LLAMA | {"architectures": ["Gemma2ForCausalLM"], "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 7}
GEMMA |= {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu"}  # the second is not what counts
GEMMA3 = GEMMA | {"architectures": ["Gemma3ForCausalLM"]}


def test_gemma2_settings() -> None:
    spec = spec_from_config(GEMMA | {"query_pre_attn_scalar": 16})
    assert (spec.norm.gain_offset, spec.embedding.scale, spec.head.tied) == (1.0, 32**0.5, True)
    assert (spec.head.soft_cap, attention(spec).soft_cap, attention(spec).score_scale) == (30.0, 50.0, 0.25)
    assert spec.layers[0].norms == "both" and spec.layers[0].feed_forward.activation == "gelu_tanh"
    assert [attention(spec, i).window for i in range(3)] == [7, None, 7]
    bare = spec_from_config(GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert bare.head.soft_cap is None and attention(bare).soft_cap is None
    assert attention(bare).score_scale == 256**-0.5  # unsaid, whatever the head_dim


def test_gemma3_settings() -> None:
    spec = spec_from_config(GEMMA3 | {"sliding_window_pattern": 2})
    ropes = [attention(spec, i).rope for i in range(3)]
    assert [attention(spec, i).window for i in range(3)] == [7, None, 7]
    assert ropes == [Rope(base=1e4, dims=8), Rope(base=1e6, dims=8), Rope(base=1e4, dims=8)]
    assert (spec.head.soft_cap, attention(spec).soft_cap) == (None, None)
    norm = attention(spec).qk_norm
    assert norm is not None and norm.gain_offset == 1.0
    assert [attention(spec_from_config(GEMMA3), i).window for i in range(3)] == [7, 7, 7]


def test_gemma3_ropes_in_both_dialects() -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    old = {"rope_theta": 5e5, "rope_local_base_freq": 5e3, "rope_scaling": linear}
    full = {"rope_theta": 5e5, **linear}
    new = {"rope_parameters": {"full_attention": full, "sliding_attention": {"rope_theta": 5e3}}}
    pattern = {"sliding_window_pattern": 2}
    assert spec_from_config(GEMMA3 | old | pattern) == spec_from_config(GEMMA3 | new | pattern)
    spec = spec_from_config(GEMMA3 | new | pattern)
    assert attention(spec, 0).rope == Rope(base=5e3, dims=8)
    assert attention(spec, 1).rope == Rope(base=5e5, dims=8, scaling=(("rope_type", "linear"), ("factor", 8.0)))


LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
PHI3 = LLAMA | {"architectures": ["Phi3ForCausalLM"]}
SU = {"short_factor": [1, 2, 3, 4], "long_factor": [5, 6, 7, 8]}


def test_phi3_settings() -> None:
    spec = spec_from_config(PHI3 | {"sliding_window": 9, "partial_rotary_factor": 0.5})
    assert [attention(spec, i).window for i in range(3)] == [9] * 3
    assert attention(spec).rope == Rope(base=1e4, dims=4) and spec.norm.epsilon == 1e-5


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])  # older files say su, or even yarn
def test_phi3_is_served_up_to_its_original_length(kind: str) -> None:
    long = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    spec = spec_from_config(PHI3 | long | {"rope_scaling": SU | {"type": kind}})
    rope = attention(spec).rope
    assert rope is not None and spec.max_positions == 4096
    assert dict(rope.scaling) == {
        "rope_type": "longrope",
        "factor": 32.0,
        "original_max_position_embeddings": 4096.0,
        "short_factor": "[1, 2, 3, 4]",
        "long_factor": "[5, 6, 7, 8]",
    }


@pytest.mark.parametrize(
    ("base", "settings", "message"),
    [
        (GEMMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention = true"),
        (GEMMA, {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0.0"),
        (GEMMA, {"sliding_window": None}, "lacks sliding_window"),
        (GEMMA, {"layer_types": ["full_attention"]}, "layer_types"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        (GEMMA3, {"rope_theta": 1e6, "rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "both 500000.0"),
        (GEMMA3, {"rope_parameters": {"rope_theta": 5e5}}, "one table for each type of layer"),
        (
            GEMMA3,
            {"rope_scaling": LINEAR, "rope_parameters": {"full_attention": LINEAR | {"factor": 2.0}}},
            "rope_scaling and rope_parameters differ",
        ),
        (GEMMA3, {"rope_scaling": LINEAR | {"colour": 1}}, "linear says colour"),
        (PHI3, {"rope_scaling": SU | {"type": "su", "short_mscale": 1.2}}, "longrope says short_mscale"),
        (GEMMA3, {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}}, "partial_rotary_factor"),
        (PHI3, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "Phi-3 with RoPE scaling of type linear"),
        (PHI3, {"rope_scaling": SU | {"type": "su", "short_factor": [1, 2]}}, "short_factor must be 4 numbers"),
        (PHI3, {"rope_scaling": {"type": "su", "long_factor": [1, 2, 3, 4]}}, "short_factor must be 4 numbers"),
        (PHI3, {"attention_bias": True}, "attention_bias = true"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention = true"),
        (GPT2, {"activation_function": "mish"}, "activation_function"),
        (GPT2, {"n_head": 5}, "does not divide into 5"),
        (OPT, {"word_embed_proj_dim": 16}, "word_embed_proj_dim 16 is not supported"),
        (OPT, {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine false"),
        (NEOX, {"rotary_pct": 0.4}, "0.4 of a head's 8 dims"),
        (NEOX, {"rotary_pct": 0.0}, "0 of a head's 8 dims"),
        (NEOX, {"rotary_pct": 0.5, "partial_rotary_factor": 0.25}, "partial_rotary_factor is both 0.25 and 0.5"),
        (NEOX, {"rotary_pct": "half"}, "expected a number"),
        (NEOX, {"is_decoder": True}, "is_decoder"),
    ],
)
def test_gpt_variants_are_refused(base: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SnelloError, match=message):
        spec_from_config(base | settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Rope(base=10000.0, dims=8)),
        ({"rope_theta": 5e5}, Rope(base=5e5, dims=8)),
        ({"rope_theta": 5e5, "rope_scaling": None}, Rope(base=5e5, dims=8)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, Rope(base=5e5, dims=8)),
        ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1.0}}, Rope(base=5e5, dims=8)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
            Rope(base=5e5, dims=8, scaling=(("rope_type", "linear"), ("factor", 2.0))),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            Rope(base=5e5, dims=8, scaling=(("rope_type", "llama3"), *sorted(LLAMA3.items()))),
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
            Rope(base=5e5, dims=8, scaling=(("rope_type", "llama3"), *sorted(LLAMA3.items()))),
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "type": "longrope", "short_factor": [1.0, 2.0, 3.0, 4.0]}},
            Rope(base=1e4, dims=8, scaling=(("rope_type", "longrope"), ("short_factor", "[1.0, 2.0, 3.0, 4.0]"))),
        ),
    ],
)
def test_rope_in_both_dialects(settings: dict[str, Any], expected: Rope) -> None:
    assert attention(spec_from_config(LLAMA | settings)).rope == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "both 500000.0 and 10000.0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ by type of layer"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_scaling": {"factor": 2.0}}, "beside type default"),
        ({"rope_scaling": "linear"}, "expected a table"),
        ({"rope_scaling": LINEAR | {"colour": 1}}, "linear says colour, which means nothing to it"),
        ({"rope_scaling": LINEAR | {"beta_fast": 32, "mscale": 1.0}}, "linear says beta_fast, mscale"),
        ({"rope_scaling": LINEAR | {"type": "dynamic"}}, "both linear and dynamic"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32}}, "type 'yarn'"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 4.0}}, "type \"\\['linear'\\]\""),
        ({"rope_scaling": LLAMA3 | {"rope_type": "llama3", "truncate": False}}, "llama3 says truncate"),
        ({"rope_scaling": LLAMA3 | {"rope_type": "llama3", "low_freq_factor": None}}, "without 'low_freq_factor'"),
        ({"rope_scaling": LLAMA3 | {"rope_type": "llama3", "high_freq_factor": 1.0}}, "above low_freq_factor 1"),
        ({"rope_theta": [1e4]}, "rope_theta is .*expected a number"),
        ({"rope_theta": 10**400}, "rope_theta is 1000.*expected a number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000.*expected a number"),
        ({"partial_rotary_factor": float("nan")}, "partial_rotary_factor is NaN"),
        (
            {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 2.0}},
            "rope_scaling and rope_parameters differ",
        ),
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 5e5}}, "rope_scaling and rope_parameters differ"),
    ],
)
def test_rope_that_cannot_be_meant(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SnelloError, match=message):
        spec_from_config(LLAMA | settings)


MIXTURE = {"architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 2}
LFM2 = {"architectures": ["Lfm2ForCausalLM"], "num_key_value_heads": 4, "hidden_act": None}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected at most 10,000"),
        ({"hidden_size": 10**400}, "hidden_size is 1000.*expected at most 2,147,483,647"),
        ({"sliding_window": 2**32 + 5, "architectures": ["MistralForCausalLM"]}, "sliding_window is 4294967301"),
        ({"head_dim": 10**9}, "1 of a head's 1000000000 dims"),
        (LFM2 | {"hidden_size": 3}, "head_dim is 0"),
        (LFM2 | {"block_ffn_dim_multiplier": 1e308}, "block_ffn_dim_multiplier"),
        (MIXTURE | {"num_local_experts": 10**6}, "1,000,000 experts in each layer"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"dtype": ["float32"]}, "dtype"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_theta": -5e5}, "rope_theta is -500000"),
    ],
)
def test_values_that_are_none_are_one_clear_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SnelloError, match=message):
        spec_from_config(LLAMA | settings)


@pytest.mark.parametrize("factor", ["8", 0, -2.0, float("inf"), None])
def test_a_factor_that_is_none_is_one_clear_error(factor: object) -> None:
    with pytest.raises(SnelloError, match="factor"):
        spec_from_config(LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": factor}})


def test_types_in_both_dialects() -> None:
    for key in ("dtype", "torch_dtype"):
        spec = spec_from_config(LLAMA | {key: "bfloat16"})
        assert (spec.default_format.weights, spec.cache_format) == ("bf16", "bf16")
    with pytest.raises(Unsupported, match="float8_e4m3fn"):
        spec_from_config(LLAMA | {"dtype": "float8_e4m3fn"})


def test_end_tokens_come_from_both_files() -> None:
    spec = spec_from_config(LLAMA | {"eos_token_id": 2}, generation={"eos_token_id": [5, 2]})
    assert spec.eos_tokens == (5, 2)
    assert spec_from_config(LLAMA | {"eos_token_id": [7, 8]}).eos_tokens == (7, 8)
    assert spec_from_config(LLAMA | {"pad_token_id": -1, "eos_token_id": 100}).pad_token is None
    assert spec_from_config(LLAMA | {"eos_token_id": 100}).eos_tokens == ()
    with pytest.raises(SnelloError, match="eos_token_id"):
        spec_from_config(LLAMA | {"eos_token_id": "</s>"})


@pytest.mark.parametrize("base", [BERT, DISTILBERT], ids=["bert", "distilbert"])
def test_encoder_tasks(base: dict[str, Any]) -> None:
    masked = spec_from_config(base)
    assert (masked.task, masked.head.kind, masked.head.tied, masked.head.transform) == ("masked-lm", "lm", True, "gelu")
    classify = spec_from_config(base | {"id2label": {"1": "yes", "0": "no"}}, task="sequence-classification")
    assert classify.head.labels == ("no", "yes")
    assert classify.head.pooler == {"bert": "tanh", "distilbert": "relu"}[classify.family]
    embed = spec_from_config(base, task="embedding")
    assert (embed.head.kind, embed.head.pooling) == ("embed", "mean")
    assert not attention(embed).causal and embed.embedding.norm and not embed.final_norm and embed.norm.bias
    assert embed.embedding.token_types == {"bert": 2, "distilbert": 0}[embed.family]
    with pytest.raises(Unsupported, match="cannot be loaded for causal-lm"):
        spec_from_config(base, task="causal-lm")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"num_experts": 0}, "num_experts = 0"),
        ({"residual_multiplier": 0.2, "logits_scaling": 3}, "logits_scaling = 3, residual_multiplier = 0.2"),
        ({"hidden_act": "gelu_10"}, "hidden_act"),
        ({"rope_interleaved": True}, "rope_interleaved true"),
        ({"num_key_value_heads": 3}, "cannot share 3"),
        ({"hidden_size": "32"}, 'hidden_size is "32"'),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"tie_word_embeddings": "yes"}, "true or false"),
        ({"rms_norm_eps": "small"}, "a number"),
    ],
)
def test_what_would_change_the_meaning_is_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SnelloError, match=message):
        spec_from_config(LLAMA | settings)


def test_keys_that_say_nothing_pass() -> None:
    silent = {"attn_logit_softcapping": None, "sliding_window": None, "use_magic": False, "pruned_heads": {}, "x": []}
    assert spec_from_config(LLAMA | silent) == spec_from_config(LLAMA)
    read = LLAMA.keys() | {"dtype", "torch_dtype", "model_type"}
    assert spec_from_config(LLAMA | dict.fromkeys(HARMLESS - read, 7))


@pytest.mark.parametrize("settings", [{"is_decoder": True}, {"position_embedding_type": "relative_key"}])
def test_bert_variants_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(Unsupported):
        spec_from_config(BERT | settings)


def test_unknown_architectures_are_named() -> None:
    with pytest.raises(Unsupported, match="GemmaForCausalLM") as caught:
        spec_from_config(LLAMA | {"architectures": ["GemmaForCausalLM"]})
    assert caught.value.hint is not None and "Qwen3ForCausalLM" in caught.value.hint
    nothing = {key: value for key, value in LLAMA.items() if key != "architectures"}
    with pytest.raises(Unsupported, match="neither"):
        spec_from_config(nothing)
    with pytest.raises(Unsupported, match="model_type bert without"):
        spec_from_config(nothing | {"model_type": "bert"})
    with pytest.raises(Unsupported, match="model_type .* without"):
        spec_from_config(nothing | {"model_type": ["llama"]})
    with pytest.raises(Unsupported, match="architecture Llama is not"):
        spec_from_config(LLAMA | {"architectures": ["Llama"]})
    with pytest.raises(SnelloError, match="architectures is .* expected a list"):
        spec_from_config(LLAMA | {"architectures": "MyForCausalLM", "model_type": "llama"})
    assert spec_from_config(nothing | {"model_type": "llama"}).family == "llama"


@pytest.mark.parametrize("kind", ["foo", "qwen3", "gemma3", 7, ["llama"]])
def test_a_model_type_that_contradicts_the_architecture_is_refused(kind: Any) -> None:
    for architecture in ("LlamaForCausalLM", "LlamaModel"):
        config = LLAMA | {"architectures": [architecture]}
        with pytest.raises(Unsupported, match=f"does not go with architecture {architecture}") as caught:
            spec_from_config(config | {"model_type": kind})
        assert caught.value.hint is not None and "llama" in caught.value.hint
        assert spec_from_config(config | {"model_type": "llama"}).family == "llama"
        assert spec_from_config(config | {"model_type": None}).family == "llama"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "aqlm", "bits": 2}, "aqlm, 2 bits"),
        ({"quant_method": "mxfp4"}, r"\(mxfp4\)"),
        ({"quant_method": "gguf"}, r"\(gguf\)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, r"\(fp8\)"),
        ({"something": 1}, "quantization_config"),
    ],
)
def test_quantized_checkpoints_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(Unsupported, match=f"quantized in a way that is not read here.*{named}"):
        spec_from_config(LLAMA | {"quantization_config": settings})


@pytest.mark.parametrize("name", FAMILIES)
def test_default_configs_of_transformers_are_understood(name: str) -> None:
    """Every key that Transformers writes for these families is read or known to be harmless."""
    family = FAMILIES[name]
    config = json.loads(transformers.AutoConfig.for_model(name).to_json_string(use_diff=False))
    for architecture in family.architectures:
        spec = spec_from_config(config | {"architectures": [architecture]})
        assert spec.family == name and spec.task == family.architectures[architecture]


def test_shapes_have_the_published_sizes() -> None:
    import math

    from snello.models.parameters import parameter_shapes

    millions = {"smollm2-135m": 134.5, "qwen3-0.6b": 596.0, "tinyllama-1.1b": 1100.0, "llama-3.2-1b": 1235.8}
    millions |= {"llama-3.2-3b": 3212.7, "dart-v2-moe": 165.7}
    assert millions.keys() == SHAPES.keys()
    for name, expected in millions.items():
        counted = sum(math.prod(shape) for shape in parameter_shapes(spec_of_shape(name)).values()) / 1e6
        assert counted == pytest.approx(expected, abs=0.1), name
