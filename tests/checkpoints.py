"""Small random checkpoints in Hugging Face format, for tests: every family, odd shapes, a real tokenizer.

Shapes are odd on purpose: head_dim 80, one KV head, a vocabulary that is no multiple of 16. Weights are larger than an
initializer would make them, so that attention and activations do something.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

DECODER: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 80,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ENCODER: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}

GPT2: dict[str, Any] = {
    "vocab_size": 307,
    "n_embd": 96,
    "n_inner": 200,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
OPT: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 96,
    "word_embed_proj_dim": 96,
    "ffn_dim": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
NEOX: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
PHI3: dict[str, Any] = {key: value for key, value in DECODER.items() if key != "head_dim"}
PHI3 |= {"num_hidden_layers": 2, "num_key_value_heads": 2, "pad_token_id": 0}
GEMMA: dict[str, Any] = DECODER | {
    "num_hidden_layers": 2,
    "tie_word_embeddings": True,
    "sliding_window": 33,
    "query_pre_attn_scalar": 50,
    "final_logit_softcapping": 8.0,
    "pad_token_id": 0,
}

MIXTURE: dict[str, Any] = DECODER | {"num_hidden_layers": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", DECODER),
    "llama-tied-bias": (
        "LlamaForCausalLM",
        DECODER | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral-window": ("MistralForCausalLM", DECODER | {"sliding_window": 33}),
    "qwen2": ("Qwen2ForCausalLM", {k: v for k, v in DECODER.items() if k != "head_dim"} | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", DECODER | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "lfm2": (
        "Lfm2ForCausalLM",
        {key: value for key, value in DECODER.items() if key != "head_dim"}
        | {"num_key_value_heads": 2, "block_multiple_of": 8, "layer_types": ["conv", "full_attention", "conv"]}
        | {"tie_word_embeddings": True, "pad_token_id": None},
    ),
    "mixtral": ("MixtralForCausalLM", MIXTURE | {"num_local_experts": 5, "intermediate_size": 72}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        MIXTURE
        | {"num_hidden_layers": 3, "num_experts": 7, "moe_intermediate_size": 40, "mlp_only_layers": [1]}
        | {"num_experts_per_tok": 3, "tie_word_embeddings": True, "norm_topk_prob": False},
    ),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "opt": ("OPTForCausalLM", OPT),
    "gpt-neox": ("GPTNeoXForCausalLM", NEOX),
    "phi3": ("Phi3ForCausalLM", PHI3 | {"partial_rotary_factor": 0.75, "sliding_window": 40}),
    "gemma2": ("Gemma2ForCausalLM", GEMMA | {"attn_logit_softcapping": 4.0}),
    "gemma3": (
        "Gemma3ForCausalLM",
        GEMMA | {"num_key_value_heads": 2, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "bert-mlm": ("BertForMaskedLM", ENCODER),
    "bert-classify": ("BertForSequenceClassification", ENCODER | {"num_labels": 3}),
    "distilbert-mlm": (
        "DistilBertForMaskedLM",
        {"vocab_size": 307, "dim": 96, "hidden_dim": 200, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128},
    ),
}
MIXTURES = ("mixtral", "qwen3-moe")
CONVOLVING = ("lfm2",)
DENSE = [name for name in VARIANTS if name not in (*MIXTURES, *CONVOLVING)]
DECODERS = [name for name, (architecture, _) in VARIANTS.items() if architecture.endswith(("CausalLM", "LMHeadModel"))]


def make_checkpoint(path: Path, variant: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Writes a random checkpoint of `variant` to `path` and returns it."""
    architecture, options = VARIANTS[variant]
    model_class = getattr(transformers, architecture)
    torch.manual_seed(seed)
    config = model_class.config_class(**options)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.2 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.tie_weights()
    model.to(dtype).save_pretrained(path)
    write_tokenizer(path, config.vocab_size)
    return path


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """A byte-level tokenizer of `vocab_size` ids: an end token, the bytes, and made-up merges of letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|end|>": 0} | {letter: index + 1 for index, letter in enumerate(letters)}
    merges: list[tuple[str, str]] = []
    for first in "etaoinshr":
        for second in "etaoinshr":
            if len(vocab) < vocab_size:
                merges.append((first, second))
                vocab.setdefault(first + second, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "bos_token": "<|end|>"}))
