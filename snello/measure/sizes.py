"""How many bytes and operations a model of this `Spec` needs, without its weights.

Ceilings and forecasts are computed from the spec that a technique *plans*, before any time is spent, so sizes
must come from the packed layout alone (docs/numerics.md, Layout). A test holds them to the core's own count.
"""

from __future__ import annotations

from dataclasses import replace

from snello.models.sizes import channel_weights, packed_bytes
from snello.models.spec import (
    BITS,
    Attention,
    CacheFormat,
    Format,
    ShortConvolution,
    Spec,
    answers_alone,
    linear_names,
    linear_shape,
    read_share,
)


def read_bytes(form: Format, rows: int, columns: int, streams: int = 1) -> int:
    """Bytes of one packed matrix that a step of so many rows reads: no channel that all of them skip."""
    stored = packed_bytes(form, rows, columns)
    return stored - int(form.skip**streams * channel_weights(form, rows, columns)) if form.skip else stored


def linear_bytes(spec: Spec, rows: int = 1) -> int:
    """Bytes of the weights that a step of so many rows reads: all linears, the head with them, and of experts those
    that rows go to if they go to all alike.
    """
    return round(sum(_read(spec, name, rows) for name in linear_names(spec)))


def _read(spec: Spec, name: str, rows: int) -> float:
    return read_bytes(spec.format(name), *linear_shape(spec, name), rows) * read_share(spec, name, rows)


def _packed(spec: Spec, name: str) -> int:
    return packed_bytes(spec.format(name), *linear_shape(spec, name))


def weights_bytes(spec: Spec) -> int:
    """Bytes of all matrices: linears and embedding tables (a tied head is counted once)."""
    total = sum(_packed(spec, name) for name in linear_names(spec))
    form = spec.format("embedding")
    if not (spec.head.tied and "head" in linear_names(spec)):
        total += packed_bytes(form, spec.vocab_size, spec.hidden_size)
    for rows in (spec.embedding.learned_positions, spec.embedding.token_types):
        total += packed_bytes(spec.default_format, rows, spec.hidden_size) if rows else 0
    return total


def num_weights(spec: Spec) -> int:
    """Parameters held in matrices."""
    total = sum(rows * columns for rows, columns in (linear_shape(spec, name) for name in linear_names(spec)))
    tied = spec.head.tied and "head" in linear_names(spec)
    tables = spec.embedding.learned_positions + spec.embedding.token_types + (0 if tied else spec.vocab_size)
    return total + tables * spec.hidden_size


def bits_per_weight(num_bytes: int, spec: Spec) -> float:
    return 8 * num_bytes / num_weights(spec)


def cache_bytes(spec: Spec, context: int) -> int:
    """Bytes of keys and values that one row at this context reads."""
    total = 0.0
    for layer in spec.layers:
        if isinstance(layer.mixer, Attention):
            mixer = layer.mixer
            seen = context if mixer.window is None else min(context, mixer.window + mixer.sinks)
            total += 2 * seen * mixer.num_kv_heads * mixer.head_dim * _value_bytes(spec.cache_format, mixer.head_dim)
        elif isinstance(layer.mixer, ShortConvolution):
            total += 4 * min(context, layer.mixer.kernel - 1) * spec.hidden_size
    return int(total)


def _value_bytes(form: CacheFormat, head_dim: int) -> float:
    return 1 + 8 / head_dim if form == "int8" else BITS[form] / 8


def linear_operations(spec: Spec) -> dict[str, float]:
    """Operations (2 a multiply-add) of one row, by the arithmetic that does them; under "answers:..." what only rows
    need whose answer is wanted, where not all are.
    """
    totals: dict[str, float] = {}
    for name in linear_names(spec):
        rows, columns = linear_shape(spec, name)
        key = arithmetic(spec.format(name))
        key = f"answers:{key}" if spec.answer_row is not None and answers_alone(spec, name) else key
        totals[key] = totals.get(key, 0.0) + 2.0 * rows * columns * read_share(spec, name)
    return totals


def answered_layer(spec: Spec) -> Spec:
    """The spec's last layer by itself, or none if rows whose answer is not wanted attend there as well."""
    last = spec.layers[-1:]
    alone = spec.answer_row is not None and all(_attends_once(layer.mixer) for layer in last)
    return replace(spec, layers=last if alone else ())


def _attends_once(mixer: object) -> bool:
    """Keys and values are stored before the first row attends."""
    return isinstance(mixer, Attention) and not mixer.global_rows


def attention_operations(spec: Spec, context: float) -> float:
    """Operations of one row that sees `context` positions, in all layers."""
    total = 0.0
    for layer in spec.layers:
        if isinstance(layer.mixer, Attention):
            seen = context if layer.mixer.window is None else min(context, layer.mixer.window + layer.mixer.sinks)
            total += 4.0 * seen * layer.mixer.num_heads * layer.mixer.head_dim
        elif isinstance(layer.mixer, ShortConvolution):
            total += 2.0 * min(context, layer.mixer.kernel) * spec.hidden_size
    return total


def arithmetic(form: Format) -> str:
    """Which inner loop a linear of this format runs: of its own type, or FP32's."""
    return "fp32" if form.activations == "float" and form.weights != "fp16" else form.weights
