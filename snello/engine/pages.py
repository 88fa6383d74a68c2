"""Which pages of keys and values belong to whom: counts of holders, and pages that are kept because they may be wanted.

A page holds `core.PAGE_POSITIONS` positions of every layer; the memory is the core's, here are indices. A page is in
one of three states: blank, held by at least one sequence, or idle: nobody holds it, but what it says is known (to the
prefix tree) and it stays until its place is needed. Blocks of a fixed size with counts of holders are vLLM's
PagedAttention (Kwon et al. 2023, arXiv 2309.06180).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from snello.errors import SnelloError
from snello.models.spec import MAX_KERNEL, Attention, ShortConvolution, Spec
from snello.native import core

STATE_ROWS = 16  # last positions of a page whose state a convolution keeps
GONE = -1  # in the table of a sequence: a page that no later row can see


class PagePool:
    """Pages of one cache. Blank ones are handed out first, lowest index first; then the one that was idle longest."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._blank = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # longest idle first
        self._holders = [0] * num_pages
        self._forget: dict[int, Callable[[int], None]] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be had now: blank and idle ones."""
        return len(self._blank) + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_free

    def holders(self, page: int) -> int:
        """How many sequences hold this page."""
        return self._holders[page]

    def allocate(self) -> int:
        """One page with one holder. What was known about an idle one is forgotten.

        Raises:
            SnelloError: every page is held.
        """
        if not self._blank:
            if not self._idle:
                raise SnelloError(
                    f"the cache is full: all {self.num_pages} pages are in use",
                    "close sessions that are done, or give more room with a larger context",
                )
            self.forget(next(iter(self._idle)))
        page = self._blank.pop()
        self._holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more holder of a page that is held or idle."""
        assert self._holders[page] or page in self._idle, "a blank page says nothing"
        self._idle.pop(page, None)
        self._holders[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """One holder less of each. The last of them is what may be reused first."""
        for page in reversed(pages):
            assert self._holders[page], "a page was freed twice"
            self._holders[page] -= 1
            if not self._holders[page]:
                self._leave(page)

    def _leave(self, page: int) -> None:
        if page in self._forget:
            self._idle[page] = None
        else:
            self._blank.append(page)

    def remember(self, page: int, forget: Callable[[int], None]) -> None:
        """This held page's content is known: without holders it stays idle, and `forget(page)` tells of its reuse."""
        assert self._holders[page] and page not in self._forget
        self._forget[page] = forget

    def forget(self, page: int) -> None:
        """What this page says is not to be found any more; an idle one becomes blank."""
        self._forget.pop(page)(page)
        if page in self._idle:
            del self._idle[page]
            self._blank.append(page)

    def check(self) -> None:
        """Asserts what must always hold: a page is blank, idle or held, never two of these."""
        held = {page for page, count in enumerate(self._holders) if count}
        assert len(self._blank) + len(self._idle) + len(held) == self.num_pages, "a page is lost, or counted twice"
        assert not held & set(self._blank) and not held & self._idle.keys()
        assert len(set(self._blank)) == len(self._blank) and not self._idle.keys() & set(self._blank)
        assert self._idle.keys() <= self._forget.keys() <= held | self._idle.keys()


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which pages of a sequence later rows can see.

    Attributes:
        window: a row at position p sees positions > p - window; None: all before it.
        sinks: with a window, the first positions that are seen for ever.
        takes_back: some layer (a convolution) keeps only the last positions of a page: so a page's beginning alone is
            of no use, and at most so many computed positions can be given up again. None: any number.
    """

    window: int | None = None
    sinks: int = 0
    takes_back: int | None = None

    def pinned(self) -> int:
        """Pages at the front that are never given back (with a window)."""
        return pages_for(self.sinks)

    def first(self, position: int) -> int:
        """The first page behind the pinned ones that a row at `position` or later can see."""
        if self.window is None:
            return 0
        return max(0, position - self.window + 1) // core.PAGE_POSITIONS

    def needed(self, length: int) -> list[int]:
        """Table entries below `length` that a row at position `length` or later can see."""
        count = pages_for(length)
        first = min(self.first(length), count)
        return [*range(min(self.pinned(), first)), *range(first, count)]

    def peak(self, length: int, rows: int) -> int:
        """Most pages that a sequence of `length` positions holds at once, computed `rows` at a time."""
        if self.window is None:
            return pages_for(length)
        return min(pages_for(length), self.pinned() + pages_for(self.window + rows) + 1)

    def reads(self, start: int, rows: int) -> int:
        """Positions that `rows` rows from `start` on read together."""
        if self.window is None:
            return rows * start + rows * (rows + 1) // 2
        return sum(min(position + 1, self.window + self.sinks) for position in range(start, start + rows))


def retention_of(spec: Spec) -> Retention:
    """What the layer that sees farthest sees: pages hold all layers."""
    mixers = [layer.mixer for layer in spec.layers if isinstance(layer.mixer, Attention)]
    kernels = [layer.mixer.kernel for layer in spec.layers if isinstance(layer.mixer, ShortConvolution)]
    assert max(kernels, default=1) <= MAX_KERNEL < STATE_ROWS
    takes_back = STATE_ROWS - max(kernels) + 1 if kernels else None
    windows = [mixer.window for mixer in mixers if mixer.window is not None]
    if len(windows) < len(mixers) or not (windows or kernels):
        return Retention(takes_back=takes_back)
    sinks = max((mixer.sinks for mixer in mixers), default=0)
    return Retention(window=max(windows + kernels), sinks=sinks, takes_back=takes_back)


class PageTable:
    """The pages of one sequence that grows; those that no later row can see go back."""

    def __init__(self, pool: PagePool, retention: Retention) -> None:
        self.pages: list[int] = []
        self._pool, self._retention = pool, retention
        self._gone = 0

    def grow(self, length: int) -> None:
        """Pages for this many positions."""
        while len(self.pages) < pages_for(length):
            self.pages.append(self._pool.allocate())

    def leave(self, length: int) -> None:
        """All rows below `length` are computed."""
        if self._retention.window is None:
            return
        for index in range(self._retention.pinned() + self._gone, min(self._retention.first(length), len(self.pages))):
            self._pool.free([self.pages[index]])
            self.pages[index] = GONE
            self._gone += 1

    def entries(self, width: int = 0) -> list[int]:
        """As the core takes them, at least `width`; of a page that is gone, or not there, any index will do."""
        return [max(page, 0) for page in self.pages] + [0] * (width - len(self.pages))

    def close(self) -> None:
        self._pool.free([page for page in self.pages if page != GONE])
        self.pages = []


def pages_for(positions: int) -> int:
    """Pages that hold this many positions."""
    return -(-positions // core.PAGE_POSITIONS)
