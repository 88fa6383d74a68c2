"""Which pages of keys and values belong to whom: a free list, nothing more.

A page holds `core.PAGE_POSITIONS` positions of every layer. The pool hands out indices; the memory is the core's.
"""

from __future__ import annotations

from snello.errors import SnelloError


class PagePool:
    """Free pages of one cache, lowest index first, so that memory is touched from the front."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """One page. Raises SnelloError when the cache is full."""
        if not self._free:
            raise SnelloError(
                f"the cache is full: all {self.num_pages} pages are in use",
                "close sessions that are done, or give more room with a larger context",
            )
        return self._free.pop()

    def free(self, pages: list[int]) -> None:
        assert not set(pages) & set(self._free), "a page was freed twice"
        self._free.extend(sorted(pages, reverse=True))
