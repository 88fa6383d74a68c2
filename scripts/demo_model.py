"""What `demo` is and how it learns: its shape, its two optimizers, its loss and the measure of it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.demo_data import CONTEXT, END_ID, VOCABULARY

PEAK_RATE = 3e-3


def demo_config() -> LlamaConfig:
    """The shape of `demo`: about 9.7 million parameters, one key-value head for each head."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=896,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
    )


def new_model(seed: int) -> LlamaForCausalLM:
    """A model with random weights; what writes into the residual stream starts smaller with depth."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(demo_config())
    scale = 1.0 / math.sqrt(2 * model.config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(scale)
    return model


def optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the gains.

    Muon (Jordan et al. 2024) orthogonalizes the momentum of a matrix; on a small budget of tokens it reaches a loss
    with far fewer of them than AdamW. Its rate is matched to AdamW's update size (Liu et al. 2025), so both share one
    schedule.
    """
    named = dict(model.named_parameters())
    matrices = [value for name, value in named.items() if value.ndim == 2 and "embed" not in name]
    others = [value for name, value in named.items() if value.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=PEAK_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def losses(model: LlamaForCausalLM, rows: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Nats of every target token of the rows, flat."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, windows: list[list[int]], token_bytes: npt.NDArray[np.int64], bf16: bool
) -> dict[str, float]:
    """Nats per token and bits per byte over the windows; `bf16` is fast, without it the result is exact."""
    nats, tokens, size = 0.0, 0, 0
    model.eval()
    for window in windows:
        nats += float(losses(model, torch.tensor([window]), bf16).sum())
        tokens += len(window) - 1
        size += int(token_bytes[window[1:]].sum())
    model.train()
    bits = nats / math.log(2)
    return {"nats_per_token": nats / tokens, "bits_per_byte": bits / size, "tokens": tokens, "bytes": size}
