"""What remains after pruning, by arithmetic alone: the same for all layers, in counts that kernels like.

Widths are multiples of 64 where the original is one and has at least four of them, else of the largest smaller power of
two for which that holds. Heads leave evenly: whole groups with their key-value head, or as many queries of each group.
"""

from __future__ import annotations

import dataclasses
import math

from snello.errors import Unsupported
from snello.models.families import FAMILIES
from snello.models.plain_folder import HEADS_APART
from snello.models.spec import Attention, Spec

LARGEST_STEP, FEWEST_STEPS = 64, 4
ROUNDING = 1e-9  # 10 * (1 - 0.7) is a little more than 3


def shrink(spec: Spec, *, ffn: float, heads: float, width: float, layers: float) -> Spec:
    """The planned spec.

    Raises:
        Unsupported: the model or its family's config does not allow it, or a fraction is too small to remove anything.
    """
    check(spec)
    if heads or width:
        _check_apart(spec, "heads" if heads else "width")
    layer = spec.layers[0]
    assert isinstance(layer.mixer, Attention)
    feed_forward, mixer = layer.feed_forward, layer.mixer
    if ffn:
        feed_forward = dataclasses.replace(feed_forward, width=fewer("ffn", feed_forward.width, ffn))
    if heads:
        kept_groups, kept_queries = fewer_heads(mixer.num_kv_heads, mixer.num_heads // mixer.num_kv_heads, heads)
        mixer = dataclasses.replace(mixer, num_kv_heads=kept_groups, num_heads=kept_groups * kept_queries)
    count = _fewer_layers(len(spec.layers), layers) if layers else len(spec.layers)
    hidden = fewer("width", spec.hidden_size, width) if width else spec.hidden_size
    if spec.family == "llama" and hidden % mixer.num_heads:  # Transformers' LlamaConfig refuses such a config
        raise Unsupported(
            f"a llama config cannot say hidden size {hidden} with {mixer.num_heads} attention heads",
            f"choose heads and width so that the heads left divide it: {_fitting(hidden, spec)} heads do",
        )
    shrunk = dataclasses.replace(layer, mixer=mixer, feed_forward=feed_forward)
    return dataclasses.replace(spec, layers=(shrunk,) * count, hidden_size=hidden)


def _fitting(hidden: int, spec: Spec) -> str:
    """How many heads, of as many as this model has, divide a hidden size."""
    mixer = spec.layers[0].mixer
    assert isinstance(mixer, Attention)
    return ", ".join(str(count) for count in range(1, mixer.num_heads + 1) if hidden % count == 0)


def check(spec: Spec) -> None:
    """Dense attention models with equal layers, in their own number type, whose config can say other shapes."""
    for index, layer in enumerate(spec.layers):
        if not isinstance(layer.mixer, Attention):
            raise Unsupported(f"prune: {type(layer.mixer).__name__} in layer {index}", "attention is supported")
        if layer.feed_forward.experts is not None:
            raise Unsupported(f"prune: experts in layer {index}", "dense feed-forward layers are supported")
    if set(spec.layers) != {spec.layers[0]}:
        raise Unsupported("prune: the layers of this model differ", "models with equal layers are supported")
    if spec.family not in FAMILIES:
        raise Unsupported(f"prune: family {spec.family!r}", f"supported: {', '.join(FAMILIES)}")
    if spec.formats or spec.cache_format != spec.default_format.weights:
        raise Unsupported("prune: this model mixes number formats", "prune the original first, then quantize")


def step(count: int) -> int:
    """The multiple in which a width shrinks."""
    size = LARGEST_STEP
    while size > 1 and (count % size or count // size < FEWEST_STEPS):
        size //= 2
    return size


def fewer(option: str, count: int, fraction: float) -> int:
    multiple = step(count)
    kept = multiple * math.ceil(count * (1 - fraction) / multiple - ROUNDING)
    if kept >= count:
        raise _nothing_left(option, fraction, count, multiple / count)
    return kept


def fewer_heads(groups: int, queries: int, fraction: float) -> tuple[int, int]:
    """(groups, queries of each): the fewest heads that keep what was asked; with groups their cache goes as well."""
    wanted = groups * queries * (1 - fraction) - ROUNDING
    whole = max(1, math.ceil(wanted / queries))
    each = max(1, math.ceil(wanted / groups))
    if min(whole * queries, groups * each) >= groups * queries:
        least = 1 / max(groups, queries)
        if groups * queries == 1:
            raise Unsupported("heads: this model has one head", "remove channels instead: ffn=0.25")
        raise _nothing_left("heads", fraction, groups * queries, least)
    return (whole, queries) if whole * queries <= groups * each else (groups, each)


def _fewer_layers(count: int, fraction: float) -> int:
    kept = max(1, math.ceil(count * (1 - fraction) - ROUNDING))
    if kept >= count:
        if count == 1:
            raise Unsupported("layers: this model has one layer", "remove channels instead: ffn=0.25")
        raise _nothing_left("layers", fraction, count, 1 / count)
    return kept


def _nothing_left(option: str, fraction: float, count: int, least: float) -> Unsupported:
    first = math.ceil(least * 1000) / 1000
    if first > 0.9:
        return Unsupported(f"{option}: {count} is too few to remove any", f"leave {option} at 0")
    return Unsupported(
        f"{option}={fraction:g} is too little to remove anything of {count}", f"{option}={first:g} removes the first"
    )


def _check_apart(spec: Spec, option: str) -> None:
    """Where hidden_size is heads times head_dim by definition, neither can change alone."""
    if spec.family not in HEADS_APART:
        raise Unsupported(
            f"{option}: a {spec.family} config ties hidden size to heads times head_dim",
            "ffn and layers can be pruned: ffn=0.25",
        )
