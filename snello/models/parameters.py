"""Which parameters a `Spec` implies, by canonical name and shape.

This is the one list that strict loading, packing, counting and exporting agree on. It follows the naming rules
written at the end of `spec.py`.
"""

from __future__ import annotations

from snello.errors import Unsupported
from snello.models.spec import Attention, Norm, ShortConvolution, Spec, feed_forward_linears, linear_names, linear_shape

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(spec: Spec) -> Shapes:
    """Canonical parameter names and true shapes, embedding first, head last."""
    shapes: Shapes = {**_embedding(spec)}
    for index in range(len(spec.layers)):
        shapes |= _layer(spec, index)
    if spec.final_norm:
        shapes |= _norm("norm", spec.norm, spec.hidden_size)
    return shapes | _head(spec)


def matrix_names(spec: Spec) -> list[str]:
    """Parameters that are matrices of the packed file, in the order of computation; vectors are all the others."""
    tables = ["tokens"]
    tables += ["positions"] if spec.embedding.learned_positions else []
    tables += ["types"] if spec.embedding.token_types else []
    linears = [linear for linear in linear_names(spec) if not (linear == "head" and spec.head.tied)]
    return [f"embedding.{table}.weight" for table in tables] + [f"{linear}.weight" for linear in linears]


def _norm(stem: str, norm: Norm, width: int) -> Shapes:
    gain: Shapes = {f"{stem}.weight": (width,)}
    return gain | {f"{stem}.bias": (width,)} if norm.bias else gain


def _embedding(spec: Spec) -> Shapes:
    rows = {
        "tokens": spec.vocab_size,
        "positions": spec.embedding.learned_positions,
        "types": spec.embedding.token_types,
    }
    shapes: Shapes = {f"embedding.{name}.weight": (count, spec.hidden_size) for name, count in rows.items() if count}
    return shapes | _norm("embedding.norm", spec.norm, spec.hidden_size) if spec.embedding.norm else shapes


def _layer(spec: Spec, index: int) -> Shapes:
    layer, stem = spec.layers[index], f"layers.{index}"
    shapes = _norm(f"{stem}.attention.norm", spec.norm, spec.hidden_size)
    shapes |= _mixer(spec, index)
    shapes |= _norm(f"{stem}.ffn.norm", spec.norm, spec.hidden_size)
    for linear in feed_forward_linears(f"{stem}.ffn", layer.feed_forward):
        shapes |= _linear(spec, linear, bias=layer.feed_forward.bias)
    if layer.norms == "both":
        for half in ("attention", "ffn"):
            shapes |= _norm(f"{stem}.{half}.post_norm", spec.norm, spec.hidden_size)
    return shapes


def _mixer(spec: Spec, index: int) -> Shapes:
    mixer, stem = spec.layers[index].mixer, f"layers.{index}.attention"
    shapes: Shapes = {}
    if isinstance(mixer, ShortConvolution):
        for part in mixer.linears:
            shapes |= _linear(spec, f"{stem}.{part}", bias=mixer.bias)
        shapes[f"{stem}.taps.weight"] = (mixer.kernel, spec.hidden_size)
        return shapes | ({f"{stem}.taps.bias": (spec.hidden_size,)} if mixer.bias else {})
    if not isinstance(mixer, Attention):
        hint = "attention and short convolutions are supported"
        raise Unsupported(f"layer {index} mixes positions with {type(mixer).__name__}", hint)
    biased = dict.fromkeys(mixer.linears, mixer.qkv_bias) | {"o": mixer.out_bias}
    for part in mixer.linears:
        shapes |= _linear(spec, f"{stem}.{part}", bias=biased[part])
    if mixer.qk_norm is not None:
        for part in "qk":
            shapes |= _norm(f"{stem}.{part}_norm", mixer.qk_norm, mixer.head_dim)
    return shapes


def _linear(spec: Spec, linear: str, *, bias: bool) -> Shapes:
    outputs, inputs = linear_shape(spec, linear)
    weight: Shapes = {f"{linear}.weight": (outputs, inputs)}
    return weight | {f"{linear}.bias": (outputs,)} if bias else weight


def _head(spec: Spec) -> Shapes:
    shapes: Shapes = {}
    if spec.head.transform is not None:
        shapes |= _linear(spec, "head.transform", bias=True)
        shapes |= _norm("head.transform.norm", spec.norm, spec.hidden_size)
    if spec.head.pooler is not None:
        shapes |= _linear(spec, "head.pooler", bias=True)
    if spec.head.kind != "embed":
        shapes |= _linear(spec, "head", bias=spec.head.bias)
        if spec.head.tied:
            del shapes["head.weight"]
    return shapes
