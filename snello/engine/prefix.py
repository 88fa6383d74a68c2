"""What is computed already: a tree over pages of tokens, so that equal beginnings are computed once.

An edge is the tokens of one page, compared whole, never by a digest alone: the tree cannot return a page that says
something else. Each tenant or adapter has a root of its own (`salt`), so none learns from the speed of another what was
asked (arXiv 2409.20002). Pages that no sequence holds stay idle in the pool and go in the order in which they became
idle, leaves first. A tree that is the cache is SGLang's RadixAttention (Zheng et al. 2023, arXiv 2312.07104).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace

from snello.engine.pages import GONE, PagePool, Retention
from snello.native import core

PAGE = core.PAGE_POSITIONS
TOKEN_BYTES = array("i").itemsize


@dataclass(eq=False)
class _Node:
    """One page of tokens after those of its parents; fewer tokens than a page only at a leaf."""

    key: bytes = b""
    parent: _Node | None = None
    page: int | None = None  # None: the root, and pages that were reused before what follows them
    children: dict[bytes, _Node] = field(default_factory=dict)
    order: list[bytes] = field(default_factory=list)  # sorted keys: the nearest beginning is a neighbour


@dataclass(frozen=True, kw_only=True)
class Match:
    """Pages that hold the beginning of some tokens.

    Attributes:
        pages: the table of `num_tokens` positions; GONE where later rows need none.
        partial, num_partial: a page whose first `num_partial` positions are those that follow: worth a copy.
    """

    pages: tuple[int, ...] = ()
    partial: int | None = None
    num_partial: int = 0

    @property
    def num_tokens(self) -> int:
        """Positions in whole pages."""
        return len(self.pages) * PAGE

    def seen_from(self, needed: Container[int]) -> Match:
        """The same, without the pages that no row sees that comes after the partial page."""
        pages = tuple(page if index in needed else GONE for index, page in enumerate(self.pages))
        return replace(self, pages=pages)


class PrefixTree:
    """Finds pages by the tokens before and in them. It holds none: the pool keeps what is known until it needs room."""

    def __init__(self, pool: PagePool, retention: Retention) -> None:
        self._pool, self._retention = pool, retention
        self._roots: dict[str, _Node] = {}
        self._nodes: dict[int, _Node] = {}  # by page

    def __len__(self) -> int:
        """Pages that can be found."""
        return len(self._nodes)

    def match(self, tokens: array[int], *, salt: str = "") -> Match:
        """The longest known beginning of `tokens`. Takes no hold of its pages."""
        node = self._roots.get(salt)
        path: list[_Node] = []
        while node is not None and (len(path) + 1) * PAGE <= len(tokens):
            node = node.children.get(_key(tokens, len(path), len(tokens)))
            if node is not None:
                path.append(node)
        del path[self._usable(path) :]
        known = set(self._retention.needed(len(path) * PAGE))
        pages = tuple(_page(node) if index in known else GONE for index, node in enumerate(path))
        if self._retention.takes_back is not None:
            return Match(pages=pages)
        partial, count = self._nearest(path[-1] if path else self._roots.get(salt), tokens, len(path))
        return Match(pages=pages, partial=partial, num_partial=count)

    def _usable(self, path: list[_Node]) -> int:
        """How much of a path has every page that the next row can see."""
        for depth in range(len(path), 0, -1):
            if all(path[index].page is not None for index in self._retention.needed(depth * PAGE)):
                return depth
        return 0

    def _nearest(self, node: _Node | None, tokens: array[int], index: int) -> tuple[int | None, int]:
        """The child that shares most of what follows, but not a whole page, and how many tokens."""
        rest = _key(tokens, index, min(len(tokens), (index + 1) * PAGE - 1))
        best: tuple[int | None, int] = (None, 0)
        if node is None or not rest:
            return best
        at = bisect_left(node.order, rest)
        for key in node.order[max(0, at - 1) : at + 1]:
            page, count = node.children[key].page, _common(key, rest) // TOKEN_BYTES
            if page is not None and count > best[1]:
                best = (page, count)
        return best

    def insert(self, tokens: array[int], length: int, page: int, *, salt: str = "") -> int:
        """`page` holds the last positions of tokens[:length], a whole page or the beginning of one.

        Returns:
            The page that the tree has for them: `page`, or an equal one that it knew already.
        """
        index = (length - 1) // PAGE
        node = self._roots.setdefault(salt, _Node())
        for above in range(index):
            node = node.children.get(_key(tokens, above, length)) or self._add(node, _key(tokens, above, length))
        key = _key(tokens, index, length)
        child = node.children.get(key)
        if child is None:
            if self._covered(node, key):
                return page
            self._drop_beginnings(node, key)
            child = self._add(node, key)
        if child.page is None:
            child.page = page
            self._nodes[page] = child
            self._pool.remember(page, self._forgotten)
        return child.page

    def clear(self) -> None:
        """Forgets everything; pages that are held stay with those who hold them."""
        nodes, self._nodes, self._roots = self._nodes, {}, {}
        for page in nodes:
            self._pool.forget(page)

    def contents(self) -> Iterator[tuple[str, list[bytes], int]]:
        """Of every page: salt, the keys from the root to it, and its number."""
        roots = {id(root): salt for salt, root in self._roots.items()}
        for page, node in self._nodes.items():
            keys, at = [node.key], node
            while at.parent is not None and at.parent.parent is not None:
                at = at.parent
                keys.insert(0, at.key)
            assert at.parent is not None
            yield roots[id(at.parent)], keys, page

    def _add(self, parent: _Node, key: bytes) -> _Node:
        child = parent.children[key] = _Node(key, parent)
        insort(parent.order, key)
        return child

    def _covered(self, node: _Node, key: bytes) -> bool:
        """Whether a longer sibling begins with this key."""
        at = bisect_left(node.order, key)
        return at < len(node.order) and node.order[at].startswith(key)

    def _drop_beginnings(self, node: _Node, key: bytes) -> None:
        """Forgets leaves that a longer sibling is about to cover."""
        while (at := bisect_left(node.order, key)) and key.startswith(node.order[at - 1]):
            page = node.children[node.order[at - 1]].page
            if page is None or self._pool.holders(page):
                return
            self._remove(self._nodes.pop(page))
            self._pool.forget(page)

    def _forgotten(self, page: int) -> None:
        """The pool reuses this page."""
        node = self._nodes.pop(page, None)
        if node is None:
            return  # removed here already
        node.page = None
        self._prune(node)

    def _prune(self, node: _Node) -> None:
        """Removes a branch without pages."""
        while node.parent is not None and node.page is None and not node.children:
            node = self._remove(node)
        if node.parent is None and not node.children:
            self._roots = {salt: root for salt, root in self._roots.items() if root is not node}

    def _remove(self, node: _Node) -> _Node:
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        del parent.order[bisect_left(parent.order, node.key)]
        return parent


def common_length(a: array[int], b: array[int]) -> int:
    """How many tokens both begin with."""
    return _common(a.tobytes(), b.tobytes()) // TOKEN_BYTES


def _key(tokens: array[int], index: int, end: int) -> bytes:
    """The tokens of page `index`, up to `end`."""
    return tokens[index * PAGE : min(end, (index + 1) * PAGE)].tobytes()


def _page(node: _Node) -> int:
    assert node.page is not None
    return node.page


def _common(a: bytes, b: bytes) -> int:
    """Length of the common beginning, by halving."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
