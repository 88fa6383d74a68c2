"""How much of a trace's prompts a prefix cache could know: the bound that stands beside a server's hits.

A request knows the blocks at its start that earlier requests brought, in the order of arrival, without a break. An
endless cache keeps them all: no server can know more. One of so many blocks forgets what was used longest ago, and of
one prompt its end first, since an end is of no use without its beginning; a cleverer one may know a little more.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def known_blocks(prompts: Sequence[Sequence[int]], capacity: int | None = None) -> list[int]:
    """Of each prompt, given as hashes of its blocks: how many of the first are known. `capacity`: in blocks."""
    kept: dict[int, None] = {}  # in the order of use, the latest last
    known = []
    for blocks in prompts:
        known.append(len(list(itertools.takewhile(kept.__contains__, blocks))))
        for block in reversed(blocks):
            kept.pop(block, None)
            kept[block] = None
        while capacity is not None and len(kept) > capacity:
            del kept[next(iter(kept))]
    return known
