"""Convolutions in the place of attention, in a checkpoint that no stock configuration can say.

Stock Transformers would load such a folder with a warning and random attention, so its config.json does not call itself
what it was: model_type is our own, and `snello_convolutions` beside it says which layers convolve and what the model
was made of. All other keys and names are the family's; those of a convolution are LFM2's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from snello.errors import SnelloError
from snello.models.spec import MAX_KERNEL, ShortConvolution, Spec

KEY = "snello_convolutions"
OWN = ("model_type", "architectures")  # what is replaced, and kept inside
FAMILIES_WITH = ("llama", "mistral", "qwen2", "qwen3")  # whose blocks are alike in names and norms
STEM = "model.layers.{i}.conv"


def convolving_layers(spec: Spec) -> list[int]:
    return [index for index, layer in enumerate(spec.layers) if isinstance(layer.mixer, ShortConvolution)]


def state(config: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """The config of the model that attends everywhere -> that of `spec`, whose convolutions are all alike."""
    layers = convolving_layers(spec)
    mixer = spec.layers[layers[0]].mixer
    assert isinstance(mixer, ShortConvolution)
    told = {key: config[key] for key in OWN if key in config}
    made = {"layers": layers, "kernel": mixer.kernel, "bias": mixer.bias, "of": told}
    return {**config, "model_type": KEY, "architectures": ["SnelloConvolutions"], KEY: made}


def unwrap(values: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """The config as it was, and what is said of convolutions; None: nothing."""
    made = values.get(KEY)
    if made is None:
        return dict(values), None
    if not isinstance(made, dict) or set(made) != {"layers", "kernel", "bias", "of"} or not _fits(made):
        raise SnelloError(f"config.json: {KEY} is not what this version writes", "make or copy the folder again")
    rest = {key: value for key, value in values.items() if key not in (KEY, *OWN)}
    return {**rest, **made["of"]}, made


def _fits(made: Mapping[str, Any]) -> bool:
    layers, kernel = made["layers"], made["kernel"]
    numbers = isinstance(layers, list) and layers and all(type(layer) is int and layer >= 0 for layer in layers)
    sized = type(kernel) is int and 1 <= kernel <= MAX_KERNEL
    return bool(numbers and sized and type(made["bias"]) is bool and isinstance(made["of"], dict))


def applied(spec: Spec, made: Mapping[str, Any]) -> Spec:
    """The spec of the config as it was -> with these layers convolving."""
    layers = list(spec.layers)
    if max(made["layers"]) >= len(layers):
        raise SnelloError(
            f"config.json: {KEY} names layer {max(made['layers'])} of {len(layers)}", "make or copy the folder again"
        )
    for index in made["layers"]:
        mixer = ShortConvolution(kernel=made["kernel"], bias=made["bias"])
        layers[index] = dataclasses.replace(layers[index], mixer=mixer)
    return dataclasses.replace(spec, layers=tuple(layers))


def attending(spec: Spec) -> Spec:
    """The spec that the config without our key describes: convolutions are attention like that of other layers."""
    mixer = next(layer.mixer for layer in spec.layers if not isinstance(layer.mixer, ShortConvolution))
    layers = tuple(
        dataclasses.replace(layer, mixer=mixer) if isinstance(layer.mixer, ShortConvolution) else layer
        for layer in spec.layers
    )
    return dataclasses.replace(spec, layers=layers)
