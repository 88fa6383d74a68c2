"""Where a loss comes from: the dequantized weights in the plain torch reference, beside the executor.

The reference computes in FP32 with full-precision activations and cache, so what it loses is the fault of the weights;
what the executor loses beyond it is the fault of integer activations or an integer cache. Needs torch and memory for
the FP32 model; where either is missing, there is no number and the receipt says why.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from snello.measure.rulers import Reading
from snello.measure.text import Block

if TYPE_CHECKING:
    from snello.models.model import Model

MOST_TOKENS = 4_096
PIECE = 256  # tokens of each block: many short pieces bound the loss better than few long ones


def part(blocks: Sequence[Block]) -> tuple[list[int], list[Block]]:
    """Blocks spread over all, each cut to its first 256 tokens, about 4,096 together; their indices with them."""
    long = [i for i, block in enumerate(blocks) if len(block.tokens) > 2 * block.scored_from]
    stride = max(1, -(-len(long) * PIECE // MOST_TOKENS))
    chosen = long[::stride]
    return chosen, [dataclasses.replace(blocks[i], tokens=blocks[i].tokens[:PIECE]) for i in chosen]


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
