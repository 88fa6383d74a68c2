"""Bytes of packed matrices (docs/numerics.md, Layout), and spreading INT8 over the blocks under a budget of bits.

Linears that share an input form a unit and always have one format, since the input is prepared once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from snello.errors import Unsupported
from snello.models.sizes import packed_bytes
from snello.models.spec import Format, Spec, linear_shape
from snello.techniques.units import Unit, body_linears, units


def stored_bytes(spec: Spec, linears: Sequence[str]) -> int:
    return sum(packed_bytes(spec.format(linear), *linear_shape(spec, linear)) for linear in linears)


def average_bits(spec: Spec, linears: Sequence[str]) -> float:
    """Stored bits, scales and padding included, per true weight."""
    weights = 0
    for linear in linears:
        rows, columns = linear_shape(spec, linear)
        weights += rows * columns
    return 8 * stored_bytes(spec, linears) / weights


def extend_to_budget(spec: Spec, wider: Format, bits: float, order: Sequence[Unit] = ()) -> Spec:
    """Gives the wider format to units in this order (the order of computation if none is said) while they fit."""
    body = body_linears(spec)
    least = average_bits(spec, body)
    if least > bits:
        raise Unsupported(
            f"bits={bits:g} is below the {least:.2f} that INT4 takes in this model, scales and padding included",
            f"use bits={least + 0.5:.1f} or more, or a larger group size",
        )
    budget = stored_bytes(spec, body) * bits / least
    return widen(spec, wider, order or units(spec, body), budget)


def widen(spec: Spec, wider: Format, order: Sequence[Unit], budget: float) -> Spec:
    """Units in this order get the wider format where the body's bytes stay within the budget."""
    used, chosen = stored_bytes(spec, body_linears(spec)), dict[str, Format]()
    for unit in order:
        widened = spec.with_formats(dict.fromkeys(unit.linears, wider))
        extra = stored_bytes(widened, unit.linears) - stored_bytes(spec, unit.linears)
        if used + extra <= budget:
            used += extra
            chosen |= dict.fromkeys(unit.linears, wider)
    return spec.with_formats(chosen)
