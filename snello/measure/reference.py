"""Where a loss comes from: the dequantized weights in the plain torch reference, beside the executor.

The reference computes in FP32 with full-precision activations and cache, so what it loses is the fault of the weights;
what the executor loses beyond it is the fault of integer activations or an integer cache. Needs torch, and memory for
one block in FP32; where either is missing, there is no number and the receipt says why.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from snello.measure.rulers import Reading
from snello.measure.text import Block
from snello.models.spec import Spec, linear_names, linear_shape

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
    needed = 8 * largest_part(model.spec)  # as it is read, and in FP32
    if needed > free_bytes:
        return f"the FP32 reference needs {needed / 1e9:.1f} GB, {free_bytes / 1e9:.1f} GB are free"
    return ""


def read(model: Model, blocks: Sequence[Block]) -> Reading:
    """Losses of the next token in the torch reference, in FP32."""
    import torch

    from snello.models.reference import streamed

    tokens = [torch.from_numpy(block.tokens.astype(np.int64)) for block in blocks]
    values = []
    with torch.inference_mode():
        for block, own, logits in zip(blocks, tokens, streamed(model, [one[None] for one in tokens]), strict=True):
            losses = torch.nn.functional.cross_entropy(logits[0, :-1].float(), own[1:], reduction="none")
            values.append(losses[block.scored_from - 1 :].numpy().astype(np.float32))
    return Reading(tuple(values))


def largest_part(spec: Spec) -> int:
    """Parameters of the largest block, or of the head: what is in memory at a time."""
    sizes: Counter[str] = Counter()
    for name in linear_names(spec):
        sizes[".".join(name.split(".")[:2])] += math.prod(linear_shape(spec, name))
    return max(sizes.values())
