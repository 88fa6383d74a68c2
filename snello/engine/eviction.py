"""Keys and values that a deployment gives up: each row sees the pinned beginning and the newest positions, no more.

The first `keep_first` positions stay for ever (attention sinks, and instructions that must not be forgotten); of the
rest a row sees the newest `keep_last`. Which positions these are follows from the row's own position alone, so answers
are the same bits for any batch, chunk or cache hit. Keys keep the positions that they were computed at: nothing is
renumbered, and a text is no longer than the model was made for. Sinks: StreamingLLM (arXiv:2309.17453); why the
beginning is pinned whole: instructions that eviction drops are silently ignored (arXiv:2510.00231).
"""

from __future__ import annotations

import dataclasses

from snello.errors import SnelloError
from snello.models.spec import Attention, Deployment, Layer, Spec

HINT = "leave --keep-last out: everything is kept"


def as_kept(spec: Spec, deployment: Deployment) -> Spec:
    """The spec as it runs here: layers that see farther than the newest `keep_last` positions see those and the first.

    Raises:
        SnelloError: there is nothing to give up, or nothing would be left.
    """
    first, last = deployment.keep_first, deployment.keep_last
    if last is None:
        if first:
            raise SnelloError(f"keep_first={first} goes with keep_last", "say how many of the newest positions to keep")
        return spec
    if not spec.causal:
        raise SnelloError("an encoder sees whole texts, and has nothing to give up", HINT)
    layers = tuple(_layer(layer, first, last) for layer in spec.layers)
    if layers == spec.layers:
        raise SnelloError(f"no layer of this model sees more than the newest {last:,} positions", HINT)
    return dataclasses.replace(spec, layers=layers)


def _layer(layer: Layer, first: int, last: int) -> Layer:
    mixer = layer.mixer
    if not isinstance(mixer, Attention) or (mixer.window is not None and mixer.window <= last):
        return layer
    return dataclasses.replace(layer, mixer=dataclasses.replace(mixer, window=last, sinks=max(first, mixer.sinks)))


def forgotten(deployment: Deployment, length: int) -> int:
    """How many positions of a sequence of this length no later row can see."""
    if deployment.keep_last is None:
        return 0
    return max(0, length - deployment.keep_last - deployment.keep_first)


def sentence(deployment: Deployment) -> str:
    """What is said wherever this runs, since what is given up is lost."""
    assert deployment.keep_last is not None
    first = f"the first {deployment.keep_first:,} and " if deployment.keep_first else ""
    return f"only {first}the newest {deployment.keep_last:,} tokens are seen; what lies between is forgotten"
