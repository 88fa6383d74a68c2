"""The linears of a model's blocks in the order of computation, grouped by the input they read; no torch, no weights.

Linears that share an input form a unit: they see the same calibration statistic and are worked on together. Shared by
the techniques that rewrite weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from snello.errors import SnelloError, Unsupported
from snello.models.spec import Attention, ShortConvolution, Spec, input_name, is_router, linear_names


@dataclass(frozen=True)
class Unit:
    """The linears that read one input."""

    input: str
    linears: tuple[str, ...]


def body_linears(spec: Spec) -> list[str]:
    """Of all blocks, but for routers."""
    return [name for name in linear_names(spec) if name.startswith("layers.") and not is_router(name)]


def units(spec: Spec, linears: Sequence[str]) -> list[Unit]:
    """Grouped by shared input, in the order of computation."""
    grouped: dict[str, list[str]] = {}
    for linear in linears:
        grouped.setdefault(input_name(linear), []).append(linear)
    return [Unit(name, tuple(members)) for name, members in grouped.items()]


def check_plain_blocks(spec: Spec, technique: str, experts: str | None = "", *, convolutions: bool = False) -> None:
    """Refuses blocks that are not attention and a dense feed-forward, by name.

    `experts`: what to do instead where there are experts; None: they are welcome. So are `convolutions`, if so.
    """
    for index, layer in enumerate(spec.layers):
        if not isinstance(layer.mixer, (Attention, ShortConvolution) if convolutions else Attention):
            raise Unsupported(f"{technique}: {type(layer.mixer).__name__} in layer {index}", "attention is supported")
        if layer.feed_forward.experts is not None and experts is not None:
            hint = experts or "dense feed-forward layers are supported"
            raise Unsupported(f"{technique}: experts in layer {index}", hint)


def layer_numbers(text: str, all_of_them: str = "all") -> frozenset[int] | None:
    """ "all" (or another word) -> None, "0,2,5-7" -> {0, 2, 5, 6, 7}."""
    if text == all_of_them:
        return None
    hint = f"{all_of_them}, or numbers from 0 on such as 0,2,5-7"
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isascii() and first.isdigit()) or (dash and not (last.isascii() and last.isdigit())):
            raise SnelloError(f"layers={text!r} names no layers", hint)
        end = int(last) if dash else int(first)
        if end < int(first) or end > 10_000:
            raise SnelloError(f"layers={text!r}: {part.strip()} is no range of layers", "write the lower number first")
        numbers |= set(range(int(first), end + 1))
    return frozenset(numbers)
