"""How loud each channel of a linear's input is, known from the weights of what produces it: no text needed.

A norm makes a channel as loud as its gain, a value head as loud as its row of V, a feed-forward channel as loud as its
row of `up`. Together with the weights that read it this gives the input scale of round-to-nearest, and makes it blind
to every rescaling that a model can hide in such a pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snello.models.model import Model
from snello.models.spec import Attention, ShortConvolution, Spec


def estimate(model: Model, input_name: str) -> Tensor:
    """Relative RMS (K) of the channels of an input, by its canonical name."""
    stem, _, last = input_name.rpartition(".")
    if last == "mixed":
        return _value_rows(model, stem)
    if last == "hidden":
        return _row_rms(model, f"{stem}.up.weight")
    norm = norm_before(model.spec, input_name)
    if norm is None:
        return torch.ones(model.spec.hidden_size)
    return (torch.from_numpy(model.weights.values(f"{norm}.weight")) + model.spec.norm.gain_offset).abs()


def norm_before(spec: Spec, input_name: str) -> str | None:
    """The norm whose output this is; None where a raw sum is read."""
    if input_name == "head.in" and spec.head.transform is not None:
        return "head.transform.norm"
    if input_name.startswith("head."):
        return "norm" if spec.final_norm else _last_norm(spec, len(spec.layers))
    _, index, half, _ = input_name.split(".")
    if spec.layers[int(index)].norms != "post":
        return f"layers.{index}.{half}.norm"
    return f"layers.{index}.attention.norm" if half == "ffn" else _last_norm(spec, int(index))


def _last_norm(spec: Spec, index: int) -> str | None:
    """The norm that ends the block before `index`, or the embedding."""
    if index == 0:
        return "embedding.norm" if spec.embedding.norm else None
    return f"layers.{index - 1}.ffn.norm" if spec.layers[index - 1].norms == "post" else None


def _value_rows(model: Model, stem: str) -> Tensor:
    mixer = model.spec.layers[int(stem.split(".")[1])].mixer
    if isinstance(mixer, ShortConvolution):
        return _convolved_rows(model, stem, biased=mixer.bias)
    assert isinstance(mixer, Attention)
    rows = _row_rms(model, f"{stem}.v.weight").reshape(mixer.num_kv_heads, mixer.head_dim)
    return rows.repeat_interleave(mixer.num_heads // mixer.num_kv_heads, dim=0).flatten()  # (H * E)


def _convolved_rows(model: Model, stem: str, *, biased: bool) -> Tensor:
    """c * conv(b * x), as if the three were independent and positions too."""
    power = torch.from_numpy(model.weights.values(f"{stem}.taps.weight")).square().sum(0)
    for part in ("b", "c", "x"):
        rows = _row_rms(model, f"{stem}.{part}.weight").square()
        shift = torch.from_numpy(model.weights.values(f"{stem}.{part}.bias")).square() if biased else 0.0
        power = power * (rows + shift)
    return power.sqrt()


def _row_rms(model: Model, name: str) -> Tensor:
    return torch.from_numpy(model.weights.values(name)).square().mean(1).sqrt()
