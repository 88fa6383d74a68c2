"""Walks a model in the order of computation and writes its copy with convolutions, one block in memory at a time.

First the influence of every attention layer is measured on the original; then those of least are replaced, each fitted
on what the already replaced layers before it really give. The source stays memory-mapped and untouched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from snello.models import load
from snello.models.families.convolutions import convolving_layers
from snello.models.model import Floats
from snello.models.parameters import parameter_shapes
from snello.models.plain_folder import write_plain_folder
from snello.models.reference import Block, build_block, build_embedding
from snello.models.spec import Spec
from snello.techniques.calibration import Windows, begin, block_influence, together
from snello.techniques.convolution.conversion import named_layers, with_convolutions
from snello.techniques.convolution.fit import fit, moments

if TYPE_CHECKING:
    from snello.models.model import Model
    from snello.techniques.base import Context
    from snello.techniques.convolution import Convolution


@torch.inference_mode()
def replace_attention(options: Convolution, model: Model, context: Context) -> Model:
    planned = options.plan(model.spec)
    windows = begin(model, planned, context)
    entry = {"technique": "convolution", "options": dataclasses.asdict(options), "seed": context.seed}
    if named_layers(options.layers) is None:
        influence = attention_influence(model, windows, lambda part: context.progress("convolution: influence", part))
        least = least_influence(influence, len(convolving_layers(planned)))
        planned = with_convolutions(model.spec, least, options.kernel)
        entry["influence"] = [float(f"{value:.4g}") for value in influence]
    entry["layers"] = convolving_layers(planned)
    walk = LayerWalk(model, planned, windows, context, options.kernel)
    entry["unexplained"] = walk.unexplained  # filled while weights are written, before the history is
    if planned.family == model.spec.family:
        entry["note"] = "no stock configuration says this model: its folder is for this engine only"
    write_plain_folder(context.output, planned, model, (*model.history, entry), walk.values)
    return load(context.output)


def attention_influence(model: Model, windows: Windows, progress: Callable[[float], None]) -> list[float]:
    """1 - cos(x, x + attention(x)) of each layer."""
    hidden, found, count = embedded(model, windows), list[float](), len(model.spec.layers)
    for index in range(count):
        progress(index / count)
        block = build_block(model.spec, index, model.weights)
        after = [block.attention(x) for x in hidden]
        found.append(block_influence(hidden, after))
        hidden = [block.ffn(x) for x in after]
    return found


def least_influence(influence: list[float], count: int) -> list[int]:
    """Ties: the later layer."""
    return sorted(sorted(range(len(influence)), key=lambda index: (influence[index], -index))[:count])


def embedded(model: Model, windows: Windows) -> list[Tensor]:
    embedding = build_embedding(model.spec, model.weights)
    return [embedding(tokens) for tokens in together(windows)]


class LayerWalk:
    """Gives every parameter of the result, asked for in the order of computation; holds one block.

    `unexplained`: of each replaced layer, the share of attention's energy that its convolution misses at first.
    """

    def __init__(self, model: Model, planned: Spec, windows: Windows, context: Context, kernel: int) -> None:
        self.model, self.planned, self.context, self.kernel = model, planned, context, kernel
        self.hidden = embedded(model, windows)
        self.convolving = frozenset(convolving_layers(planned))
        self.unexplained: list[float] = []
        self.index, self.layer = -1, dict[str, Floats]()
        self.shapes = parameter_shapes(planned)

    def values(self, name: str) -> Floats:
        if not name.startswith("layers."):
            return self.model.weights.values(name)
        index = int(name.split(".")[1])
        if index not in self.convolving and index > max(self.convolving):
            return self.model.weights.values(name)
        while self.index < index:
            self._walk()
        assert index == self.index, "layers are asked for in order"
        values = self.layer[name] if name in self.layer else self.model.weights.values(name)
        assert values.shape == self.shapes[name]
        return values

    def _walk(self) -> None:
        """Past one more block."""
        self.index, self.layer = self.index + 1, {}
        self.context.progress(f"convolution layer {self.index}", self.index / len(self.planned.layers))
        block = build_block(self.model.spec, self.index, self.model.weights)
        if self.index in self.convolving:
            block = self._replaced(block)
        self.hidden = [block(x) for x in self.hidden]

    def _replaced(self, block: Block) -> Block:
        fitted = fit(moments(block.attention, self.hidden, self.kernel), self.kernel)
        self.unexplained.append(float(f"{fitted.unexplained:.4g}"))
        made = Block(self.planned, self.index)
        made.ffn, made.attention.norm = block.ffn, block.attention.norm
        for name, value in fitted.parameters.items():
            path, _, leaf = name.rpartition(".")
            setattr(made.attention.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
            self.layer[f"layers.{self.index}.attention.{name}"] = value.numpy()
        return made
