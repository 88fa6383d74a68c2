"""Walks a model in the order of computation and writes its pruned copy, one layer in memory at a time.

First layers go, then hidden dimensions, by views that change nothing but what is read; then each layer's heads and
channels, on what the already pruned layers before it really give. The source stays memory-mapped and untouched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from snello.models import load
from snello.models.fewer_layers import FewerLayers
from snello.models.model import Floats
from snello.models.plain_folder import write_plain_folder
from snello.models.reference import Block, build_block
from snello.models.reference_layers import AttentionHalf, FeedForwardHalf, Half
from snello.models.spec import Attention, Spec
from snello.techniques.calibration import begin
from snello.techniques.prune import select
from snello.techniques.prune.calibrate import Stream, survey
from snello.techniques.prune.views import Narrower

if TYPE_CHECKING:
    from snello.models.model import Model, Weights
    from snello.techniques.base import Context
    from snello.techniques.calibration import Windows
    from snello.techniques.prune import Prune


@torch.inference_mode()
def prune(options: Prune, model: Model, context: Context) -> Model:
    planned = options.plan(model.spec)
    windows = begin(model, planned, context)
    spec, weights, found = _outer(model, planned, windows, context)
    walk = LayerWalk(options, spec, planned, weights, windows, context)
    entry = {"technique": "prune", "options": dataclasses.asdict(options), "seed": context.seed, **found}
    write_plain_folder(context.output, planned, model, (*model.history, entry), walk.values)
    return load(context.output)


def _outer(model: Model, planned: Spec, windows: Windows, context: Context) -> tuple[Spec, Weights, dict[str, Any]]:
    """Layers and hidden dimensions: the spec and a view of the weights after both, and what was measured."""
    spec, found = model.spec, dict[str, Any]()
    weights: Weights = model.weights
    if len(planned.layers) < len(spec.layers):
        seen = survey(spec, weights, windows, _told(context, "influence of layers"))
        kept = select.least_influence(seen.influence, len(planned.layers))
        found = {"influence": [float(f"{value:.4g}") for value in seen.influence], "layers_kept": kept}
        spec, weights = dataclasses.replace(spec, layers=spec.layers[: len(kept)]), FewerLayers(weights, kept)
    if planned.hidden_size < spec.hidden_size:
        seen = survey(spec, weights, windows, _told(context, "loudness of dimensions"))
        dims = select.top(seen.loudness, planned.hidden_size)
        gains = {name: select.norm_correction(power, dims) for name, power in seen.energy.items()}
        spec, weights = dataclasses.replace(spec, hidden_size=len(dims)), Narrower(weights, spec, dims.numpy(), gains)
    return spec, weights, found


def _told(context: Context, message: str) -> Callable[[float], None]:
    return lambda fraction: context.progress(f"prune: {message}", fraction)


class LayerWalk:
    """Gives every parameter of the result, asked for in the order of computation; holds one layer."""

    def __init__(
        self, options: Prune, spec: Spec, planned: Spec, weights: Weights, windows: Windows, context: Context
    ) -> None:
        self.options, self.spec, self.planned, self.weights, self.context = options, spec, planned, weights, context
        mixer, target = spec.layers[0].mixer, planned.layers[0].mixer
        assert isinstance(mixer, Attention) and isinstance(target, Attention)
        self.mixer, self.target = mixer, target
        self.inside = spec.layers[0] != planned.layers[0]
        self.stream = Stream(spec, weights, windows) if self.inside else None
        self.index, self.layer = -1, dict[str, Floats]()

    def values(self, name: str) -> Floats:
        if self.stream is None or not name.startswith("layers."):
            return self.weights.values(name)
        index = int(name.split(".")[1])
        if index != self.index:
            assert index == self.index + 1, "layers are asked for in order"
            self.context.progress(f"prune layer {index}", index / len(self.spec.layers))
            block = self._pruned(build_block(self.spec, index, self.weights), self.stream)
            parameters = block.named_parameters()
            self.layer = {f"layers.{index}.{key}": parameter.numpy() for key, parameter in parameters}
            self.index = index
        return self.layer[name]

    def _pruned(self, block: Block, stream: Stream) -> Block:
        if self.target.num_heads < self.mixer.num_heads:
            self._fewer_heads(block, stream)
        stream.walk(block, block.attention)
        if self.planned.layers[0].feed_forward.width < self.spec.layers[0].feed_forward.width:
            self._fewer_channels(block, stream)
        stream.walk(block, block.ffn)
        return block

    def _fewer_heads(self, block: Block, stream: Stream) -> None:
        half, size, groups = block.attention, self.mixer.head_dim, self.target.num_kv_heads
        assert isinstance(half, AttentionHalf)
        gram = stream.gram(half)
        scores = select.energy(half.o.weight, gram, size)
        queries, keys = select.heads(scores, self.mixer.num_kv_heads, groups, self.target.num_heads // groups)
        self._shrink(half, {"q": select.expand(queries, size)}, select.expand(queries, size), gram)
        self._shrink(half, dict.fromkeys("kv", select.expand(keys, size)), None, gram)
        half.mixer = self.target

    def _fewer_channels(self, block: Block, stream: Stream) -> None:
        half = block.ffn
        assert isinstance(half, FeedForwardHalf)
        gram = stream.gram(half)
        kept = select.top(select.energy(half.down.weight, gram, 1), self.planned.layers[0].feed_forward.width)
        self._shrink(half, dict.fromkeys(half.inputs, kept), kept, gram)

    def _shrink(self, half: Half, rows: dict[str, Tensor], columns: Tensor | None, gram: Tensor) -> None:
        """Keeps these rows of the linears that make the channels, and these columns of the one that reads them."""
        for name, kept in rows.items():
            linear = half.get_submodule(name)
            for key, parameter in list(linear.named_parameters()):
                setattr(linear, key, nn.Parameter(parameter[kept].contiguous(), requires_grad=False))
        if columns is not None:
            linear = half.get_submodule(half.output)
            weight = linear.get_parameter("weight")
            less = select.compensated(weight, gram, columns) if self.options.compensate else weight[:, columns]
            linear.weight = nn.Parameter(less.contiguous(), requires_grad=False)
