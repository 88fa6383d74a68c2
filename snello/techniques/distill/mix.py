"""Which losses count how much: "forward:5,text:2,cosine:1" as a table. No torch."""

from __future__ import annotations

import math

from snello.errors import SnelloError

LOSSES = ("forward", "reverse", "jensen", "text", "cosine", "mse", "relations")
NEEDS_SAME_WIDTH = frozenset({"cosine", "mse"})
EXAMPLE = "for example loss=forward, or loss=forward:5,text:2,cosine:1"


def parse_mix(text: object) -> dict[str, float]:
    """Names and weights, in the order of `LOSSES`; a weight that is not written is 1.

    Raises:
        SnelloError: a name that there is not, or twice, or a weight that is not above zero.
    """
    found: dict[str, float] = {}
    for part in text.split(",") if isinstance(text, str) else [str(text)]:
        name, colon, number = (piece.strip() for piece in part.partition(":"))
        if name not in LOSSES or name in found:
            problem = f"names {name} twice" if name in found else f"knows no {name!r}"
            raise SnelloError(f"loss={text!r} {problem}", f"there are {', '.join(LOSSES)}; {EXAMPLE}")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise SnelloError(f"loss={text!r}: the weight of {name} is not a number above zero", EXAMPLE)
        found[name] = weight
    return {name: found[name] for name in LOSSES if name in found}
