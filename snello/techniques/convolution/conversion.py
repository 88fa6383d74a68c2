"""What becomes of a spec whose attention is replaced in some layers, by arithmetic alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from snello.errors import Unsupported
from snello.models.families.convolutions import FAMILIES_WITH
from snello.models.families.lfm2 import renamed
from snello.models.spec import ShortConvolution, Spec
from snello.techniques.units import check_plain_blocks, layer_numbers

LEAST = "least"
LEAST_KEPT = 0.25


def named_layers(text: str) -> frozenset[int] | None:
    """ "least" -> None, "0,2,5-7" -> {0, 2, 5, 6, 7}."""
    return layer_numbers(text, LEAST)


def convert(spec: Spec, *, keep: float, kernel: int, layers: frozenset[int] | None) -> Spec:
    """The planned spec; `layers` None: as many of the last as `keep` leaves.

    Raises:
        Unsupported: the model cannot be so, too little attention would be left, or nothing would change.
    """
    check(spec)
    count = len(spec.layers)
    if layers is None:
        fewer = int(count * (1 - keep) + 1e-9)
        if not fewer:
            raise Unsupported(f"keep={keep} of {count} layers replaces none", _one_less(count))
        return with_convolutions(spec, range(count - fewer, count), kernel)
    if max(layers) >= count:
        raise Unsupported(f"there is no layer {max(layers)}", f"this model has layers 0 to {count - 1}")
    if count - len(layers) < LEAST_KEPT * count:
        raise Unsupported(
            f"{count - len(layers)} of {count} layers would keep their attention", "a quarter must, at the least"
        )
    return with_convolutions(spec, layers, kernel)


def _one_less(count: int) -> str:
    """A hint: the largest `keep` of two digits that leaves one layer of so many without attention."""
    if count == 1:
        return "a model of one layer keeps its attention"
    return f"keep={math.floor(100 * (count - 1) / count) / 100:g} replaces one"


def with_convolutions(spec: Spec, layers: Iterable[int], kernel: int) -> Spec:
    """A Qwen3 without biases becomes an LFM2, which says it; others keep their name, and no stock config does."""
    mixer, chosen = ShortConvolution(kernel=kernel, bias=True), frozenset(layers)
    changed = (
        dataclasses.replace(layer, mixer=mixer) if index in chosen else layer for index, layer in enumerate(spec.layers)
    )
    return renamed(dataclasses.replace(spec, layers=tuple(changed)))


def check(spec: Spec) -> None:
    """Decoders with equal dense layers, in their own number type, whose names leave room for a convolution."""
    check_plain_blocks(spec, "convolution")
    if not spec.causal or spec.family not in FAMILIES_WITH:
        raise Unsupported(f"convolution: a {spec.family} {spec.task} model", f"decoders: {', '.join(FAMILIES_WITH)}")
    if set(spec.layers) != {spec.layers[0]}:
        raise Unsupported("convolution: the layers of this model differ", "models with equal layers are supported")
    if spec.formats or spec.cache_format != spec.default_format.weights:
        raise Unsupported("convolution: this model mixes number formats", "convert the original first, then quantize")
