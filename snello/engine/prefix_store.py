"""Prefixes on disk: whole pages that memory no longer has come back from files, where that is quicker than computing.

The key of a page is a chain: SHA-256 over the key of the page before it and its tokens, begun with the fingerprint of
the model, the numerics and the layout, and with the tenant's salt. By law 7 a page that is read has the very bytes that
would be computed, on every instruction set. That is not taken on trust: of some hits nothing is read; the prompt is
computed as if there were no file, and its pages are compared with what the file would have given. One difference, and
the store is not used again (`MISTRUSTED` in its folder). So an audited hit costs what it would have saved, one in a
hundred, and no more.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from snello.engine.native import NativeExecutor
from snello.engine.page_files import LOG, PageFiles
from snello.engine.pages import GONE, PagePool, Retention
from snello.engine.prefix import PAGE, Match, PrefixTree
from snello.engine.sequence import Sequence as Running
from snello.errors import SnelloError
from snello.native import core

LAYOUT_VERSION = 1
FIRST_GUESS_MS_PER_MB = 5.0  # a disk of 200 MB/s, until one was read from
NEWEST = 0.3  # weight of the newest reading
FORGIVE = 0.98  # of the reading time, whenever it did not pay: so that one slow moment is not believed for ever


class PageMemory(Protocol):
    """The bytes of pages of keys and values, (page_bytes,) uint8 each, to be read and written between steps."""

    page_bytes: int

    def page(self, page: int) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class PrefixStoreOptions:
    """Where prefixes are kept.

    Attributes:
        folder: created if need be; processes may share it.
        limit_bytes: of all files.
        audit: share of hits that are computed again and compared.
    """

    folder: Path
    limit_bytes: int = 4_000_000_000
    audit: float = 0.01

    def __post_init__(self) -> None:
        if self.limit_bytes < 1 or not 0 <= self.audit <= 1:
            message = f"limit_bytes is {self.limit_bytes} and audit {self.audit}"
            raise SnelloError(message, "give at least one byte, and a share from 0 to 1")


@dataclass
class StoreCounters:
    """Since the start, in tokens where not said otherwise.

    Attributes:
        queried: of prompts whose pages memory did not have. hit: of them read from disk.
        unpaid: that were there, and would have been computed sooner. no_room: for which there were no pages.
        audited_pages, mismatched_pages: compared with what was computed, and found to differ.
        audited_hits: requests whose hit was not used but compared.
    """

    queried: int = 0
    hit: int = 0
    unpaid: int = 0
    no_room: int = 0
    audited_hits: int = 0
    audited_pages: int = 0
    mismatched_pages: int = 0
    read_seconds: float = 0.0


@dataclass
class _State:
    """Of one sequence: the keys of its pages so far, and what an audit expects of them."""

    keys: list[bytes] = field(default_factory=list)
    num_kept: int = 0  # pages that were looked at after they were computed
    expected: dict[bytes, bytes] = field(default_factory=dict)


class PrefixStore:
    """The engine's second memory of prefixes.

    Args:
        fingerprint: of everything that the bytes of a page depend on beside its tokens (`fingerprint_of`).
        seed: of the choice of hits that are audited; None: another one each time.

    Raises:
        SnelloError: the folder cannot be used.
    """

    def __init__(
        self, fingerprint: bytes, memory: PageMemory, options: PrefixStoreOptions, *, seed: int | None = None
    ) -> None:
        self.files = PageFiles(options.folder, fingerprint, memory.page_bytes, options.limit_bytes)
        self.counters = StoreCounters()
        self._memory, self._options, self._fingerprint = memory, options, fingerprint
        self._states: dict[int, _State] = {}
        self._random = random.Random(seed)
        self._ms_per_mb = FIRST_GUESS_MS_PER_MB
        self.bypassed = self.files.mistrusted
        if self.bypassed:
            LOG.warning("stored prefixes were found to be wrong before and are not used: %s", self.files.own)

    # ---- before a sequence runs

    def restore(
        self,
        sequence: Running,
        tree: PrefixTree,
        pool: PagePool,
        retention: Retention,
        cost: Callable[[int, int], float],
    ) -> None:
        """Puts stored pages of a waiting sequence into the cache and the tree, once, where that pays.

        Args:
            cost: (rows, positions that they read together) -> milliseconds that computing takes.
        """
        if self.bypassed or sequence.id in self._states:
            return
        state = self._states[sequence.id] = _State()
        wanted = sequence.tokens[: len(sequence.tokens) - 1]  # the last one is computed: its logits are wanted
        match = tree.match(wanted, salt=sequence.salt)
        have = len(match.pages)
        self._extend(state, wanted, len(wanted) // PAGE, sequence.salt)
        if len(state.keys) == have:
            return
        self.counters.queried += (len(state.keys) - have) * PAGE
        depth, missing = self._reachable(state.keys, match, retention)
        if not missing or not self._pays(
            depth - have, len(missing), retention.reads(have * PAGE, (depth - have) * PAGE), cost
        ):
            return
        if self._options.audit and self._random.random() < self._options.audit:
            self._expect(state, wanted, missing)
            return
        self._load(sequence, wanted, missing, match, tree, pool)

    def _extend(self, state: _State, tokens: array[int], count: int, salt: str) -> None:
        """Keys of the first `count` pages."""
        while len(state.keys) < count:
            index = len(state.keys)
            before = state.keys[-1] if state.keys else self._root(salt)
            state.keys.append(hashlib.sha256(before + _page_tokens(tokens, index).tobytes()).digest())

    def _root(self, salt: str) -> bytes:
        return hashlib.sha256(self._fingerprint + salt.encode("utf-8", "surrogatepass")).digest()

    def _reachable(self, keys: Sequence[bytes], match: Match, retention: Retention) -> tuple[int, list[int]]:
        """The most pages that can be had together, and which of them lie on disk alone."""
        have = {index for index, page in enumerate(match.pages) if page != GONE}
        stored: dict[int, bool] = {}

        def there(index: int) -> bool:
            if index not in stored:
                stored[index] = index in have or keys[index] in self.files
            return stored[index]

        for depth in range(len(keys), len(match.pages), -1):
            needed = retention.needed(depth * PAGE)
            if all(there(index) for index in reversed(needed)):
                return depth, [index for index in needed if index not in have]
        return len(match.pages), []

    def _pays(self, pages: int, to_read: int, reads: int, cost: Callable[[int, int], float]) -> bool:
        milliseconds = to_read * self._memory.page_bytes / 1e6 * self._ms_per_mb
        if milliseconds < cost(pages * PAGE, reads):
            return True
        self.counters.unpaid += pages * PAGE
        self._ms_per_mb *= FORGIVE
        return False

    def _load(
        self, sequence: Running, tokens: array[int], missing: list[int], match: Match, tree: PrefixTree, pool: PagePool
    ) -> None:
        """Reads pages, first to last, until one is not there any more."""
        known = [page for page in match.pages if page != GONE]
        for page in known:  # room is made from idle pages: not from these
            pool.share(page)
        held: list[int] = []
        started = time.perf_counter()
        if pool.num_free < len(missing):
            self.counters.no_room += len(missing) * PAGE
            missing = []
        keys = self._states[sequence.id].keys
        for index in missing:
            content = self.files.get(keys[index], _page_tokens(tokens, index))
            if content is None:
                break
            held.append(pool.allocate())
            self._memory.page(held[-1])[:] = content
            tree.insert(tokens, (index + 1) * PAGE, held[-1], salt=sequence.salt)
        self._learn(len(held), time.perf_counter() - started)
        pool.free([*known, *held])

    def _learn(self, pages: int, seconds: float) -> None:
        if pages:
            self.counters.hit += pages * PAGE
            self.counters.read_seconds += seconds
            newest = seconds * 1e3 / (pages * self._memory.page_bytes / 1e6)
            self._ms_per_mb += NEWEST * (newest - self._ms_per_mb)

    def _expect(self, state: _State, tokens: array[int], missing: Sequence[int]) -> None:
        """Remembers what the files would have given."""
        for index in missing:
            content = self.files.get(state.keys[index], _page_tokens(tokens, index))
            if content is None:
                break
            state.expected[state.keys[index]] = hashlib.sha256(content.data).digest()
        self.counters.audited_hits += bool(state.expected)

    # ---- after a step

    def computed(self, sequence: Running, length: int) -> bool:
        """The first `length` positions of a running sequence are computed: whole pages of them that an audit waits for
        are compared, and new ones are written. False: an audit has failed, and what was read before is not trusted."""
        state, count = self._states.get(sequence.id), length // PAGE
        if state is None or self.bypassed or count <= state.num_kept:
            return True
        self._extend(state, sequence.tokens, count, sequence.salt)
        for index in range(state.num_kept, count):
            page, key = sequence.pages[index], state.keys[index]
            if page == GONE:
                continue
            expected = state.expected.pop(key, None)
            alone = index * PAGE >= (sequence.num_cached or 0)  # computed here, not read by a neighbour
            if expected is not None and alone and not self._same(expected, page):
                return False
            if key not in self.files:
                self.files.put(key, _page_tokens(sequence.tokens, index), self._memory.page(page))
        state.num_kept = count
        return True

    def _same(self, expected: bytes, page: int) -> bool:
        self.counters.audited_pages += 1
        if hashlib.sha256(self._memory.page(page).data).digest() == expected:
            return True
        self.counters.mismatched_pages += 1
        self.bypassed = True
        self.files.mistrust("a page that was computed again had other bytes than the stored one")
        LOG.error("a stored prefix differs from what is computed; stored prefixes are not used: %s", self.files.own)
        return False

    def forget(self, id: int) -> None:
        """The sequence has ended."""
        self._states.pop(id, None)

    def close(self) -> None:
        """Writes what is waiting."""
        self.files.close()


def fingerprint_of(executor: NativeExecutor) -> bytes:
    """Of everything that the bytes of a page depend on beside its tokens. Reads all weights once (`Model.digest`)."""
    facts = {
        "model": executor.model.digest,  # weights and spec: shapes, formats of weights and cache
        "runs": executor.spec.digest,  # the spec as it runs, which a deployment may have changed
        "numerics": core.NUMERICS_VERSION,
        "layout": LAYOUT_VERSION,
        "positions": PAGE,
        "page_bytes": executor.page_bytes,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


def _page_tokens(tokens: array[int], index: int) -> array[int]:
    return tokens[index * PAGE : (index + 1) * PAGE]
