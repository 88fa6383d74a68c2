"""Where a loss comes from: the dequantized weights in the plain torch reference, beside the executor.

The reference computes in FP32 with full-precision activations and cache, so what it loses is the fault of the weights;
what the executor loses beyond it is the fault of integer activations or an integer cache. Needs torch and memory for
the FP32 model; where either is missing, there is no number and the receipt says why.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from snello.measure.rulers import Reading
from snello.measure.text import Block

if TYPE_CHECKING:
    from snello.models.model import Model

MOST_TOKENS = {"select": 2_048, "proof": 4_096}


def part(blocks: Sequence[Block], most_tokens: int) -> list[int]:
    """Indices of blocks, spread over all, that hold about `most_tokens` tokens."""
    total = sum(len(block.tokens) for block in blocks)
    stride = max(1, -(-total // most_tokens))
    return list(range(0, len(blocks), stride))


def why_not(model: Model, free_bytes: int) -> str:
    """Why the reference cannot run here; empty if it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    if model.spec.task != "causal-lm":
        return "for decoders only"
    needed = 6 * model.num_parameters
    if needed > free_bytes:
        return f"the FP32 reference needs {needed / 1e9:.1f} GB, {free_bytes / 1e9:.1f} GB are free"
    return ""


def read(model: Model, blocks: Sequence[Block]) -> Reading:
    """Losses of the next token in the torch reference, in FP32."""
    import torch

    from snello.models.reference import Reference

    reference = Reference.from_model(model, torch.float32).eval()
    values = []
    with torch.inference_mode():
        for block in blocks:
            tokens = torch.from_numpy(block.tokens.astype(np.int64))
            logits = reference(tokens[None])[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits.float(), tokens[1:], reduction="none")
            values.append(losses[block.scored_from - 1 :].numpy().astype(np.float32))
    return Reading(tuple(values))
