"""Twins: models that compute the same function as a real one, with outliers that the original does not have.

`scaled_channels` makes 1% of channels loud where a later linear can undo it exactly (powers of two): at norm outputs,
in the pairs up/down and V/O. `rotated_stream` turns the residual stream to its principal basis, so that a few channels
carry most of the energy, as in large models. A quantizer that treats a twin worse is fooled by a choice of basis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from snello.models.model import Model
from snello.models.reference import Reference
from snello.models.spec import Attention, Format, Spec

Arrays = dict[str, np.ndarray]
FRACTION = 0.01
POWERS = (4, 5, 6)


class DictWeights:
    """`Weights` held in memory."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def names(self) -> list[str]:
        return list(self.arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def values(self, name: str) -> np.ndarray:
        return np.array(self.arrays[name], dtype=np.float32)


def in_memory(model: Model, spec: Spec, arrays: Arrays, name: str) -> Model:
    """A model with these weights and the tokenizer of another; FP32, so that nothing is rounded on the way."""
    spec = dataclasses.replace(spec, default_format=Format(weights="fp32"), cache_format="fp32")
    return Model(spec=spec, weights=DictWeights(arrays), path=model.path, name=name)


def arrays_of(model: Model) -> Arrays:
    return {name: model.weights.values(name) for name in model.weights.names()}


def scaled_channels(model: Model, seed: int = 0) -> Model:
    """Loud channels at every place where a power of two can be moved through. Pre-norm decoders with gated halves."""
    arrays, random = arrays_of(model), np.random.default_rng(seed)
    for index, layer in enumerate(model.spec.layers):
        assert layer.norms == "pre" and layer.feed_forward.gated and isinstance(layer.mixer, Attention)
        stem = f"layers.{index}"
        for half, consumers in (("attention", "qkv"), ("ffn", ("gate", "up"))):
            gains = loud(model.spec.hidden_size, random)
            arrays[f"{stem}.{half}.norm.weight"] *= gains
            for part in consumers:
                arrays[f"{stem}.{half}.{part}.weight"] /= gains
        gains = loud(layer.feed_forward.width, random)
        _scale_rows(arrays, f"{stem}.ffn.up", gains)
        arrays[f"{stem}.ffn.down.weight"] /= gains
        mixer = layer.mixer
        gains = loud(mixer.num_kv_heads * mixer.head_dim, random)
        _scale_rows(arrays, f"{stem}.attention.v", gains)
        repeated = gains.reshape(mixer.num_kv_heads, mixer.head_dim).repeat(mixer.num_heads // mixer.num_kv_heads, 0)
        arrays[f"{stem}.attention.o.weight"] /= repeated.reshape(-1)
    return in_memory(model, model.spec, arrays, f"{model.name} with loud channels")


def rotated_stream(model: Model, windows: Sequence[np.ndarray]) -> Model:
    """The residual stream in its principal basis. Gains move into the linears behind the norms, the head is untied."""
    spec, arrays = model.spec, arrays_of(model)
    assert spec.norm.kind == "rms" and spec.norm.gain_offset == 0 and spec.embedding.learned_positions == 0
    basis = principal_basis(model, windows)  # (D, D), orthogonal, in double
    head = arrays.get("head.weight", arrays["embedding.tokens.weight"])
    arrays["head.weight"] = _turn_inputs(head, arrays["norm.weight"], basis)
    arrays["norm.weight"] = np.ones_like(arrays["norm.weight"])
    arrays["embedding.tokens.weight"] = (arrays["embedding.tokens.weight"] @ basis).astype(np.float32)
    for index in range(len(spec.layers)):
        for half, consumers, producer in (("attention", "qkv", "o"), ("ffn", ("gate", "up"), "down")):
            stem = f"layers.{index}.{half}"
            for part in consumers:
                name = f"{stem}.{part}.weight"
                arrays[name] = _turn_inputs(arrays[name], arrays[f"{stem}.norm.weight"], basis)
            arrays[f"{stem}.norm.weight"] = np.ones_like(arrays[f"{stem}.norm.weight"])
            for leaf in ("weight", "bias"):
                if f"{stem}.{producer}.{leaf}" in arrays:
                    name = f"{stem}.{producer}.{leaf}"
                    arrays[name] = (basis.T @ arrays[name]).astype(np.float32)
    untied = dataclasses.replace(spec, head=dataclasses.replace(spec.head, tied=False))
    return in_memory(model, untied, arrays, f"{model.name} in its principal basis")


@torch.inference_mode()
def principal_basis(model: Model, windows: Sequence[np.ndarray]) -> np.ndarray:
    """Eigenvectors of the stream's second moments over all blocks, each row normalized first as the norms do."""
    reference, moments = Reference.from_model(model), torch.zeros(model.spec.hidden_size, model.spec.hidden_size)
    for window in windows:
        x = reference.embedding(torch.from_numpy(window.astype(np.int64))[None])
        for block in reference.layers:
            x = block(x)
            rows = x[0] / x[0].square().mean(-1, keepdim=True).sqrt()
            moments += rows.T @ rows
    basis: np.ndarray = torch.linalg.eigh(moments.double()).eigenvectors.flip(1).numpy()
    return basis


def loud(channels: int, random: np.random.Generator) -> np.ndarray:
    """Ones, and powers of two on 1% of channels (at least two)."""
    gains = np.ones(channels, np.float32)
    chosen = random.choice(channels, max(2, round(FRACTION * channels)), replace=False)
    gains[chosen] = 2.0 ** random.choice(POWERS, len(chosen))
    return gains


def _scale_rows(arrays: Arrays, linear: str, gains: np.ndarray) -> None:
    arrays[f"{linear}.weight"] *= gains[:, None]
    if f"{linear}.bias" in arrays:
        arrays[f"{linear}.bias"] *= gains


def _turn_inputs(weight: np.ndarray, gain: np.ndarray, basis: np.ndarray) -> np.ndarray:
    turned: np.ndarray = ((weight * gain).astype(np.float64) @ basis).astype(np.float32)
    return turned
