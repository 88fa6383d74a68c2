"""What becomes of a spec, by arithmetic alone.

A family may change its name with its attention, where another family of Transformers is the same block and can say the
window: Llama becomes Mistral, BERT becomes Longformer.
"""

from __future__ import annotations

import dataclasses

from snello.errors import Unsupported
from snello.models.spec import Attention, Layer, Spec

GLOBAL_ROWS = 1  # [CLS]
LEAST_WINDOW = 4  # Transformers' own Longformer fails with 2


def convert(
    spec: Spec, *, window: int, sinks: int, layers: frozenset[int] | None, positions: int, kv_heads: int
) -> Spec:
    """The planned spec; `layers` None: all of them.

    Raises:
        Unsupported: the model cannot be so, or nothing would change.
    """
    check(spec)
    if not (window or kv_heads):
        raise Unsupported("attention was asked to change nothing", "window=1024 with sinks=4, or kv_heads=2")
    if not spec.causal:
        return _long_encoder(spec, window, sinks, layers, positions, kv_heads)
    if positions:
        raise Unsupported("positions are repeated in encoders only", "a decoder keeps the positions it was trained on")
    if kv_heads:
        spec = _grouped(spec, kv_heads)
    return _renamed(_windowed(spec, window, sinks, layers)) if window else spec


def check(spec: Spec) -> None:
    """Dense attention models in their own number type."""
    for index, layer in enumerate(spec.layers):
        if not isinstance(layer.mixer, Attention):
            raise Unsupported(f"attention: {type(layer.mixer).__name__} in layer {index}", "attention is supported")
        if layer.feed_forward.experts is not None:
            raise Unsupported(f"attention: experts in layer {index}", "dense feed-forward layers are supported")
    if spec.formats or spec.cache_format != spec.default_format.weights:
        raise Unsupported("attention: this model mixes number formats", "change the original first, then quantize")


def mixers(spec: Spec) -> list[Attention]:
    return [layer.mixer for layer in spec.layers if isinstance(layer.mixer, Attention)]


def _windowed(spec: Spec, window: int, sinks: int, layers: frozenset[int] | None) -> Spec:
    if window + sinks >= spec.max_positions:
        raise Unsupported(
            f"a window of {window} with {sinks} sinks is no less than this model's {spec.max_positions} positions",
            f"window={max(1, spec.max_positions // 4)} is a good start",
        )
    chosen = _chosen(spec, layers)
    changed = tuple(
        _near(layer, window, sinks) if index in chosen else layer for index, layer in enumerate(spec.layers)
    )
    if changed == spec.layers:
        raise Unsupported(f"the layers of this model see {window} positions or fewer already", "give a smaller window")
    return dataclasses.replace(spec, layers=changed)


def _near(layer: Layer, window: int, sinks: int) -> Layer:
    """A layer that sees less already stays as it is."""
    assert isinstance(layer.mixer, Attention)
    if layer.mixer.window is not None and layer.mixer.window <= window:
        return layer
    return dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, window=window, sinks=sinks))


def _chosen(spec: Spec, layers: frozenset[int] | None) -> frozenset[int]:
    count = len(spec.layers)
    if layers is not None and max(layers) >= count:
        raise Unsupported(f"there is no layer {max(layers)}", f"this model has layers 0 to {count - 1}")
    return frozenset(range(count)) if layers is None else layers


def _grouped(spec: Spec, kv_heads: int) -> Spec:
    counts = {mixer.num_kv_heads for mixer in mixers(spec)}
    if len(counts) > 1:
        raise Unsupported("kv_heads: the layers of this model differ in their heads", "equal layers are supported")
    have = counts.pop()
    if kv_heads >= have or have % kv_heads:
        fewer = [str(count) for count in range(1, have) if have % count == 0]
        raise Unsupported(
            f"kv_heads={kv_heads}: the {have} key-value heads of this model do not merge into that many",
            f"it can be {', '.join(fewer)}" if fewer else "it has one already: give a window instead",
        )
    layers = tuple(
        dataclasses.replace(layer, mixer=dataclasses.replace(mixer, num_kv_heads=kv_heads))
        for layer, mixer in zip(spec.layers, mixers(spec), strict=True)
    )
    return dataclasses.replace(spec, layers=layers)


def _renamed(spec: Spec) -> Spec:
    """A Llama without biases whose layers all see one window is a Mistral, and says so in its config."""
    first = spec.layers[0]
    assert isinstance(first.mixer, Attention)
    plain = not (first.mixer.sinks or first.mixer.qkv_bias or first.mixer.out_bias or first.feed_forward.bias)
    if spec.family == "llama" and plain and set(spec.layers) == {first}:
        return dataclasses.replace(spec, family="mistral")
    return spec


def _long_encoder(
    spec: Spec, window: int, sinks: int, layers: frozenset[int] | None, positions: int, kv_heads: int
) -> Spec:
    """A BERT as a Longformer."""
    if kv_heads or sinks or layers is not None:
        raise Unsupported("kv_heads, sinks and layers are for decoders", "window=512 with positions=4096 for encoders")
    head = spec.head
    if spec.family != "bert" or (head.kind == "lm" and head.transform != "gelu"):
        raise Unsupported(f"attention: a Longformer cannot be made of this {spec.family} model", "BERT is supported")
    positions = positions or spec.max_positions
    if positions < spec.max_positions:
        raise Unsupported(
            f"positions={positions} are fewer than the {spec.max_positions} of this model", "leave positions at 0"
        )
    if window % 2 or not LEAST_WINDOW <= window < positions:
        raise Unsupported(
            f"a window of {window} for {positions} positions",
            f"an even number from {LEAST_WINDOW} on, below them: half lies on each side",
        )
    padding = spec.pad_token or 0
    embedding = dataclasses.replace(
        spec.embedding, learned_positions=positions + padding + 1, position_offset=padding + 1
    )
    changed = tuple(
        dataclasses.replace(layer, mixer=dataclasses.replace(mixer, window=window // 2 + 1, sinks=GLOBAL_ROWS))
        for layer, mixer in zip(spec.layers, mixers(spec), strict=True)
    )
    return dataclasses.replace(
        spec,
        family="longformer",
        pad_token=padding,
        max_positions=positions,
        embedding=embedding,
        layers=changed,
    )
