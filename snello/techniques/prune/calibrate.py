"""Calibration text on its way through a model, one block's weights in memory at a time.

Two looks: `survey` walks the model as it is and says how much each layer turns its input and how loud each hidden
dimension is; `Stream` carries the hidden rows so that a caller can look at the input of a half's last linear, shrink
the half, and let everything later see the model as it will be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from snello.models.model import Weights
from snello.models.reference import Block, build_block, build_embedding, build_head
from snello.models.reference_layers import Half
from snello.models.spec import Spec
from snello.techniques.calibration import Windows, block_influence


@dataclass(frozen=True)
class Survey:
    """`influence` of each layer; `loudness` (D) of hidden dimensions; `energy` of x^2 (D) before each norm, by name."""

    influence: list[float]
    loudness: Tensor
    energy: dict[str, Tensor]


class Stream:
    """Hidden rows (1, T, D) of every window, at one place of the model."""

    def __init__(self, spec: Spec, weights: Weights, windows: Windows) -> None:
        embedding = build_embedding(spec, weights)
        self.hidden = [embedding(torch.from_numpy(window.astype(np.int64))[None]) for window in windows]

    def gram(self, half: Half) -> Tensor:
        """X^T X (K, K) of the rows that the last linear of this half reads, in FP64, a row on average."""
        total: Tensor | None = None
        count = 0
        for x in self.hidden:
            rows = half.inner(half.prepare(x), None).flatten(0, 1).double()
            total = rows.T @ rows if total is None else total.addmm_(rows.T, rows)
            count += len(rows)
        assert total is not None
        return total / count

    def walk(self, block: Block, half: Half) -> None:
        """Past a half. Both halves of a parallel block read its input, which stays until the second is done."""
        if not block.parallel:
            self.hidden = [half(x) for x in self.hidden]
        elif half is block.ffn:
            self.hidden = [block(x) for x in self.hidden]


def survey(spec: Spec, weights: Weights, windows: Windows, progress: Callable[[float], None]) -> Survey:
    """Block influence is that of ShortGPT (arXiv:2403.03853), loudness that of Minitron (arXiv:2407.14679)."""
    stream = Stream(spec, weights, windows)
    influence, energy = [], dict[str, Tensor]()
    loudness = torch.zeros(spec.hidden_size, dtype=torch.float64)
    for index in range(len(spec.layers)):
        progress(index / len(spec.layers))
        block, before = build_block(spec, index, weights), stream.hidden
        for name, half in _halves(block):
            energy[f"layers.{index}.{name}.norm"] = _mean(stream.hidden, torch.square)
            loudness += _mean([half.norm(x) for x in stream.hidden], torch.abs)
            stream.walk(block, half)
        influence.append(block_influence(before, stream.hidden))
    if spec.final_norm:
        tail = build_head(spec, weights)
        energy["norm"] = _mean(stream.hidden, torch.square)
        loudness += _mean([tail.normed(x) for x in stream.hidden], torch.abs)
    return Survey(influence, loudness, energy)


def _halves(block: Block) -> tuple[tuple[str, Half], ...]:
    return ("attention", block.attention), ("ffn", block.ffn)


def _mean(hidden: Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> Tensor:
    rows = torch.cat([x.flatten(0, 1) for x in hidden])
    return function(rows).double().mean(0)
